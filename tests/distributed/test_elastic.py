"""Runs that go on with other ranks, or after a failure, from the command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.processes import ROOT
from tests.support.runs import by_command

SMALL = (
    *("data=synthetic", "data.size=40", "data.test_size=8", "train.global_batch=8", "train.epochs=2"),
    *("model=small_vgg", "model.options={width: 4, classifier_width: 8}", "train.device=cpu"),
    *("checkpoint.every=2", "checkpoint.keep=9", "train.precision=float64", "plan.effort=quick"),
)


def train(ranks: int, *arguments: str) -> str:
    """Run ``hybridpar train`` and return what it printed."""
    done = by_command(ranks, "train", *SMALL, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def kill_one_rank(launcher: subprocess.Popen[str], metrics: Path, lines: int) -> None:
    """SIGKILL a rank as soon as so many steps are noted."""
    deadline_s = time.monotonic() + 90
    while not (metrics.exists() and metrics.read_text().count("\n") >= lines) and time.monotonic() < deadline_s:
        time.sleep(0.005)
    ranks = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    os.kill(max(map(int, ranks)), signal.SIGKILL)


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_goes_on_with_fewer_and_with_more_ranks_and_says_what_changed(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(1, f"run.dir={whole}")
    first = train(2, f"run.dir={parts}", "train.steps=4", "plan=pipeline")
    assert "under a new plan" not in first
    said = train(1, f"run.dir={parts}", "train.steps=6", "resume=auto")
    assert "continuing after step 4" in said
    assert "the run had 2 ranks and goes on with 1, under a new plan" in said
    changed = said[said.index("what differs") :]
    assert changed.index("stages") < changed.index("front") < changed.index("middle")
    said = train(3, f"run.dir={parts}", "train.steps=10", "resume=auto")
    assert "the run had 1 rank and goes on with 3, under a new plan" in said
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-10)


def test_as_many_ranks_go_on_under_their_own_plan(tmp_path: Path) -> None:
    """Also where the configuration would give another one."""
    train(2, f"run.dir={tmp_path}", "train.steps=4", "plan=pipeline")
    said = train(2, f"run.dir={tmp_path}", "train.steps=6", "resume=auto")
    assert "under a new plan" not in said
    assert [s["kind"] for s in json.loads((tmp_path / "plan.json").read_text())["stages"]] == ["middle"]


def test_torchrun_restarts_a_job_whose_rank_was_killed_from_its_checkpoint(tmp_path: Path) -> None:
    """By --max-restarts alone, without resume=auto, bit for bit."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    command = [sys.executable, *launcher, "-m", "hybridpar", "train", *SMALL, "plan=pipeline", "train.steps=60"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    with subprocess.Popen(
        [*command, f"run.dir={cut}"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        kill_one_rank(process, cut / "metrics.jsonl", 7)
        said, _ = process.communicate(timeout=90)
    assert process.returncode == 0, said
    assert "continuing after step" in said
    train(2, f"run.dir={whole}", "plan=pipeline", "train.steps=60")
    assert losses(cut) == losses(whole)
    assert json.loads((cut / "summary.json").read_text())["steps"] == 60
