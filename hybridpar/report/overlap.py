"""What of a step's communication and updates lay under computation: facts from the order of what happened."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from hybridpar.planning.compression import SUMS
from hybridpar.planning.program import Operation
from hybridpar.report.course import Course, Timed


@dataclass(frozen=True)
class Hidden:
    """How much of some communication lay under computation of a rank that takes part in it."""

    count: int
    overlapped: int
    """Of the count, those of which any part did."""
    seconds: float
    """In flight, summed over operations and the ranks that were looked at."""
    hidden_s: float

    @property
    def share(self) -> float | None:
        """Of the time in flight; None where nothing was."""
        return self.hidden_s / self.seconds if self.seconds else None


@dataclass(frozen=True)
class Overlap:
    """The facts of one step."""

    buckets: Hidden
    """Reductions of gradients, on each of their ranks, under backwards of that rank."""
    exchanges: Hidden
    """Messages between stages, on the sender, under its computations of other micro-batches, and on the receiver
    under its computations."""
    updates: int
    early_updates: int
    """Those that began before the last backward of the step ended, on whatever rank."""
    receives: int
    early_receives: int
    """Those that were posted before the sender began to send."""
    lead_s: float | None
    """Median time from posting a receive to the begin of the send."""


def overlap(course: Course) -> Overlap:
    """Return what a step's course shows."""
    last_s = max((t.end_s for _, t in course.of("backward")), default=0.0)
    updates = [t for _, t in course.of("update")]
    leads = _leads(course)
    return Overlap(
        _buckets(course),
        _exchanges(course),
        len(updates),
        sum(t.start_s < last_s for t in updates),
        len(leads),
        sum(lead > 0 for lead in leads),
        median(leads) if leads else None,
    )


def _buckets(course: Course) -> Hidden:
    """A bucket is in flight on a rank from its start there, as what waits for the others is hidden too."""
    found = []
    ends = {f.operation: f.end_s for f in course.flights}
    backwards = [_joined(t for t in actions if t.action.kind == "backward") for actions in course.ranks]
    for rank, timed in course.of("start"):
        operation = _operation(course, timed)
        if operation.content in SUMS and operation.index in ends:
            end_s = max(ends[operation.index], timed.end_s)
            found.append((end_s - timed.end_s, covered(timed.end_s, end_s, backwards[rank])))
    return _sum(found)


def _exchanges(course: Course) -> Hidden:
    operations = course.program.operations
    computed = [course.computations(rank) for rank in range(len(course.ranks))]
    found = []
    for flight in course.flights:
        operation = operations[flight.operation]
        if operation.kind != "send" or operation.transfer is None:
            continue
        source, target = operation.ranks
        own = operation.transfer.source_micro_batch
        others = _joined(t for t in computed[source] if t.action.micro_batch != own)
        under = joined([*others, *_joined(computed[target])])
        found.append((flight.end_s - flight.start_s, covered(flight.start_s, flight.end_s, under)))
    return _sum(found)


def _leads(course: Course) -> list[float]:
    """Return, for every message, the time from the receiver's start to the sender's."""
    starts: dict[int, dict[int, float]] = defaultdict(dict)
    for rank, timed in course.of("start"):
        if _operation(course, timed).kind == "send":
            starts[_operation(course, timed).index][rank] = timed.start_s
    operations = course.program.operations
    return [
        at[operations[i].ranks[0]] - at[operations[i].ranks[1]] for i, at in sorted(starts.items()) if len(at) == 2
    ]


def _operation(course: Course, timed: Timed) -> Operation:
    assert timed.action.operation is not None
    return course.program.operations[timed.action.operation]


def _sum(found: Sequence[tuple[float, float]]) -> Hidden:
    return Hidden(len(found), sum(h > 0 for _, h in found), sum(s for s, _ in found), sum(h for _, h in found))


def covered(start_s: float, end_s: float, intervals: Iterable[tuple[float, float]]) -> float:
    """Return how much of a time some intervals, which do not overlap, cover."""
    return sum(max(0.0, min(end_s, stop) - max(start_s, begin)) for begin, stop in intervals)


def _joined(timed: Iterable[Timed]) -> list[tuple[float, float]]:
    return joined((t.start_s, t.end_s) for t in timed)


def joined(intervals: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return intervals that do not overlap and cover the same times, in order."""
    result: list[tuple[float, float]] = []
    for begin, stop in sorted(intervals):
        if result and begin <= result[-1][1]:
            result[-1] = (result[-1][0], max(result[-1][1], stop))
        else:
            result.append((begin, stop))
    return result
