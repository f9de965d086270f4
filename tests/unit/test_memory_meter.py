"""The measured memory of a job on the CPU."""

from __future__ import annotations

import sys

import pytest
import torch

from hybridpar.host import give_back_freed_memory, keep_freed_memory
from hybridpar.runtime.memory import MemoryMeter

MIB = 2**20


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the heap that keeps what is freed is glibc's")
def test_what_an_earlier_work_has_freed_counts_again_when_it_is_used() -> None:
    """A rank that had profiled in the same process once reported 2 MiB where the others had 50."""
    keep_freed_memory()
    try:
        earlier = [torch.ones(MIB // 4) for _ in range(64)]
        del earlier
        meter = MemoryMeter(torch.device("cpu"))
        job = [torch.ones(MIB // 4) for _ in range(48)]
        assert 44 * MIB <= meter.peak_bytes() <= 60 * MIB
        del job
        assert meter.peak_bytes() >= 44 * MIB, "a peak stays"
    finally:
        give_back_freed_memory()
