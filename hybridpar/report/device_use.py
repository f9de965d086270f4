"""What a stage's devices did while it computed, from the monitor's samples cut by the recorded timeline.

A sample tells what a GPU did on average over a window in which it may have worked for several stages. With the
seconds that every stage computed in every window known from the timeline, the figure of a stage is a coefficient:
``sample = sum over stages of figure * share of the window``, solved by least squares over the windows.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hybridpar.monitor.record import GpuSample, read
from hybridpar.report.comparison import Comparison
from hybridpar.report.course import COMMUNICATING
from hybridpar.report.overlap import covered, joined
from hybridpar.report.parts import stages_of
from hybridpar.report.run import Run
from hybridpar.report.timing import RankTiming, named

Stage = tuple[int, int]
"""Plan replica and position."""
FIGURES = ("occupancy", "tensor_activity", "dram_activity")
OWN_SHARE = 0.2
"""Of what a stage computed in the windows, so much must not follow from what the others computed in them."""
SLACK = 0.05
"""A figure that lies outside of 0..1 by no more than this is noise; by more it is not believed."""


@dataclass(frozen=True)
class DeviceUse:
    """Figures of a stage, in 0..1, over the time in which it computed; None is unknown."""

    occupancy: float | None = None
    """Active warps over the most that fit."""
    tensor_activity: float | None = None
    dram_activity: float | None = None
    """Memory traffic over the most that the memory can do."""
    windows: int = 0
    """Samples that the figures come from, over all its devices."""
    sources: dict[str, str] = field(default_factory=dict)
    """Where each known figure comes from: what sampled it, and what told stages apart: ``gpm, timeline``, or
    ``gpm, whole run`` where the device works for one stage only and no sample lies in the recorded steps."""


UNKNOWN = DeviceUse()


class Schedule(NamedTuple):
    """When a GPU worked for which stage, in seconds since the epoch."""

    recorded: tuple[tuple[float, float], ...]
    """The recorded steps."""
    busy: Mapping[Stage, Sequence[tuple[float, float]]]
    """Computations, not overlapping."""


def device_uses(run: Run, comparison: Comparison) -> dict[Stage, DeviceUse]:
    """Return the figures of every stage that has any.

    Raises HybridparError where a file of the monitor is malformed.
    """
    found: dict[Stage, list[DeviceUse]] = defaultdict(list)
    schedules = _schedules(run, comparison)
    for gpu, samples in _samples(run, schedules).items():
        for stage, use in unmixed(samples, schedules[gpu]).items():
            found[stage].append(use)
    return {stage: _together(uses) for stage, uses in found.items()}


def unmixed(samples: Sequence[GpuSample], schedule: Schedule) -> dict[Stage, DeviceUse]:
    """Return the figures of every stage of one GPU, as far as its samples tell them apart."""
    stages = sorted(schedule.busy)
    inside = [s for s in samples if _lies_in(s, schedule.recorded)]
    if not inside and len(stages) == 1:
        return {stages[0]: _of_all(samples)}
    shares = np.array([[_share(s, schedule.busy[stage]) for stage in stages] for s in inside]).reshape(
        -1, len(stages)
    )
    solved = {name: _solve(name, inside, shares) for name in FIGURES}
    result = {}
    for number, stage in enumerate(stages):
        known = {name: own[number] for name, own in solved.items() if own[number] is not None}
        sources = {name: f"{_source(name, inside)}, timeline" for name in known}
        result[stage] = DeviceUse(**known, windows=len(inside) if known else 0, sources=sources)
    return result


def _solve(name: str, samples: Sequence[GpuSample], shares: NDArray[np.float64]) -> list[float | None]:
    """Return a figure's least-squares value for every stage, weighted by the windows' lengths."""
    known = [i for i, s in enumerate(samples) if getattr(s, name) is not None]
    stages = shares.shape[1]
    if len(known) < stages:
        return [None] * stages
    weights = np.sqrt([samples[i].window_s or 0.0 for i in known])
    table = shares[known] * weights[:, None]
    values = np.array([getattr(samples[i], name) for i in known]) * weights
    found = np.linalg.lstsq(table, values, rcond=None)[0]
    return [_believed(float(found[i])) if _stands_out(table, i) else None for i in range(stages)]


def _stands_out(table: NDArray[np.float64], number: int) -> bool:
    """Whether a column is far enough from what the others can make up."""
    own, others = table[:, number], np.delete(table, number, axis=1)
    left = own - others @ np.linalg.lstsq(others, own, rcond=None)[0] if others.size else own
    return bool(np.linalg.norm(own)) and float(np.linalg.norm(left)) >= OWN_SHARE * float(np.linalg.norm(own))


def _believed(value: float) -> float | None:
    return min(max(value, 0.0), 1.0) if -SLACK <= value <= 1 + SLACK else None


def _of_all(samples: Sequence[GpuSample]) -> DeviceUse:
    """Return the figures over the time in which any kernel ran: the device works for one stage only."""
    known, sources = {}, {}
    for name in FIGURES:
        both = [s for s in samples if getattr(s, name) is not None and s.graphics_activity is not None]
        active_s = sum((s.graphics_activity or 0.0) * (s.window_s or 0.0) for s in both)
        if active_s:
            known[name] = min(sum(getattr(s, name) * (s.window_s or 0.0) for s in both) / active_s, 1.0)
            sources[name] = f"{_source(name, both)}, whole run"
    return DeviceUse(**known, windows=len(samples) if known else 0, sources=sources)


def _together(uses: Sequence[DeviceUse]) -> DeviceUse:
    """Return the mean over a stage's devices, of each figure over those that know it."""
    known = {name: [getattr(use, name) for use in uses if getattr(use, name) is not None] for name in FIGURES}
    sources = {name: source for use in reversed(uses) for name, source in use.sources.items()}
    means = {name: sum(own) / len(own) for name, own in known.items() if own}
    return DeviceUse(**means, windows=sum(use.windows for use in uses), sources=sources)


def _source(name: str, samples: Iterable[GpuSample]) -> str:
    return "+".join(sorted({s.sources[name] for s in samples if name in s.sources})) or "unknown"


def _share(sample: GpuSample, busy: Sequence[tuple[float, float]]) -> float:
    window_s = sample.window_s or 0.0
    return covered(sample.time_s - window_s, sample.time_s, busy) / window_s


def _lies_in(sample: GpuSample, recorded: Sequence[tuple[float, float]]) -> bool:
    begin_s = sample.time_s - (sample.window_s or 0.0)
    return any(start <= begin_s and sample.time_s <= end for start, end in recorded)


def _samples(run: Run, schedules: Mapping[tuple[str, str], Schedule]) -> dict[tuple[str, str], list[GpuSample]]:
    """Return the samples of the GPUs that are asked for, with a known window."""
    found: dict[tuple[str, str], list[GpuSample]] = {gpu: [] for gpu in schedules}
    for path in sorted(run.folder.glob("monitor*.jsonl")) if schedules else ():
        for record in read(path):
            if isinstance(record, GpuSample) and record.uuid is not None and record.window_s:
                found.get((record.host, record.uuid), []).append(record)
    return found


def _schedules(run: Run, comparison: Comparison) -> dict[tuple[str, str], Schedule]:
    """Return what every GPU did, by host and UUID; ranks may share one."""
    recorded: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    busy: dict[tuple[str, str], dict[Stage, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for record in run.timings:
        if record.host is None or record.gpu is None or record.epoch_s is None:
            continue
        gpu = record.host, record.gpu
        recorded[gpu] += _recorded(record)
        for stage, start_s, end_s in _computations(record, comparison):
            busy[gpu][stage].append((start_s, end_s))
    return {
        gpu: Schedule(tuple(joined(times)), {stage: joined(own) for stage, own in busy[gpu].items()})
        for gpu, times in recorded.items()
    }


def _recorded(record: RankTiming) -> list[tuple[float, float]]:
    """Return the time of the recorded steps, what lies between two of them in a row included."""
    at_s, steps = record.epoch_s or 0.0, record.steps
    ends = [s.start_s + s.length_s for s in steps]
    for i, (one, two) in enumerate(itertools.pairwise(steps)):
        if two.step == one.step + 1:
            ends[i] = two.start_s
    return [(at_s + s.start_s, at_s + end) for s, end in zip(steps, ends, strict=True)]


def _computations(record: RankTiming, comparison: Comparison) -> Iterable[tuple[Stage, float, float]]:
    """Yield what a rank computed in the steps that run as the plan's full step, and when."""
    width = len(comparison.measured[0].ranks)
    replica, place = divmod(record.rank, width)
    program = comparison.measured[replica].program
    names, stages = tuple(named(a) for a in program.actions[place]), stages_of(program, place)
    for step in record.steps:
        at_s = step.start_s + (record.epoch_s or 0.0)
        for action, position in zip(step.actions, stages, strict=True) if step.names == names else ():
            if action[0] not in COMMUNICATING and position is not None:
                yield (replica, position), at_s + action[4], at_s + action[5]
