"""The command `hybridpar verify` in real processes."""

from __future__ import annotations

import pytest

from tests.support.command import run
from tests.support.runs import by_command

SMALL = (
    "model=small_vgg",
    "model.options={width: 4, classifier_width: 8}",
    "data=synthetic",
    "data.size=20",
    "train.global_batch=12",
    "train.device=cpu",
)


def test_three_stages_on_four_ranks_agree() -> None:
    done = by_command(4, "verify", *SMALL, "plan=three_stage", "optimizer.clip=1.0")
    assert done.returncode == 0, done.stderr
    assert "small_vgg on 4 ranks against a single process, float64: 2 steps of 12, 8 samples" in done.stdout
    assert done.stdout.splitlines()[-1] == "all agree"


def test_a_difference_ends_with_exit_code_1() -> None:
    """Not even rounding fits this tolerance."""
    done = by_command(
        2,
        "verify",
        *SMALL,
        "plan=front_tail",
        "verify.precision=float32",
        "verify.tolerance=1e-12",
        "optimizer=adamw",
    )
    assert done.returncode == 1, done.stderr
    assert "float32: 1 step of 12 samples" in done.stdout
    assert "first divergence: step 0: " in done.stdout
    assert "AdamW in float32" in done.stdout


def test_one_process_needs_no_torchrun(capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = run(capsys, "verify", *SMALL, "verify.precision=float32", "verify.steps=1")
    assert out.splitlines()[-1] == "all agree"
    _, err = run(capsys, "verify", *SMALL, "verify.steps=0", code=2)
    assert "verify.steps: 0 must be at least 1" in err
