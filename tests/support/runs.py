"""Small trainings: in processes of their own, or here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from hybridpar import cli
from hybridpar.config import Config, compose
from hybridpar.planner import load_model
from hybridpar.report.summary import Summary
from hybridpar.runtime import trainer
from hybridpar.runtime.process import Process
from tests.support import trainer_worker
from tests.support.processes import ROOT, launch
from tests.support.trainer_worker import make_plan

WORKER = Path(__file__).with_name("trainer_worker.py")
COMMON = (
    "model=small_vgg",
    "data=digits",
    "profile=analytic",
    "monitor=off",
    "train.global_batch=48",
    "train.steps=3",
    "train.eval_every=null",
    "train.device=cpu",
    "train.mode=quiet",
)


def run(
    ranks: int, *arguments: str, timeout_s: float = 120, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Train under a plan made by hand, in as many processes; a job that hangs fails the test."""
    given = [str(WORKER), *arguments]
    return launch(ranks, trainer_worker.main, argv=given, timeout_s=timeout_s, **environment)


def run_by_torchrun(
    ranks: int, *arguments: str, restarts: int = 0, timeout_s: float = 120, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Do so by the launcher itself, where it matters what that does."""
    launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", f"--max-restarts={restarts}"]
    return subprocess.run(
        [sys.executable, "-m", *launcher, str(WORKER), *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", **environment},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def by_command(ranks: int, command: str, *overrides: str) -> subprocess.CompletedProcess[str]:
    """Run a command of hybridpar on several ranks, or alone."""
    return launch(ranks, cli.main, argv=["hybridpar", command, *overrides])


def train_by_command(ranks: int, folder: Path, *overrides: str) -> tuple[dict[str, Any], list[float]]:
    """Train as a user does; return the plan and the losses of all steps."""
    done = by_command(ranks, "train", *COMMON, f"run.dir={folder}", *overrides)
    assert done.returncode == 0, done.stderr
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return json.loads((folder / "plan.json").read_text()), [json.loads(line)["loss"] for line in lines]


def small(*overrides: str) -> Config:
    given = {o.partition("=")[0] for o in overrides}
    data = () if "data" in given else ("data=synthetic", "data.size=16", "data.test_size=8")
    model = () if "model" in given else ("model=small_vgg", "model.options={width: 4, classifier_width: 8}")
    monitor = () if "monitor" in given else ("monitor=off",)
    return compose([*data, *model, *monitor, "train.global_batch=8", "train.device=cpu", *overrides])


def train_here(folder: Path, *overrides: str, micro_batch: int = 8) -> Summary:
    """Train in this process, under a plan of one stage."""
    config = small(f"run.dir={folder}", *overrides)
    traced, source = load_model(config)
    plan = make_plan("single", config, traced.chain)
    plan = replace(plan, stages=tuple(replace(stage, micro_batch=micro_batch) for stage in plan.stages))
    summary = trainer.train(config, plan, traced, source, Process("cpu"))
    assert summary is not None
    return summary
