"""What the command line lets a user fix of a plan, trained from the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.runs import train_by_command


def test_pinned_replicas_and_recomputation_train_as_a_single_process_does(tmp_path: Path) -> None:
    pinned = ("plan=front_tail", "plan.replicas=2", "plan.front.recompute=true", "plan.effort=quick")
    plan, losses = train_by_command(4, tmp_path / "pinned", "train.precision=float64", *pinned)
    assert (plan["replicas"], plan["world"]) == (2, 4)
    assert [stage["recompute"] for stage in plan["stages"]] == [True, False]
    _, alone = train_by_command(1, tmp_path / "alone", "train.precision=float64", "plan=data_parallel")
    assert losses == pytest.approx(alone, rel=1e-10)


def test_a_sharded_optimizer_that_the_planner_chose_is_what_runs(tmp_path: Path) -> None:
    """The configuration says ``auto``; the plan's recipe says what that came to."""
    pytest.importorskip("deepspeed")
    common = ("plan=data_parallel", "optimizer=adamw")
    plan, losses = train_by_command(2, tmp_path / "auto", *common, "optimizer.sharding=auto")
    assert plan["recipe"]["sharding"] in {"zero1", "zero2"}
    other, unsharded = train_by_command(2, tmp_path / "none", *common)
    assert other["recipe"]["sharding"] == "none"
    assert losses == pytest.approx(unsharded, rel=1e-5)


def test_autocast_trains_from_the_command_line_close_to_float32(tmp_path: Path) -> None:
    """The same plan shape, and losses apart by roundings of bfloat16 (2^-9), but apart."""
    common = ("plan=front_tail", "plan.effort=quick")
    _, lowered = train_by_command(2, tmp_path / "lowered", *common, "train.autocast=bfloat16")
    _, whole = train_by_command(2, tmp_path / "whole", *common)
    assert lowered != whole
    assert lowered == pytest.approx(whole, rel=2**-6)
