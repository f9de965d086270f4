"""Reads a trace of torch's profiler (Kineto): which kernels ran when, for which stage, at which occupancy.

Actions are told by annotations, ranges on the CPU that carry their names. On a GPU a kernel belongs to the action
in which it was launched, on whatever thread, as a rank runs one action at a time; Kineto ties the two together by
a correlation number and gives ``est. achieved occupancy %``, which follows from the launch and not from a
measurement. On a CPU operators stand for kernels, and waits for communication.
"""

from __future__ import annotations

import bisect
import gzip
import itertools
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from hybridpar.errors import RecordError
from hybridpar.planning.program import Action, Program
from hybridpar.report.kernels import FOLDER, Kernel, RankKernels, swept
from hybridpar.report.palette import stage_name
from hybridpar.report.parts import stage_of
from hybridpar.schema import from_data, to_data

PREFIX = "hybridpar"
OCCUPANCY = "est. achieved occupancy %"
_WHOLE, _STEP = "whole step", "step"
_LAUNCHES = {"cuda_runtime", "cuda_driver", "hip_runtime"}
_COMMUNICATION = ("nccl", "rccl")
Event = Mapping[str, Any]


def name_of(program: Program, rank: int, action: Action) -> str:
    """Return what an action is called in a trace: ``hybridpar/front/micro-batch 3/forward``."""
    position, micro_batch = stage_of(program, rank, action), action.micro_batch
    phase: str = action.kind
    if action.operation is not None:
        operation = program.operations[action.operation]
        micro_batch, phase = operation.micro_batch, f"{phase} {operation.kind} of {operation.content}"
    stage = _WHOLE if position is None else stage_name(program.positions[position])
    part = () if micro_batch is None else (f"micro-batch {micro_batch}",)
    return "/".join((PREFIX, stage, *part, phase))


def step_name(step: int) -> str:
    """Return what a step is called in a trace: ``hybridpar/step/20``."""
    return f"{PREFIX}/{_STEP}/{step}"


class Range(NamedTuple):
    """What ran for a stage, as an action does, in microseconds of the trace."""

    start_us: float
    end_us: float
    stage: str | None
    phase: str


@dataclass(frozen=True)
class Request:
    """A trace that is to be summed up: written by the profiler of a rank."""

    raw: str
    """Path of the trace, as JSON."""
    run: str
    """The run's folder."""
    rank: int
    plan: str
    """Fingerprint of the plan."""


def digest(request: Request) -> RankKernels:
    """Sum up a trace, write the record, and keep the trace compressed, as ``trace/rank3.trace.json.gz``.

    Raises RecordError for a trace that holds no step.
    """
    raw, run = Path(request.raw), Path(request.run)
    record = summed_up(json.loads(raw.read_text(encoding="utf-8")), request.rank, request.plan)
    record.save(run)
    kept = run / FOLDER / f"rank{request.rank}.trace.json.gz"
    part = kept.with_suffix(".part")
    with raw.open("rb") as whole, gzip.open(part, "wb", compresslevel=6) as file:
        shutil.copyfileobj(whole, file)
    part.replace(kept)
    raw.unlink()
    return record


def summed_up(trace: Event, rank: int, plan: str) -> RankKernels:
    """Return what a trace amounts to. Raises RecordError for one that holds no step."""
    events = [e for e in trace.get("traceEvents", ()) if e.get("ph") == "X"]
    steps = sorted(_steps(events))
    if not steps:
        raise RecordError(f"the trace of rank {rank} holds no step of hybridpar; nothing ran while it was made")
    counted = steps[1:] or steps
    ranges = sorted(_ranges(events), key=lambda r: (r.start_us, -r.end_us))
    on_gpu = any(e.get("cat") == "kernel" for e in events)
    kernels = gpu_kernels(events, ranges) if on_gpu else _cpu_kernels(events, ranges)
    device, stages = swept(kernels, counted[0][0] / 1e6, counted[-1][1] / 1e6)
    source = "kineto" if on_gpu else "cpu"
    return RankKernels(rank, plan, source, tuple(step for _, _, step in counted), device, stages)


def _steps(events: Iterable[Event]) -> Iterator[tuple[float, float, int]]:
    """Yield start, end and number of every step."""
    for event, parts in _annotations(events):
        if parts[1] == _STEP:
            yield event["ts"], event["ts"] + event["dur"], int(parts[2])


def _ranges(events: Iterable[Event]) -> Iterator[Range]:
    for event, parts in _annotations(events):
        if parts[1] != _STEP:
            stage = None if parts[1] == _WHOLE else parts[1]
            yield Range(event["ts"], event["ts"] + event["dur"], stage, parts[-1])


def _annotations(events: Iterable[Event]) -> Iterator[tuple[Event, Sequence[str]]]:
    for event in events:
        if event.get("cat") == "user_annotation" and event["name"].startswith(f"{PREFIX}/"):
            yield event, event["name"].split("/")


def gpu_kernels(events: Sequence[Event], ranges: Sequence[Range]) -> Iterator[Kernel]:
    """Yield the kernels of a trace's events; each is of the range in which it was launched, of those in order."""
    launches = {
        e["args"]["correlation"]: e["ts"]
        for e in events
        if e.get("cat") in _LAUNCHES and "correlation" in e.get("args", {})
    }
    within = _Within(ranges)
    for event in events:
        if event.get("cat") != "kernel":
            continue
        args = event.get("args", {})
        launched_us = launches.get(args.get("correlation"))
        action = None if launched_us is None else within.at(launched_us)
        percent = args.get(OCCUPANCY)
        yield Kernel(
            event["ts"] / 1e6,
            (event["ts"] + event["dur"]) / 1e6,
            None if action is None else action.stage,
            None if percent is None else min(float(percent) / 100.0, 1.0),
            any(word in event["name"].lower() for word in _COMMUNICATION),
        )


def _cpu_kernels(events: Iterable[Event], ranges: Sequence[Range]) -> Iterator[Kernel]:
    within = _Within(ranges)
    for event in events:
        action = within.at(event["ts"]) if event.get("cat") == "cpu_op" else None
        if action is not None and action.phase.split()[0] not in {"start", "wait"}:
            yield Kernel(event["ts"] / 1e6, (event["ts"] + event["dur"]) / 1e6, action.stage)
    for action in ranges:
        if action.phase.startswith("wait "):
            yield Kernel(action.start_us / 1e6, action.end_us / 1e6, action.stage, communication=True)


class _Within:
    """Finds the action at a time; what batch norms tell other ranks lies within another action."""

    def __init__(self, ranges: Sequence[Range]) -> None:
        self._ranges = ranges
        self._starts = [r.start_us for r in ranges]
        self._reached = list(itertools.accumulate((r.end_us for r in ranges), max))

    def at(self, time_us: float) -> Range | None:
        """Return the innermost action: of those that have begun, the last that has not ended."""
        number = bisect.bisect_right(self._starts, time_us) - 1
        while number >= 0 and time_us <= self._reached[number]:
            if time_us <= self._ranges[number].end_us:
                return self._ranges[number]
            number -= 1
        return None


def command(request: Request) -> list[str]:
    """Return the command line that sums up a trace in a process of its own."""
    return [sys.executable, "-m", "hybridpar.report.kineto", json.dumps(to_data(request))]


def main() -> None:
    """Sum up a trace, giving way to the training."""
    os.nice(10)
    digest(from_data(Request, json.loads(sys.argv[1]), "request", RecordError))


if __name__ == "__main__":
    main()
