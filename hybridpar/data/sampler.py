"""The order of an epoch's samples: a function of seed and epoch that knows nothing of plans and ranks."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hybridpar.data.keys import Keys, mix
from hybridpar.errors import ConfigError, DataError

Positions = NDArray[np.int64]

_ORDER, _AUGMENT = 1, 2  # what a key is for; keys of different purposes are unrelated


ENDLESS_STEPS = 2**62
"""More steps than anyone takes: of the only epoch that samples without an end have."""


@dataclass(frozen=True)
class Order(ABC):
    """Which sample of the data set stands where in an epoch.

    A sample's id is its position in the epoch; step k covers the positions ``[k * global_batch, (k + 1) *
    global_batch)``. Raises ConfigError or DataError where no step is possible.
    """

    size: int | None
    """Samples of an epoch; None: it has no end."""
    global_batch: int
    """Samples per step."""
    seed: int = 0
    drop_last: bool = False
    """Leave out the samples after the last full step (others in every epoch)."""

    def __post_init__(self) -> None:
        if self.global_batch < 1:
            raise ConfigError(f"the global batch is {self.global_batch}; it must be at least 1")
        if self.size is not None and self.size < 1:
            raise DataError("the data set has no samples")
        if self.steps == 0:
            raise DataError(
                f"the data set has {self.size} samples, fewer than one global batch of {self.global_batch}, and "
                "the last partial batch is dropped; make the global batch smaller or keep the last batch"
            )

    @property
    def steps(self) -> int:
        """Steps of one epoch."""
        if self.size is None:
            return ENDLESS_STEPS
        return self.size // self.global_batch if self.drop_last else -(-self.size // self.global_batch)

    def start(self, step: int) -> int:
        """Return the position of the first sample of ``step``."""
        return step * self.global_batch

    def count(self, step: int) -> int:
        """Return the samples of ``step``: the global batch, or fewer in a partial last step."""
        return self.global_batch if self.size is None else min(self.global_batch, self.size - self.start(step))

    @property
    def counts(self) -> set[int]:
        """What ``count`` may be."""
        return {self.count(0), self.count(self.steps - 1)}

    def total(self, steps: int | None, epochs: int) -> int:
        """Return the steps of a training of ``steps``, or where that is None of ``epochs``; else ConfigError."""
        if steps is None and self.size is None:
            raise ConfigError(
                "train.steps: missing, but the training data has no length and so no epochs; set train.steps"
            )
        return self.steps * epochs if steps is None else steps

    @abstractmethod
    def indices(self, epoch: int, positions: Positions) -> NDArray[np.int64]:
        """Return the data set's index of the samples at ``positions`` of ``epoch``."""

    def keys(self, epoch: int, positions: Positions) -> Keys:
        """Return the keys of the augmentation: hashes of seed, epoch and sample id."""
        return mix(self.seed, epoch, _AUGMENT, positions)


@dataclass(frozen=True)
class EpochOrder(Order):
    """The order of a data set with random access: shuffled, or without ``shuffle`` that of the data set."""

    size: int
    shuffle: bool = True

    @staticmethod
    def sequential(size: int, global_batch: int) -> EpochOrder:
        """Return the order of evaluation: every sample exactly once, unshuffled, a partial last batch included."""
        return EpochOrder(size, global_batch, shuffle=False)

    def indices(self, epoch: int, positions: Positions) -> NDArray[np.int64]:
        """Return the data set's index of the samples at ``positions`` of ``epoch``."""
        return _permutation(self.size, self.seed, epoch)[positions] if self.shuffle else positions


@functools.lru_cache(maxsize=2)
def _permutation(size: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Sort the indices by their keys."""
    order = np.argsort(mix(seed, epoch, _ORDER, np.arange(size)), kind="stable")
    order.setflags(write=False)
    return order
