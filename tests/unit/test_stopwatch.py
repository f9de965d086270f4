"""Stopwatches: what they make of events of a device, without a device."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from hybridpar.planning.program import Action, Operation
from hybridpar.runtime.stopwatch import CudaStopwatch

PROGRAM: Any = None
REDUCE = Operation(4, "all_reduce", "bucket", "gradients:front", (0, 1), 8, block=0)


class Event:
    """An event of a stream that is done with what came before it at the next of some times, in seconds."""

    def __init__(self, times: itertools.chain[float]) -> None:
        self.times, self.at, self.waited = times, 0.0, False

    def record(self) -> None:
        self.at = next(self.times)

    def synchronize(self) -> None:
        self.waited = True

    def elapsed_time(self, other: Event) -> float:
        """In milliseconds, as torch's."""
        assert other.waited
        return (other.at - self.at) * 1e3


def test_actions_follow_each_other_on_the_stream() -> None:
    times = itertools.chain([5.0, 5.25, 6.0, 5.75, 7.5])
    watch = CudaStopwatch(lambda: Event(times))
    watch.note(PROGRAM, Action("forward", 0, 1), 0.0, 0.0)
    watch.note(PROGRAM, Action("start", operation=4), 0.0, 0.0)
    watch.complete(REDUCE)
    watch.note(PROGRAM, Action("wait", operation=4), 0.0, 0.0)
    actions, completions = watch.read()
    assert actions == (
        ("forward", 0, 1, None, 0.0, 0.25),
        ("start", None, None, 4, 0.25, 1.0),
        ("wait", None, None, 4, 1.0, 2.5),
    )
    assert completions == ((4, 0.75),)


@pytest.mark.gpu
def test_a_devices_time_is_that_of_its_kernels() -> None:
    """The host is through long before a large product is."""
    torch.cuda.synchronize()
    x = torch.randn(4096, 4096, device="cuda")
    for _ in range(3):
        watch = CudaStopwatch()
        for micro_batch in range(3):
            for _ in range(8):
                x = x @ x / 64
            watch.note(PROGRAM, Action("forward", 0, micro_batch), 0.0, 0.0)
        actions, _ = watch.read()
    assert all(end_s > start_s for *_, start_s, end_s in actions)
    assert [a[5] for a in actions[:-1]] == [a[4] for a in actions[1:]]
