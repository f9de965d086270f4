"""The scale of the loss over the steps, against torch's own rule, and what a training says of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from hybridpar.config import compose
from hybridpar.errors import ConfigError, DivergenceError
from hybridpar.runtime.scaler import Scaler
from hybridpar.train_section import LossScale
from tests.support.runs import train_here


@pytest.mark.parametrize(
    "settings", [LossScale(growth_interval=3), LossScale(2.0**125, 4.0, 0.25, 1), LossScale(10.0, 1.5, 0.9, 2)]
)
def test_the_scale_is_that_of_torch(settings: LossScale) -> None:
    """Also near the largest number of float32, where it stops to grow."""
    drawn = torch.rand(200, generator=torch.Generator().manual_seed(3)) > 0.2
    ours, scale, grown = Scaler(settings), torch.tensor(settings.init), torch.zeros((), dtype=torch.int32)
    for finite in drawn.tolist():
        assert ours.scale == pytest.approx(float(scale), rel=1e-4)  # torch rounds it to float32
        ours.update(finite=finite)
        torch._amp_update_scale_(
            scale,
            grown,
            torch.tensor(float(not finite)),
            settings.growth_factor,
            settings.backoff_factor,
            settings.growth_interval,
        )
    assert ours.skipped == int((~drawn).sum())
    again = Scaler(settings)
    again.load(ours.state())
    assert torch.equal(again.state(), ours.state())
    assert again.scale == ours.scale


def records(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_skipped_steps_are_told_and_end_no_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A scale that float16 cannot hold shrinks until it can."""
    settings = (
        "train.autocast=float16",
        "train.loss_scale.init=4294967296",
        "train.loss_scale.backoff_factor=0.03125",
    )
    summary = train_here(tmp_path, *settings, "train.epochs=3", "train.log_every=1", "train.mode=plain")
    lines = records(tmp_path)
    skipped = [line["skipped"] for line in lines]
    assert skipped[0] is True
    assert skipped[-1] is False
    assert summary.skipped_steps == sum(map(bool, skipped))
    expected = [2.0 ** (32 - 5 * sum(map(bool, skipped[:n]))) for n in range(len(lines))]
    assert [line["loss_scale"] for line in lines] == expected
    assert f"({summary.skipped_steps} skipped)" in capsys.readouterr().out


def test_gradients_that_are_finite_at_no_scale_end_a_training(tmp_path: Path) -> None:
    settings = ("train.autocast=float16", "train.loss_scale.init=1e37", "train.steps=40")
    with pytest.raises(DivergenceError, match=r"not finite at step 19, the last of 20 in a row.*loss_scale\.init"):
        train_here(tmp_path / "gradients", *settings)
    large = ("optimizer.lr=1e30", "train.eval_every=null")
    with pytest.raises(DivergenceError, match=r"loss is not finite .* 20 in a row .*: it arose in layer features"):
        train_here(tmp_path / "loss", *large, "train.loss_scale.enabled=true", "train.steps=40")
    assert len(records(tmp_path / "gradients")) == 20


def test_what_is_out_of_range_is_refused() -> None:
    for override, said in (
        ("init=0", "loss_scale.init: 0.0 must lie above 0"),
        ("growth_factor=1", "growth_factor: 1.0 must be a number above 1"),
        ("backoff_factor=1", "backoff_factor: 1.0 must lie between 0 and 1"),
        ("growth_interval=0", "growth_interval: 0 must be at least 1"),
    ):
        with pytest.raises(ConfigError, match=said):
            compose([f"train.loss_scale.{override}"])


def test_it_is_on_where_float16_asks_for_it() -> None:
    assert compose(["train.autocast=float16"]).recipe().scaling
    assert not compose(["train.autocast=bfloat16"]).recipe().scaling
    assert not compose(["train.autocast=float16", "train.loss_scale.enabled=false"]).recipe().scaling
    assert compose(["train.loss_scale.enabled=true"]).train.scaling == compose().train.loss_scale.__class__(
        enabled=True
    )
