"""How many samples one core reads in a second."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from hybridpar.data.keys import mix
from hybridpar.data.samples import Samples
from hybridpar.data.stream import StreamSamples
from hybridpar.errors import DataError

_BATCH, _BUDGET_S = 32, 1.0
"""Samples per read, and CPU seconds of all reads."""


def samples_per_s(samples: Samples, clock: Callable[[], float] = time.process_time) -> float:
    """Return the samples per CPU second that ``samples`` are read with: decoding, augmenting, collating.

    Reads random batches for about a second, the first one to warm up. What it waits for a disk or a network
    does not count: further cores do not shorten that. Raises DataError for samples that cannot be read, or not at
    random.
    """
    if isinstance(samples, StreamSamples):
        raise DataError("a stream has no random access")
    order = np.random.default_rng(0)
    batch = min(_BATCH, len(samples))

    def read(number: int) -> None:
        indices = order.integers(0, len(samples), batch)
        samples.read(indices, mix(0, number, indices))

    read(0)
    began, count = clock(), 0
    while count == 0 or clock() - began < _BUDGET_S:
        count += 1
        read(count)
    return float(f"{batch * count / max(clock() - began, 1e-9):.4g}")
