"""Watching passes: what the device does while layers run, at every micro-batch size that was timed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Protocol

from hybridpar.profiling.bench import Bench, Mark
from hybridpar.profiling.record import LayerProfile
from hybridpar.profiling.rounds import Entry
from hybridpar.profiling.strands import Call, Clock, Strand, calls, make_input, timed_pass
from hybridpar.profiling.study import DeviceUse, Figures, LayerUse, Study

Spans = list[tuple[Mark, Mark]]
"""As :func:`timed_pass` gives them: forward and backward of each layer in turn."""
Pass = Callable[[Clock], Spans]
"""Runs one pass with the marks of a clock."""

WATCHED_S, MOST_PASSES = 0.2, 50
"""So long passes of a size are watched, and so many at most; one at least."""
SHARE = 0.3
"""Of a profile's budget, what watching gets."""
_COST = 4.0
"""What a watched pass may take beside a timed one: profilers slow the host down."""
_LEAST_S = 1e-5
"""Time on the wall below which a layer's share of it is noise."""


@dataclass(frozen=True)
class Seen:
    """What was seen of one layer, in seconds per pass."""

    busy_s: float
    """The device worked for it."""
    wall_s: float | None = None
    """It took meanwhile; None: as long as it was timed to take."""
    occupancy: float | None = None
    below_half: float | None = None

    def utilisation(self, timed_s: float) -> float | None:
        """Return the busy share of its time; None where that is too short."""
        wall_s = timed_s if self.wall_s is None else self.wall_s
        return min(self.busy_s / wall_s, 1.0) if wall_s >= _LEAST_S else None


class Watch(Protocol):
    """Looks on while passes run."""

    sources: dict[str, str]
    """As in a Study."""

    @property
    def gaps(self) -> tuple[str, ...]:
        """What stays unknown and why, one sentence each."""
        ...

    def layers(self, run: Pass, count: int, passes: int) -> list[Seen]:
        """Run some passes through so many layers, and return what was seen of each."""
        ...

    def device(self, run: Callable[[], object]) -> dict[str, float | None]:
        """Run passes again and again, and return the device's counters by the fields of DeviceUse."""
        ...


class CpuWatch:
    """On a CPU: its thread's time over time on the wall. There is no occupancy, and there are no counters."""

    def __init__(self) -> None:
        self.sources = {"utilisation": "cpu time"}

    @property
    def gaps(self) -> tuple[str, ...]:
        """That there is no occupancy."""
        return ("occupancy is unknown: a CPU has none; utilisation is CPU time over time on the wall",)

    def layers(self, run: Pass, count: int, passes: int) -> list[Seen]:
        """Run passes with both clocks."""
        busy_s, wall_s = [0.0] * count, [0.0] * count
        for _ in range(passes):
            clock = _TwoClocks()
            for number, (begin, end) in enumerate(run(clock)):
                cpu_s, passed_s = clock.between(begin, end)
                busy_s[number // 2] += cpu_s / passes
                wall_s[number // 2] += passed_s / passes
        return [Seen(busy, wall) for busy, wall in zip(busy_s, wall_s, strict=True)]

    def device(self, run: Callable[[], object]) -> dict[str, float | None]:
        """Return nothing."""
        del run
        return {}


class _TwoClocks:
    """Marks are numbers of moments that both clocks know."""

    def __init__(self) -> None:
        self._moments: list[tuple[float, float]] = []

    def mark(self) -> Mark:
        self._moments.append((time.thread_time(), time.perf_counter()))
        return float(len(self._moments) - 1)

    def between(self, begin: Mark, end: Mark) -> tuple[float, float]:
        """Return CPU seconds and seconds between two marks; a hook may be reached before the one it follows."""
        first, second = (self._moments[number_of(mark)] for mark in (begin, end))
        return max(0.0, second[0] - first[0]), max(0.0, second[1] - first[1])


def number_of(mark: Mark) -> int:
    """Return the number of a mark of a clock that only numbers them."""
    assert isinstance(mark, float)
    return int(mark)


@dataclass
class Watched:
    """What was seen, by size in the order of their timing; sizes at the end may be missing."""

    layers: dict[Strand, list[list[Seen]]] = field(default_factory=dict)
    device: list[dict[str, float | None]] = field(default_factory=list)
    """Of the whole chain."""


def watch_strand(
    bench: Bench, watch: Watch, strand: Strand, entries: Sequence[Entry], end_s: float, watched: Watched
) -> None:
    """Watch a strand at all sizes that it was timed at, until about ``end_s`` on the clock; the first always.

    All ranks of the bench watch the same sizes.
    """
    for number, entry in enumerate(entry for entry in entries if strand in entry.strands):
        modules = dict(entry.made)[strand]
        pass_s = entry.pass_s([strand])
        passes = min(MOST_PASSES, max(1, math.ceil(WATCHED_S / max(pass_s, 1e-6))))
        needed_s = (passes + 1) * pass_s * _COST * bench.stretch
        if any(bench.meet(number > 0 and time.perf_counter() + needed_s > end_s)):
            bench.note(
                f"utilisation and occupancy are unknown from micro-batch {entry.size} on: the time was over; "
                "raise profile.budget_s, or name fewer batches"
            )
            return
        layers = calls(bench, strand, modules, entry.size)

        def run(clock: Clock, layers: Sequence[Call] = layers, size: int = entry.size) -> Spans:
            return timed_pass(clock, layers, make_input(bench, strand, size))

        run(bench)
        bench.wait()
        watched.layers.setdefault(strand, []).append(watch.layers(run, len(layers), passes))
        if len(layers) > 1:
            watched.device.append(watch.device(lambda: run(bench)))
        bench.progress(f"watched micro-batch {entry.size}: {passes} passes")


def study_of(
    watch: Watch,
    watched: Watched,
    places: Sequence[tuple[Strand, int]],
    layers: Sequence[LayerProfile],
    count: int,
) -> Study:
    """Put the study of ``count`` sizes together; ``places`` has every layer's strand, and its number in it."""
    uses = tuple(
        _layer_use(watched.layers.get(strand, []), number, layer, count)
        for (strand, number), layer in zip(places, layers, strict=True)
    )
    counted = watched.device[:count] + [{}] * (count - len(watched.device))
    device = DeviceUse(**{f.name: tuple(own.get(f.name) for own in counted) for f in fields(DeviceUse)})
    return Study(uses, device, dict(watch.sources))


def _layer_use(by_size: Sequence[Sequence[Seen]], number: int, layer: LayerProfile, count: int) -> LayerUse:
    timed_s = [
        forward + backward for forward, backward in zip(layer.forward_s[0], layer.backward_s[0], strict=True)
    ]
    seen = [own[number] for own in by_size[:count]]
    unknown: Figures = (None,) * (count - len(seen))
    return LayerUse(
        tuple(s.utilisation(t) for s, t in zip(seen, timed_s, strict=False)) + unknown,
        tuple(s.occupancy for s in seen) + unknown,
        tuple(s.below_half for s in seen) + unknown,
    )
