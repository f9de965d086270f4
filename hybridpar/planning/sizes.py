"""Micro-batch sizes worth trying."""

from __future__ import annotations

from functools import lru_cache

PARTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""Numbers of micro-batches that a share is split into; sizes that are powers of two are tried besides."""


@lru_cache(maxsize=1024)
def usual_sizes(share: int) -> tuple[int, ...]:
    """Return the sizes for ranks that have ``share`` samples in a step, ascending."""
    powers = {1 << k for k in range(share.bit_length()) if 1 << k <= share <= 64 << k}
    return tuple(sorted({-(-share // n) for n in PARTS} | powers))
