"""What a device did in a traced window, kernel by kernel, summed by a sweep over time; and the record of it.

Kernels run side by side, so that sums over kernels would count time twice: the sweep goes from one moment at which
a kernel begins or ends to the next, and counts each time between two once. Of several live kernels the occupancies
add up, to 100 % at most. Communication kernels hold few multiprocessors for long, and are told apart.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from hybridpar.errors import RecordError
from hybridpar.schema import read_json, to_data

SCHEMA_VERSION = 1
FOLDER = "trace"
"""In the run's."""
HALF = 0.5
BINS = 10
"""Of the distribution of occupancy, over 0..1."""


class Kernel(NamedTuple):
    """A time in which a device ran something."""

    start_s: float
    end_s: float
    stage: str | None
    """For which it did; None: for no stage by itself, or nobody knows."""
    occupancy: float | None = None
    """Of the whole device, in 0..1; None: unknown."""
    communication: bool = False


@dataclass(frozen=True)
class KernelUse:
    """Seconds of one device, or of several together."""

    window_s: float = 0.0
    """Looked at."""
    kernels: int = 0
    """Of computations."""
    busy_s: float = 0.0
    """At least one of them ran."""
    known_s: float = 0.0
    """Of ``busy_s``, where the occupancy of all that ran is known."""
    occupied_s: float = 0.0
    """The occupancy, summed over ``known_s``."""
    below_half_s: float = 0.0
    """Of ``known_s``, with an occupancy below one half."""
    histogram_s: tuple[float, ...] = (0.0,) * BINS
    """``known_s`` by occupancy: below 0.1, from 0.1 to below 0.2, ..., from 0.9 on."""
    communication_s: float = 0.0
    """At least one communication ran, waiting for others included."""
    exposed_s: float = 0.0
    """Of ``communication_s``, where the device computed nothing at all."""

    @property
    def busy(self) -> float | None:
        """Busy share of the window."""
        return self.busy_s / self.window_s if self.window_s else None

    @property
    def occupancy(self) -> float | None:
        """Mean occupancy while busy."""
        return self.occupied_s / self.known_s if self.known_s else None

    @property
    def occupancy_over_window(self) -> float | None:
        """Mean occupancy over the window, idle time and communication counted as 0."""
        return None if self.occupancy is None or self.busy is None else self.occupancy * self.busy

    @property
    def below_half(self) -> float | None:
        """Share of the busy time in which occupancy is below 50 %."""
        return self.below_half_s / self.known_s if self.known_s else None


@dataclass(frozen=True)
class RankKernels:
    """What one rank's trace amounts to. Raises RecordError for another schema."""

    rank: int
    """Of all plan replicas."""
    plan: str
    """Fingerprint of the plan."""
    source: str
    """``kineto``: an estimate from the launch of every kernel; ``cpu``: operators on a CPU, without occupancy."""
    steps: tuple[int, ...]
    """That count: of several traced ones the first is left out."""
    device: KernelUse
    """All of the device."""
    stages: dict[str, KernelUse] = field(default_factory=dict)
    schema: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        if self.schema != SCHEMA_VERSION:
            raise RecordError(f"schema {self.schema} is not {SCHEMA_VERSION}; trace again with this version")

    def save(self, run: Path) -> None:
        """Write the record into a run's folder, all of it or nothing."""
        path = path_of(run, self.rank)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(to_data(self), separators=(",", ":")) + "\n")
        part.replace(path)


def path_of(run: Path, rank: int) -> Path:
    """Return where a rank's record lies in a run's folder."""
    return run / FOLDER / f"rank{rank}.json"


def load(run: Path, world: int, plan: str) -> tuple[RankKernels, ...]:
    """Read the records of a run under a plan, of as many ranks as have one.

    Raises RecordError, which names file and field, for a malformed one.
    """
    paths = [path_of(run, rank) for rank in range(world)]
    records = (read_json(RankKernels, path, RecordError) for path in paths if path.exists())
    return tuple(record for record in records if record.plan == plan)


def together(uses: Iterable[KernelUse]) -> KernelUse:
    """Return the sum over several devices."""
    result = KernelUse()
    for use in uses:
        result = KernelUse(
            result.window_s + use.window_s,
            result.kernels + use.kernels,
            result.busy_s + use.busy_s,
            result.known_s + use.known_s,
            result.occupied_s + use.occupied_s,
            result.below_half_s + use.below_half_s,
            tuple(a + b for a, b in zip(result.histogram_s, use.histogram_s, strict=True)),
            result.communication_s + use.communication_s,
            result.exposed_s + use.exposed_s,
        )
    return result


def by_stage(traces: Sequence[RankKernels]) -> dict[str, KernelUse]:
    """Return what all ranks together did for every stage, by its name."""
    names = sorted({name for trace in traces for name in trace.stages})
    return {n: together(trace.stages[n] for trace in traces if n in trace.stages) for n in names}


def swept(kernels: Iterable[Kernel], start_s: float, end_s: float) -> tuple[KernelUse, dict[str, KernelUse]]:
    """Return what a device did between two times: all of it, and by stage.

    A stage counts its own kernels only, so that the busy times of stages that run at once add up to more than the
    device's.
    """
    kept = [k for k in kernels if k.end_s > start_s and k.start_s < end_s and k.end_s > k.start_s]
    device, stages = _Live(), defaultdict[str, _Live](_Live)
    for kernel in kept:
        device.count(kernel)
        if kernel.stage is not None:
            stages[kernel.stage].count(kernel)
    at_s = start_s
    for moment_s, kernel, begins in _moments(kept, start_s, end_s):
        if moment_s > at_s:
            computes = device.computing > 0
            for live in (device, *stages.values()):
                live.pass_by(moment_s - at_s, device_computes=computes)
            at_s = moment_s
        device.turn(kernel, begins=begins)
        if kernel.stage is not None:
            stages[kernel.stage].turn(kernel, begins=begins)
    window_s = end_s - start_s
    return device.use(window_s), {name: live.use(window_s) for name, live in sorted(stages.items())}


def _moments(kernels: Sequence[Kernel], start_s: float, end_s: float) -> list[tuple[float, Kernel, bool]]:
    """Return when kernels begin and end, in order and within the window."""
    begins = [(max(k.start_s, start_s), k, True) for k in kernels]
    ends = [(min(k.end_s, end_s), k, False) for k in kernels]
    return sorted([*begins, *ends], key=lambda m: m[0])


class _Live:
    """What runs at the moment, and what has been counted so far."""

    def __init__(self) -> None:
        self.computing = self.communicating = 0
        self._unknown, self._occupancy, self._kernels = 0, 0.0, 0
        self._busy_s = self._known_s = self._occupied_s = self._below_half_s = 0.0
        self._communication_s = self._exposed_s = 0.0
        self._histogram_s = [0.0] * BINS

    def count(self, kernel: Kernel) -> None:
        self._kernels += not kernel.communication

    def turn(self, kernel: Kernel, *, begins: bool) -> None:
        """Take up a kernel that begins, let go one that ends."""
        more = 1 if begins else -1
        if kernel.communication:
            self.communicating += more
            return
        self.computing += more
        if kernel.occupancy is None:
            self._unknown += more
        else:
            self._occupancy = self._occupancy + more * kernel.occupancy if self.computing else 0.0

    def pass_by(self, seconds: float, *, device_computes: bool) -> None:
        """Let time pass."""
        if self.communicating:
            self._communication_s += seconds
            self._exposed_s += 0.0 if device_computes else seconds
        if not self.computing:
            return
        self._busy_s += seconds
        if self._unknown:
            return
        occupancy = min(round(self._occupancy, 9), 1.0)  # sums leave rounding behind
        self._known_s += seconds
        self._occupied_s += occupancy * seconds
        self._below_half_s += seconds if occupancy < HALF else 0.0
        self._histogram_s[min(int(occupancy * BINS + 1e-9), BINS - 1)] += seconds

    def use(self, window_s: float) -> KernelUse:
        return KernelUse(
            window_s,
            self._kernels,
            self._busy_s,
            self._known_s,
            self._occupied_s,
            self._below_half_s,
            tuple(self._histogram_s),
            self._communication_s,
            self._exposed_s,
        )
