"""What a rank feeds into each step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from types import TracebackType
from typing import NamedTuple

import torch

from hybridpar.data.keys import Keys
from hybridpar.data.loader import StepLoader
from hybridpar.data.mixing import Mixing
from hybridpar.data.sampler import Order
from hybridpar.data.samples import Batch, Indices
from hybridpar.data.stream import Mark


class StepBatch(NamedTuple):
    """One rank's part of one step."""

    inputs: torch.Tensor | None
    """(own samples, ...); None on ranks that read nothing."""
    labels: torch.Tensor | None
    """(own samples,) int64, or (own samples, tokens); None likewise."""
    samples: int
    """Of the step, over all ranks."""
    first_sample: int
    """Sample id of the step's first sample."""
    share: float | None = None
    """Each input is mixed with that of the sample before it in the step, and has this share; None: it is not."""
    waited_s: float | None = None
    """How long the rank waited for its samples; None where it reads none, and where nobody knows."""


class Elsewhere:
    """Stands for a data set of ``size`` samples, None: without an end, on ranks that read nothing of it."""

    labels = None

    def __init__(self, size: int | None, shuffle: int | None = None) -> None:
        self._size, self.endless = size or 0, size is None
        self.shuffle = shuffle
        """How many samples of a stream are shuffled with each other; None: they have random access."""

    def __len__(self) -> int:
        return self._size

    def read(self, indices: Indices, keys: Keys) -> Batch:
        """Refuse: nobody reads here."""
        raise AssertionError(f"samples {indices} with keys {keys} are read elsewhere")


class Feed:
    """Iterates over the steps of an epoch; every iteration is the next epoch, unless ``set_epoch`` says which.

    Every rank gets a StepBatch for every step. Raises DataError while iterating for samples that cannot be read.
    """

    def __init__(self, loader: StepLoader, order: Order, mixing: Mixing | None = None) -> None:
        self._loader, self._order, self._mixing = loader, order, mixing
        self._epoch = self._start = 0

    @property
    def order(self) -> Order:
        """Which sample stands where."""
        return self._order

    @property
    def mark(self) -> Mark | None:
        """From where a stream may be read on after the step that was given last; None: from its beginning."""
        return self._loader.mark

    def go_on(self, mark: Mark) -> None:
        """Let a stream be opened at a mark, before anything is read."""
        self._loader.go_on(mark)

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        """Let the next iteration be over ``epoch``, from ``start_step`` on."""
        self._epoch, self._start = epoch, start_step

    def __len__(self) -> int:
        return self._order.steps

    def __iter__(self) -> Iterator[StepBatch]:
        self._loader.set_epoch(self._epoch, self._start)
        first, self._start = self._start, 0
        epoch, self._epoch = self._epoch, self._epoch + 1
        asked_s = time.perf_counter()
        for step, batch in enumerate(self._loader, first):
            waited_s = None if batch is None else time.perf_counter() - asked_s
            inputs, labels = batch if batch is not None else (None, None)
            share = None if self._mixing is None else self._mixing.of(epoch, step).share
            yield StepBatch(inputs, labels, self._order.count(step), self._order.start(step), share, waited_s)
            asked_s = time.perf_counter()

    def close(self) -> None:
        """End the processes that read ahead."""
        self._loader.close()

    def __enter__(self) -> Feed:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
