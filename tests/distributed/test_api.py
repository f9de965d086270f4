"""The Python API in a user's own script, under torchrun and alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from hybridpar.report import kernels
from hybridpar.report.comparison import compare
from hybridpar.report.run import Run
from tests.distributed.api_worker import BATCH, EPOCHS, SAMPLES, Blobs, make_model
from tests.support import command

WORKER = Path(__file__).with_name("api_worker.py")
ROOT = WORKER.parents[2]
STEPS = EPOCHS * -(-SAMPLES // BATCH)


def run(ranks: int, folder: Path, shape: str, feeding: str) -> list[dict[str, Any]]:
    """What every rank wrote down."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    done = subprocess.run(
        [sys.executable, *(launcher if ranks > 1 else []), str(WORKER), shape, feeding, str(folder)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"{r}.json").read_text()) for r in range(ranks)]


def losses_of(ranks: list[dict[str, Any]]) -> list[float]:
    """The losses, equal on all ranks and falling."""
    losses: list[float] = ranks[0]["losses"]
    assert all(r["losses"] == losses for r in ranks)
    assert len(losses) == STEPS
    assert losses[-1] < 0.5 * losses[0]
    assert {(r["top1"], r["samples"]) for r in ranks} == {(ranks[0]["top1"], SAMPLES)}
    assert ranks[0]["top1"] > 0.9
    return losses


def single_process() -> list[float]:
    """Plain PyTorch on the same data in the order of the data set."""
    data, model = Blobs(), make_model().double()
    x, y = data.images.double(), torch.tensor(data.labels)
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), []
    for _ in range(EPOCHS):
        for start in range(0, SAMPLES, BATCH):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x[start : start + BATCH]), y[start : start + BATCH])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


def test_five_lines_under_torchrun(tmp_path: Path) -> None:
    ranks = run(2, tmp_path, "three_stage", "loader")
    losses_of(ranks)
    assert ranks[0]["kinds"] == ["front", "middle", "tail"]
    assert ranks[0]["world"] == 2


def test_five_lines_in_a_single_process_give_the_same(tmp_path: Path) -> None:
    """The order of the samples depends on the seed, not on the plan."""
    alone, together = tmp_path / "alone", tmp_path / "together"
    for folder in (alone, together):
        folder.mkdir()
    one = losses_of(run(1, alone, "auto", "loader"))
    two = losses_of(run(2, together, "data_parallel", "loader"))
    assert one == pytest.approx(two, rel=1e-9)


def test_no_thread_of_a_backend_outlives_the_script(tmp_path: Path) -> None:
    """One that gives back a tensor when the interpreter is gone aborts the process."""
    run(2, tmp_path, "three_stage", "loader")
    for rank in range(2):
        threads = json.loads((tmp_path / f"threads{rank}.json").read_text())
        assert threads
        assert [name for name in threads if "gloo" in name] == []


def test_whole_batches_on_every_rank(tmp_path: Path) -> None:
    """Every rank is given the whole step and takes its own samples; the last step of an epoch is smaller."""
    losses = losses_of(run(2, tmp_path, "pipeline", "whole"))
    assert losses == pytest.approx(single_process(), rel=1e-9)


def test_a_recorded_loop_makes_a_run_that_the_report_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ranks = run(2, tmp_path, "three_stage", "recorded")
    losses = losses_of(ranks)
    found = Run.load(tmp_path / "run")
    lines = [json.loads(line) for line in (found.folder / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == list(enumerate(losses))
    assert {line["epoch"] for line in lines} == {None}
    assert all(line["samples_per_s"] == pytest.approx(line["samples"] / line["step_s"]) for line in lines)
    assert [tuple(s.step for s in record.steps) for record in found.timings] == [(2, 3, 4)] * 2
    assert all(s.input_s is not None for s in found.timings[0].steps), "the front's rank reads"
    comparison = compare(found)
    assert comparison is not None
    traced = kernels.load(found.folder, 2, found.plan.fingerprint)
    assert [record.steps for record in traced] == [(7,)] * 2
    out, _ = command.run(capsys, "report", str(found.folder))
    assert "largest deviations" in out
    assert "no step" not in out
