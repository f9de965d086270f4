"""The process's global random generators, lent for a moment."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

_lending = threading.RLock()


@contextmanager
def borrowed(seed: int | None = None) -> Iterator[None]:
    """Let the caller draw from torch's CPU generator, from ``seed`` on if it is given, then put it back as it was.

    One thread at a time: what another draws meanwhile, for weights or for samples, would shift both.
    """
    with _lending, torch.random.fork_rng(devices=[]):
        if seed is not None:
            torch.default_generator.manual_seed(seed)
        yield


@contextmanager
def all_borrowed() -> Iterator[None]:
    """Do likewise with the generators of torch, numpy and Python together."""
    with borrowed():
        numpy_state, python_state = np.random.get_state(), random.getstate()
        try:
            yield
        finally:
            np.random.set_state(numpy_state)
            random.setstate(python_state)


def seed_all(seed: int) -> None:
    """Seed all of them; ``seed`` has up to 63 bits."""
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
