"""The Python API: a model that is wrapped otherwise than it was planned."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import hybridpar
from hybridpar.errors import PlanError
from hybridpar.planning.plan import Plan

SGD = partial(torch.optim.SGD, lr=0.1)


def planned() -> tuple[nn.Sequential, Plan]:
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Flatten(), nn.Linear(12, 3))
    return model, hybridpar.plan(model, (1, 4, 4), 2, effort="quick")


@pytest.mark.parametrize("given", [{"autocast": "bfloat16"}, {"memory_format": "channels_last"}], ids=str)
def test_what_the_model_was_not_planned_with_is_refused(given: dict[str, Any]) -> None:
    """It was ignored, as the layers were known."""
    model, plan = planned()
    (name,) = given
    with pytest.raises(PlanError, match=rf"{name}: {given[name]}, but the model was planned with None"):
        hybridpar.wrap(model, plan, SGD, **given)
    hybridpar.wrap(model, plan, SGD)


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        (None, r"requires_grad of 1 parameters, as 0\.weight, has changed since .*; plan again"),
        ((1, 4, 4), "model"),
    ],
)
def test_a_model_that_was_frozen_since_is_planned_again(shape: tuple[int, ...] | None, said: str) -> None:
    """The old plan and the old layers were taken, which know nothing of it."""
    model, plan = planned()
    model[0].weight.requires_grad_(requires_grad=False)
    with pytest.raises(PlanError, match=said):
        hybridpar.wrap(model, plan, SGD, in_shape=shape)
    again = hybridpar.plan(model, (1, 4, 4), 2, effort="quick")
    job = hybridpar.wrap(model, again, SGD)
    assert job.chain.frozen == ("0.weight",)
    before = model[0].weight.clone()
    job.step((torch.randn(2, 1, 4, 4), torch.tensor([0, 2])))
    assert torch.equal(job.parameters["0.weight"].tensor, before)
