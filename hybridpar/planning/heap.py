"""The heap of a host: what it takes for what a program has in use at once.

A heap keeps what is freed, and a hole serves again only where a block fits into it. How much that costs depends on
the sizes of a model's tensors and their order, so a profile measures it: the bytes that the heap keeps for passes
of the whole chain, by micro-batch size. Beside what is counted of the same passes, they tell what a count means.

The size of a micro-batch decides, not the bytes in use: micro-batches in flight are of equal sizes, and one fits
into the holes of another. Several small ones leave less unused than a large one of as many bytes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable


class Heap:
    """Bytes taken per byte counted, at least 1: a line through measured (micro-batch, counted, taken)."""

    def __init__(self, points: Iterable[tuple[int, float, float]] = ()) -> None:
        measured = sorted((size, max(1.0, taken / counted)) for size, counted, taken in points if counted)
        self._sizes, self._ratios = [size for size, _ in measured], [ratio for _, ratio in measured]

    @property
    def most(self) -> float:
        """The most for any micro-batch size."""
        return max(self._ratios, default=1.0)

    def ratio(self, micro_batch: int) -> float:
        """Return it for a micro-batch size: beyond the measured ones that of the nearest; 1 if there are none."""
        sizes, ratios = self._sizes, self._ratios
        i = bisect_left(sizes, micro_batch)
        if i in {0, len(sizes)}:
            return ratios[min(i, len(sizes) - 1)] if sizes else 1.0
        share = (micro_batch - sizes[i - 1]) / (sizes[i] - sizes[i - 1])
        return ratios[i - 1] + share * (ratios[i] - ratios[i - 1])
