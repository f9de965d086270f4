"""What a setting trains."""

from __future__ import annotations

from functools import lru_cache

from hybridpar.config import compose
from hybridpar.model.deferred import Source
from hybridpar.model.trace import Traced
from hybridpar.planner import load_model
from scripts.bench.cluster.setting import Setting
from scripts.bench.work import Work

RATE = 0.01
"""Learning rate: great enough that a wrong gradient shows in the losses of five steps."""


def work_of(setting: Setting, *, dropout: bool) -> Work:
    """Return what all contestants train; only without dropout can their losses agree. Raises HybridparError."""
    traced, source = _loaded(tuple(setting.overrides))
    return Work(source, traced, setting.global_batch, RATE, setting.seed, dropout)


@lru_cache(maxsize=1)
def _loaded(overrides: tuple[str, ...]) -> tuple[Traced, Source]:
    return load_model(compose(overrides))
