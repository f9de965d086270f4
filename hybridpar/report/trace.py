"""The timeline as a trace that Perfetto (https://ui.perfetto.dev) and chrome://tracing open.

Format: trace events (Google, "Trace Event Format", 2016): a JSON object whose ``traceEvents`` are complete events
("X", microseconds), metadata ("M") that names processes and threads, flows ("s", "f") from sender to receiver, and
counters ("C").
A process is a node, or a node in one of several timelines. A rank has a thread for its computations and one for
its communications, or several where communications of a rank overlap, as the events of a thread must not.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hybridpar.cluster.topology import Cluster
from hybridpar.planning.compression import WORKS
from hybridpar.planning.program import Action, Operation, Program
from hybridpar.planning.timeline import Flight, Span, Timeline
from hybridpar.report.counters import Counter
from hybridpar.report.palette import stage_name

Event = dict[str, Any]

PROCESSES = 100_000
"""Process numbers per timeline: more than any cluster has nodes."""
THREADS = 100
"""Thread numbers per rank: its computations have the first, its communications the following ones."""


def trace(program: Program, timeline: Timeline, cluster: Cluster) -> Event:
    """Return the last step, from its first computation on, as a trace; of several plan replicas the first."""
    return _trace(program, timeline, cluster, _events(program, timeline, cluster))


def traces(
    program: Program,
    timelines: Mapping[str, Timeline],
    cluster: Cluster,
    counted: Mapping[str, Sequence[Counter]] | None = None,
) -> Event:
    """Return several timelines of a program in one trace, each from its first computation on.

    Processes are called after timeline and node: ``measured node0``. The figures about the trace are the first's.
    ``counted`` are counters of some timelines, by these' names; what they hold before the begin of the first
    computation becomes their value there.
    """
    events: list[Event] = []
    for number, (name, timeline) in enumerate(timelines.items()):
        counts = _counts((counted or {}).get(name, ()), cluster, _begin(timeline))
        for event in [*_events(program, timeline, cluster), *counts]:
            event["pid"] += number * PROCESSES
            if "id" in event:
                event["id"] += number * len(program.operations)
            if event["name"] == "process_name":
                event["args"]["name"] = f"{name} {event['args']['name']}"
            if event["name"] == "process_sort_index":
                event["args"]["sort_index"] += number * PROCESSES
            events.append(event)
    return _trace(program, next(iter(timelines.values())), cluster, events)


def _events(program: Program, timeline: Timeline, cluster: Cluster) -> list[Event]:
    begin = _begin(timeline)
    events = _names(program, cluster)
    events += [_computation(program, cluster, span, begin) for span in timeline.spans]
    flights = sorted(timeline.flights, key=lambda f: (f.start_s, f.operation))
    threads = _threads(program, flights)
    for flight, numbers in zip(flights, threads, strict=True):
        events += _communication(program, cluster, flight, numbers, begin)
    events += _communication_names(program, cluster, threads, flights)
    return events


def _begin(timeline: Timeline) -> float:
    return min((s.start_s for s in timeline.spans), default=0.0)


def _counts(counters: Iterable[Counter], cluster: Cluster, begin: float) -> list[Event]:
    """Return counters as events ("C"); each holds until the next of its name."""
    return [
        {
            "ph": "C",
            "name": counter.name,
            "pid": cluster.node_of[counter.rank],
            "ts": max(round((at_s - begin) * 1e6, 6), 0.0),
            "args": {"value": value},
        }
        for counter in counters
        for at_s, value in counter.points
    ]


def _trace(program: Program, timeline: Timeline, cluster: Cluster, events: list[Event]) -> Event:
    plan = program.plan
    about = {
        "model": plan.model,
        "cluster": cluster.name,
        "global_batch": plan.global_batch,
        "step_s": timeline.period_s,
        "plan_replicas": plan.world // len(program.actions),
    }
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": about}


def trace_json(program: Program, timeline: Timeline, cluster: Cluster) -> str:
    """Return the trace as JSON text."""
    return as_json(trace(program, timeline, cluster))


def as_json(events: Event) -> str:
    """Return a trace as JSON text."""
    return json.dumps(events, separators=(",", ":")) + "\n"


def _names(program: Program, cluster: Cluster) -> list[Event]:
    events: list[Event] = []
    ranks = range(len(program.actions))
    for node in sorted({cluster.node_of[r] for r in ranks}):
        events += _named("process", f"node{node}", node, node, 0)
    for rank in ranks:
        events += _named("thread", f"rank {rank}", rank * THREADS, cluster.node_of[rank], rank * THREADS)
    return events


def _communication_names(
    program: Program, cluster: Cluster, threads: Sequence[Sequence[int]], flights: Sequence[Flight]
) -> list[Event]:
    used = {
        (rank, number)
        for flight, numbers in zip(flights, threads, strict=True)
        for rank, number in zip(program.operations[flight.operation].ranks, numbers, strict=True)
    }
    events: list[Event] = []
    for rank, number in sorted(used):
        more = f" {number}" if number > 1 else ""
        name = f"rank {rank} communication{more}"
        events += _named("thread", name, rank * THREADS + number, cluster.node_of[rank], rank * THREADS + number)
    return events


def _named(what: str, name: str, order: int, pid: int, tid: int) -> list[Event]:
    where: Event = {"ph": "M", "pid": pid, "tid": tid}
    return [
        {**where, "name": f"{what}_name", "args": {"name": name}},
        {**where, "name": f"{what}_sort_index", "args": {"sort_index": order}},
    ]


def _computation(program: Program, cluster: Cluster, span: Span, begin: float) -> Event:
    action = span.action
    args: Event = {}
    if action.kind == "update":
        args["stage"] = stage_name(program.positions[action.block or 0])
    elif action.kind in WORKS and action.block is not None:
        args["stage"] = stage_name(program.positions[program.blocks[action.block].position])
    elif action.kind in {"forward", "backward", "score", "loss"} and action.block is not None:
        args["stage"] = stage_name(program.positions[program.blocks[action.block].position])
        first, last = program.interval(action.block, action.micro_batch or 0, span.rank)
        args["samples"] = last - first
    if action.micro_batch is not None:
        args["micro_batch"] = action.micro_batch
    return {
        "ph": "X",
        "name": program.describe(action),
        "cat": action.kind,
        "pid": cluster.node_of[span.rank],
        "tid": span.rank * THREADS,
        **_times(span.start_s - begin, span.end_s - begin),
        "args": args,
    }


def _threads(program: Program, flights: Iterable[Flight]) -> list[tuple[int, ...]]:
    """Return, per flight and participant, the communication thread, from 1: the least that is free by then."""
    free: dict[int, list[int]] = {}
    busy: dict[int, list[tuple[float, int]]] = {}
    result = []
    for flight in flights:
        numbers = []
        for rank in program.operations[flight.operation].ranks:
            idle, working = free.setdefault(rank, []), busy.setdefault(rank, [])
            while working and working[0][0] <= flight.start_s:
                heapq.heappush(idle, heapq.heappop(working)[1])
            number = heapq.heappop(idle) if idle else len(working) + 1
            heapq.heappush(working, (flight.end_s, number))
            numbers.append(number)
        result.append(tuple(numbers))
    return result


def _communication(
    program: Program, cluster: Cluster, flight: Flight, numbers: Sequence[int], begin: float
) -> list[Event]:
    """Return an event on every participant, and for a send a flow from the sender's to the receiver's."""
    operation = program.operations[flight.operation]
    name = program.describe(Action("start", operation=operation.index)).removeprefix("start ")
    times = _times(flight.start_s - begin, flight.end_s - begin)
    events: list[Event] = []
    for rank, number in zip(operation.ranks, numbers, strict=True):
        where = {"pid": cluster.node_of[rank], "tid": rank * THREADS + number}
        common = {**where, "name": name, "cat": operation.content}
        events.append({**common, "ph": "X", **times, "args": _arguments(program, operation)})
        if operation.kind == "send":
            sending = rank == operation.ranks[0]
            flow = {"ph": "s"} if sending else {"ph": "f", "bp": "e"}
            at = times["ts"] + (0.0 if sending else times["dur"] / 2)
            events.append({**common, **flow, "id": operation.index, "ts": at})
    return events


def _arguments(program: Program, operation: Operation) -> Event:
    args: Event = {"operation": operation.kind, "bytes": operation.bytes, "ranks": list(operation.ranks)}
    if operation.content == "zero":
        args["stage"] = stage_name(program.positions[operation.block or 0])
    elif operation.block is not None:
        args["stage"] = stage_name(program.positions[program.blocks[operation.block].position])
    if operation.micro_batch is not None:
        args["micro_batch"] = operation.micro_batch
    return args


def _times(start_s: float, end_s: float) -> dict[str, float]:
    """Return start and duration in microseconds, such that an event ends no later than the next one starts."""
    start = round(start_s * 1e6, 6)
    return {"ts": start, "dur": max(round(round(end_s * 1e6, 6) - start, 6), 0.0)}
