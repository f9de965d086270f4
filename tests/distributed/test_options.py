"""What the command line lets a user fix of a plan, trained from the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
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


def train(ranks: int, folder: Path, *overrides: str) -> tuple[dict[str, Any], list[float]]:
    """Train as a user does; return the plan and the losses of all steps."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    done = subprocess.run(
        [
            sys.executable,
            *(launcher if ranks > 1 else []),
            "-m",
            "hybridpar",
            "train",
            *COMMON,
            f"run.dir={folder}",
            *overrides,
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return json.loads((folder / "plan.json").read_text()), [json.loads(line)["loss"] for line in lines]


def test_pinned_replicas_and_recomputation_train_as_a_single_process_does(tmp_path: Path) -> None:
    pinned = ("plan=front_tail", "plan.replicas=2", "plan.front.recompute=true", "plan.effort=quick")
    plan, losses = train(4, tmp_path / "pinned", "train.precision=float64", *pinned)
    assert (plan["replicas"], plan["world"]) == (2, 4)
    assert [stage["recompute"] for stage in plan["stages"]] == [True, False]
    _, alone = train(1, tmp_path / "alone", "train.precision=float64", "plan=data_parallel")
    assert losses == pytest.approx(alone, rel=1e-10)


def test_a_sharded_optimizer_that_the_planner_chose_is_what_runs(tmp_path: Path) -> None:
    """The configuration says ``auto``; the plan's recipe says what that came to."""
    pytest.importorskip("deepspeed")
    common = ("plan=data_parallel", "optimizer=adamw")
    plan, losses = train(2, tmp_path / "auto", *common, "optimizer.sharding=auto")
    assert plan["recipe"]["sharding"] == "zero1"
    other, unsharded = train(2, tmp_path / "none", *common)
    assert other["recipe"]["sharding"] == "none"
    assert losses == pytest.approx(unsharded, rel=1e-5)
