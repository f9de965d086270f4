"""The heap of a host: what it takes for what a program has in use at once.

A heap keeps what is freed, and a hole serves again only where a block fits into it. How much that costs depends on
the sizes of a model's tensors and their order, so a profile measures it: the bytes that the heap keeps for passes
of the whole chain, by micro-batch size. What is counted of the same passes is in use of it at once; the rest is
holes.

Micro-batches in flight share their holes: they are of equal sizes, and one fits where another was. So holes come
on top of what is in use, however many they are; and of a part of the chain there are as many as it has of what
passes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from typing import NamedTuple


class Filling(NamedTuple):
    """A heap after passes of the whole chain, in bytes."""

    counted: float
    """The most in use at once."""
    holes: float
    """What was kept beyond."""


class Heap:
    """Holes by micro-batch size: a line through measured (micro-batch, counted, taken)."""

    def __init__(self, points: Iterable[tuple[int, float, float]] = ()) -> None:
        measured = sorted((size, Filling(counted, max(0.0, taken - counted))) for size, counted, taken in points)
        self._sizes, self._fillings = [size for size, _ in measured], [filling for _, filling in measured]

    @property
    def most(self) -> float:
        """The most holes for any micro-batch size."""
        return max((filling.holes for filling in self._fillings), default=0.0)

    def at(self, micro_batch: int) -> Filling:
        """Return it for a micro-batch size: beyond the measured ones that of the nearest; nothing without any."""
        sizes, fillings = self._sizes, self._fillings
        i = bisect_left(sizes, micro_batch)
        if i in {0, len(sizes)}:
            return fillings[min(i, len(sizes) - 1)] if sizes else Filling(0.0, 0.0)
        share = (micro_batch - sizes[i - 1]) / (sizes[i] - sizes[i - 1])
        return Filling(*(a + share * (b - a) for a, b in zip(fillings[i - 1], fillings[i], strict=True)))
