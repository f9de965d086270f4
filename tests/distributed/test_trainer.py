"""The training job in real processes: what it writes, and how it ends when something is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from hybridpar.report.summary import Summary
from hybridpar.schema import to_data

WORKER = Path(__file__).with_name("trainer_worker.py")
ROOT = WORKER.parents[2]


def run(ranks: int, *arguments: str, restarts: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    """Start the worker, by torchrun where there are several ranks; a job that hangs fails the test."""
    launcher = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={ranks}",
        f"--max-restarts={restarts}",
    ]
    return subprocess.run(
        [sys.executable, *(launcher if ranks > 1 else []), str(WORKER), *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """One epoch in three stages on four ranks."""
    folder = tmp_path_factory.mktemp("trainer") / "run"
    done = run(4, "three_stage", f"run.dir={folder}", "optimizer.clip=5.0", "train.seed=3", "optimizer.lr=0.1")
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_the_run_directory_holds_everything(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    names = {p.name for p in folder.iterdir()}
    assert names >= {
        "config.yaml",
        "plan.json",
        "metrics.jsonl",
        "evaluations.jsonl",
        "summary.json",
        "tensorboard",
    }
    assert yaml.safe_load((folder / "config.yaml").read_text())["train"]["seed"] == 3
    assert json.loads((folder / "plan.json").read_text())["world"] == 4
    assert any((folder / "tensorboard").iterdir())


def test_every_step_has_its_line(finished: tuple[Path, str]) -> None:
    lines = [json.loads(line) for line in (finished[0] / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(30))
    assert [line["samples"] for line in lines] == [48] * 29 + [1437 - 29 * 48]
    assert lines[-1]["loss"] < lines[0]["loss"]
    for line in lines:
        assert line["epoch"] == 0
        assert line["lr"] == 0.1
        assert line["samples_per_s"] == pytest.approx(line["samples"] / line["step_s"])


def test_the_summary_says_what_was_done(finished: tuple[Path, str]) -> None:
    folder, printed = finished
    summary = Summary.load(folder / "summary.json")
    assert (summary.test_samples, summary.steps, summary.epochs, summary.world) == (360, 30, 1, 4)
    assert 0.2 < summary.test_accuracy <= summary.test_top5 <= 1.0
    assert len(summary.measured_memory_bytes) == 4
    assert min(summary.measured_memory_bytes) > 0
    assert summary.predicted_step_s is None
    assert [(s.kind, s.degree, s.micro_batch) for s in summary.stages] == [
        ("front", 2, 8),
        ("middle", 2, 6),
        ("tail", 2, 16),
    ]
    assert summary.gpu.utilisation is None
    assert "no GPU" in (summary.gpu.reason or "")
    assert f"{summary.test_accuracy:.4f}" in printed
    assert str(folder) in printed
    assert json.loads((folder / "summary.json").read_text()) == json.loads(json.dumps(to_data(summary)))


def test_evaluation_counts_every_test_sample_once(finished: tuple[Path, str]) -> None:
    (line,) = (finished[0] / "evaluations.jsonl").read_text().splitlines()
    result = json.loads(line)
    assert (result["samples"], result["step"]) == (360, 30)
    for share in (result["top1"], result["top5"]):
        assert share * 360 == pytest.approx(round(share * 360))


def test_another_world_is_one_message_before_anything_starts(tmp_path: Path) -> None:
    done = run(1, "three_stage", f"run.dir={tmp_path / 'run'}")
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert "the plan is for 4 processes, but this job has 1" in line
    assert "torchrun --nproc-per-node 4" in line
    assert not (tmp_path / "run").exists()


def test_another_world_under_torchrun_is_said_once(tmp_path: Path) -> None:
    done = run(2, "three_stage", f"run.dir={tmp_path / 'run'}")
    assert done.returncode != 0
    assert done.stderr.count("the plan is for 4 processes, but this job has 2") == 1
    assert "exitcode  : 2" in done.stderr
    assert 'trainer_worker.py", line' not in done.stderr


def test_a_failing_rank_ends_the_job(tmp_path: Path) -> None:
    started_s = time.monotonic()
    done = run(4, "three_stage", f"run.dir={tmp_path / 'run'}", BREAK_RANK="2")
    assert done.returncode != 0
    assert time.monotonic() - started_s < 60
    assert (
        "rank 2 failed in 'forward middle.0 (features.5..features.8) micro-batch 0': broken on purpose"
        in done.stderr
    )
    assert done.stderr.count("ZeroDivisionError: broken on purpose") == 1


def test_torchrun_restarts_a_failed_job(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    done = run(2, "data_parallel", f"run.dir={folder}", "train.steps=2", restarts=1, BREAK_RANK="1")
    assert done.returncode == 0, done.stderr
    assert Summary.load(folder / "summary.json").steps == 2


def test_one_process_needs_no_torchrun(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    arguments = ("single", f"run.dir={folder}", "train.steps=2", "train.eval_every=null", "train.mode=quiet")
    done = run(1, *arguments)
    assert done.returncode == 0, done.stderr
    assert Summary.load(folder / "summary.json").test_samples == 360
    again = run(1, *arguments)
    assert again.returncode == 2
    assert "holds a run already" in again.stderr
