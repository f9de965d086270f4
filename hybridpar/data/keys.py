"""Keys: 64-bit numbers that make random choices depend on what is chosen for, not on who chooses or when."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Keys = NDArray[np.uint64]

_MASK = (1 << 64) - 1
_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def mix(*parts: int | NDArray[np.int64] | Keys) -> Keys:
    """Hash integers and arrays of integers, broadcast against each other, into one key each.

    Every part goes through one round of splitmix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number
    generators", OOPSLA 2014): ``state = finalize((state xor part) + gamma)``. It is defined by these lines alone,
    so that orders and augmentations stay the same across versions of numpy and torch. The result has at least one
    dim.
    """
    state = np.zeros(1, dtype=np.uint64)
    for part in parts:
        number = np.array([part & _MASK], dtype=np.uint64) if isinstance(part, int) else part.astype(np.uint64)
        state = _finalize((state ^ number) + _GAMMA)
    return state


def _finalize(z: Keys) -> Keys:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
