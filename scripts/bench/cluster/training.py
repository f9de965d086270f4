"""What a setting trains."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch

from hybridpar.config import compose
from hybridpar.model.deferred import Source
from hybridpar.model.trace import Traced
from hybridpar.planner import load_model
from scripts.bench.cluster.setting import Setting
from scripts.bench.work import Work

RATE = 0.01
"""Learning rate: great enough that a wrong gradient shows in the losses of five steps."""


def work_of(setting: Setting) -> Work:
    """Return what all contestants train. Raises HybridparError."""
    traced, source = _loaded(tuple(setting.overrides))
    return Work(source, traced, setting.global_batch, RATE, setting.seed, dropout=True)


def comparable_work_of(setting: Setting) -> Work:
    """Return what all contestants train to show that they do the same, so that their losses can agree.

    It has no dropout. With batch norms it is in float64: few values per channel, as the last layers of a network
    for images have them here, magnify the roundings of float32 until one process with its channels last differs by
    1 to 4 % from itself after five steps (ResNet-18 and -50, 64x64 images). Raises HybridparError.
    """
    work = work_of(setting)
    normed = any(layer.batch_norm for layer in work.traced.chain.layers)
    return replace(work, dropout=False, dtype=torch.float64 if normed else torch.float32)


@lru_cache(maxsize=1)
def _loaded(overrides: tuple[str, ...]) -> tuple[Traced, Source]:
    return load_model(compose(overrides))
