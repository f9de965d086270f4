"""The models that rivals train, without dropout, so that their losses must agree."""

from __future__ import annotations

from functools import partial
from typing import Any

import torchvision
from torch import nn

from hybridpar.model.deferred import defer
from hybridpar.model.trace import trace
from scripts.bench.work import Work

CHAIN_OF_LINEARS = "linears"
"""A model that computes next to nothing: what it takes is what its actions cost."""
IN_SHAPE = {CHAIN_OF_LINEARS: (8,)}
IMAGE = (3, 64, 64)
RATE = 0.001


def build(name: str) -> nn.Module:
    """Return torchvision's model with random weights."""
    if name == CHAIN_OF_LINEARS:
        return nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    model: nn.Module = torchvision.models.get_model(name, weights=None)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def work_of(name: str, global_batch: int, **settings: Any) -> Work:
    """Return what all rivals train; ``settings`` are those of ``trace``."""
    source = defer(partial(build, name))
    kind = type(source.module).__name__  # as hybridpar.wrap names a model
    traced = trace(source.module, IN_SHAPE.get(name, IMAGE), kind, **settings)
    return Work(source, traced, global_batch, RATE)
