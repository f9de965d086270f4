"""The heap of a host: what it takes for what a program has in use at once.

A heap keeps what is freed, and a hole serves again only where a block fits into it. How much that costs depends on
the sizes of a model's tensors and their order, so a profile measures it: the bytes that the heap keeps for passes
of the whole chain, by micro-batch size. Beside what is counted of the same passes, they tell what a count means.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable


class Heap:
    """A line through measured points (bytes counted, bytes taken), from the origin on."""

    def __init__(self, points: Iterable[tuple[float, float]] = ()) -> None:
        self._counted, self._taken = [0.0], [0.0]
        for counted, taken in sorted(points):
            if counted > self._counted[-1]:
                self._counted.append(counted)
                self._taken.append(max(taken, self._taken[-1]))

    @property
    def most(self) -> float:
        """The most bytes taken per byte counted, at least 1."""
        ratios = (taken / counted for counted, taken in zip(self._counted[1:], self._taken[1:], strict=True))
        return max(1.0, *ratios, 1.0)

    def bytes(self, counted: float) -> float:
        """Return the bytes that the heap takes; as many as counted where nothing was measured."""
        if len(self._counted) == 1:
            return counted
        if counted >= self._counted[-1]:
            return counted * self._taken[-1] / self._counted[-1]
        i = max(bisect_left(self._counted, counted), 1)
        share = (counted - self._counted[i - 1]) / (self._counted[i] - self._counted[i - 1])
        return self._taken[i - 1] + share * (self._taken[i] - self._taken[i - 1])
