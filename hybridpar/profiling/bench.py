"""Where and how layers are timed: the device's clock, its free memory, and who else measures at the same time."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from hybridpar.cluster.describe import core_quota, usable_memory_bytes

MEMORY_SHARE = 0.8
"""Of the free memory, what the layers under measurement may fill."""
QUOTA_USED = 0.95
"""Of a quota, the share that is used at least where nothing else runs."""
SETTLED_S = 5.0
"""Seconds of measurement after which the share of a core is known."""
_REPEATS = 20

Mark = float | torch.cuda.Event
Report = Callable[[str], None]
Meeting = Callable[[Any], list[Any]]
"""Gives every rank's JSON value, in rank order, to all of them once the last one has come."""


def alone(value: Any) -> list[Any]:
    """Meet nobody."""
    return [value]


def silent(_: str) -> None:
    """Tell nobody."""


@dataclass
class Bench:
    """Times on one device.

    On a GPU between events on its stream, which can be compared after a wait: what the host does while the GPU is
    busy costs nothing, as in training. On a CPU by the thread's CPU time (``clock_gettime(2)``,
    CLOCK_THREAD_CPUTIME_ID; autograd runs a CPU's backward on the calling thread) over the share of a core that
    the rank gets. Under a quota of 4.5 ms in every 10, the clock on the wall sees a layer of 1 ms take 1 ms or
    6.5, and no median of that is right; CPU time lacks the pauses, and the share puts them back as a long run has
    them. Nor does it count the time in which other processes have the core; how ranks share cores is the
    simulation's matter.
    """

    device: torch.device
    dtype: torch.dtype
    report: Report = silent
    progress: Report = silent
    meet: Meeting = alone
    sharing: int = 1
    """Ranks that measure on this machine's memory."""
    quota: float = 1.0
    """Share of a core that this rank may use."""
    notes: list[str] = field(default_factory=list)
    autocast: torch.dtype | None = None
    """In which layers compute under autocast."""
    channels_last: bool = False
    """Weights lie in memory so, and so does what they make."""
    busy_s: float = 0.0
    """CPU or GPU seconds of all visits."""
    passed_s: float = 0.0
    """Seconds on the wall of all visits."""

    @property
    def on_gpu(self) -> bool:
        """Whether the device is one."""
        return self.device.type == "cuda"

    def mark(self) -> Mark:
        """Return now, on the device's clock."""
        if not self.on_gpu:
            return time.thread_time()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def wait(self) -> None:
        """Wait for the device."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def seconds(self, begin: Mark, end: Mark) -> float:
        """Return the time between two marks; after a wait."""
        if isinstance(begin, torch.cuda.Event):
            return float(begin.elapsed_time(end)) / 1e3  # type: ignore[arg-type]
        return max(0.0, end - begin) / self.share  # type: ignore[operator]

    @property
    def share(self) -> float:
        """Share of a core that the rank gets in a long run.

        A little of a quota is never used: the system hands it out in slices, and a thread that moves to another
        core leaves the rest of its slice behind. What is missing beyond that other processes took.
        """
        if self.quota == 1.0 or self.passed_s < SETTLED_S:
            return self.quota
        return min(self.quota, max(QUOTA_USED * self.quota, self.busy_s / self.passed_s))

    def memory_bytes(self) -> float:
        """Return what the measurement may fill of the memory that is free now."""
        free = torch.cuda.mem_get_info(self.device)[0] if self.on_gpu else usable_memory_bytes() / self.sharing
        return MEMORY_SHARE * free

    def median_s(self, run: Callable[[], object]) -> float:
        """Return the median time of a function, after one call to warm up."""
        marks = []
        for _ in range(1 + _REPEATS):
            run()
            marks.append(self.mark())
        self.wait()
        return statistics.median(itertools.starmap(self.seconds, itertools.pairwise(marks)))

    def note(self, text: str) -> None:
        """Tell the user, and keep it for the record."""
        self.notes.append(text)
        self.report(text)

    @contextmanager
    def visiting(self) -> Iterator[None]:
        """Count the time within on both clocks."""
        begin, began_s = self.mark(), time.perf_counter()
        yield
        end = self.mark()
        self.wait()
        self.busy_s += self.seconds(begin, end) * self.share
        self.passed_s += time.perf_counter() - began_s

    @property
    def stretch(self) -> float:
        """Seconds on the wall per measured second so far; 1 while nothing was measured."""
        return max(1.0, self.passed_s / self.busy_s * self.share) if self.busy_s else 1.0


def own_quota(device: torch.device) -> float:
    """Share of a core that one thread of this process may use, at most 1; 1 on a GPU."""
    return 1.0 if device.type == "cuda" else min(1.0, core_quota())


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Run on one CPU thread, as a rank on a CPU does, and leave thread count and random state as they were."""
    on_gpu, before = device.type == "cuda", torch.get_num_threads()
    try:
        torch.set_num_threads(before if on_gpu else 1)
        current = torch.cuda.device(device) if on_gpu else nullcontext()
        with current, torch.random.fork_rng(devices=[device] if on_gpu else []):
            yield
    finally:
        torch.set_num_threads(before)
