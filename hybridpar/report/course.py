"""The course of a step: when every action of a program ran, in the simulation or in a training, in one form."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median_low
from typing import NamedTuple

from hybridpar.errors import RecordError
from hybridpar.planning.program import Action, Content, Operation, Program
from hybridpar.planning.timeline import Flight, Span, Timeline
from hybridpar.report.timing import RankTiming, StepTiming, named

COMMUNICATING = {"start", "wait"}
_Place = tuple[str, Content, int | None, bool, int | None] | int
"""What the replicas know an operation by, or its index in the one that has it."""


class Timed(NamedTuple):
    """An action and when it ran."""

    action: Action
    start_s: float
    end_s: float

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.end_s - self.start_s


@dataclass(frozen=True)
class Course:
    """A step of one plan replica, on one clock."""

    program: Program
    ranks: tuple[tuple[Timed, ...], ...]
    """All actions of every rank of the replica, in the program's order."""
    flights: tuple[Flight, ...]
    """Operations between ranks, from when all participants started them."""
    length_s: float
    """Of the step in the steady state: from the end of the one before to its own."""
    inputs_s: tuple[float, ...] = ()
    """How long every rank waited for samples before its first action; empty: nobody did."""
    zero_s: float = 0.0
    """What its times are counted from, of a measured one by the clock of rank 0."""

    def of(self, *kinds: str) -> Iterator[tuple[int, Timed]]:
        """Iterate over rank and action of all actions of some kinds."""
        for rank, actions in enumerate(self.ranks):
            yield from ((rank, timed) for timed in actions if timed.action.kind in kinds)

    def computations(self, rank: int) -> list[Timed]:
        """Return what keeps a rank busy, apart from starting communication."""
        return [t for t in self.ranks[rank] if t.action.kind not in COMMUNICATING and t.seconds > 0]

    @property
    def end_s(self) -> float:
        """When the last rank is through."""
        return max((actions[-1].end_s for actions in self.ranks if actions), default=0.0)

    @property
    def timeline(self) -> Timeline:
        """The course as the pictures draw it."""
        spans = [
            Span(rank, t.start_s, t.end_s, t.action)
            for rank in range(len(self.ranks))
            for t in self.computations(rank)
        ]
        return Timeline([self.end_s - self.length_s, self.end_s], spans, list(self.flights))


def simulated(program: Program, timeline: Timeline) -> Course:
    """Return the course of a simulated step.

    The simulation knows neither how long starts take, which it counts with the computation behind them, nor when a
    rank begins to wait before its first computation: in the steady state, a step's time before the end of its own.
    """
    spans: dict[int, list[Span]] = defaultdict(list)
    for span in sorted(timeline.spans, key=lambda s: s.start_s):
        spans[span.rank].append(span)
    ends: dict[int | None, float] = {flight.operation: flight.end_s for flight in timeline.flights}
    ranks = []
    for rank, actions in enumerate(program.actions):
        waited = [ends[a.operation] for a in actions if a.kind == "wait" and a.operation in ends]
        end_s = max([s.end_s for s in spans[rank]] + waited, default=0.0)
        first_s = min([s.start_s for s in spans[rank]], default=end_s)
        ranks.append(tuple(_walked(actions, iter(spans[rank]), ends, min(first_s, end_s - timeline.period_s))))
    return Course(program, tuple(ranks), tuple(timeline.flights), timeline.period_s)


def _walked(
    actions: Iterable[Action], spans: Iterator[Span], ends: Mapping[int | None, float], clock_s: float
) -> Iterator[Timed]:
    """Go through a rank's actions; those without a span of their own take no time."""
    span = next(spans, None)
    for action in actions:
        if span is not None and action is span.action:
            yield Timed(action, span.start_s, span.end_s)
            clock_s, span = span.end_s, next(spans, None)
            continue
        end_s = max(clock_s, ends.get(action.operation, clock_s)) if action.kind == "wait" else clock_s
        yield Timed(action, clock_s, end_s)
        clock_s = end_s


def measured(programs: Sequence[Program], records: Sequence[RankTiming]) -> tuple[tuple[Course, ...], ...]:
    """Return the courses of the recorded full steps, per step those of all plan replicas.

    ``programs`` are those of a full step, by replica; steps before the first that runs as planned have others, and
    are left out. So is the first step of a record where there are others, since the ranks met before it. Raises
    RecordError where the actions are not the programs'.
    """
    full = programs[0].step_samples
    first = programs[0].plan.recipe.first_step
    steps = [s.step for s in records[0].steps if s.samples == full and s.step >= first]
    kept = steps[1:] or steps
    by_step = [{s.step: s for s in record.steps} for record in records]
    return tuple(_step(programs, records, [own[step] for own in by_step], by_step, step) for step in kept)


def _step(
    programs: Sequence[Program],
    records: Sequence[RankTiming],
    timings: Sequence[StepTiming],
    by_step: Sequence[Mapping[int, StepTiming]],
    step: int,
) -> tuple[Course, ...]:
    zero_s = min(t.start_s + r.offset_s for t, r in zip(timings, records, strict=True))
    before = [own.get(step - 1) for own in by_step]
    ends = [t.start_s + t.length_s + r.offset_s for t, r in zip(timings, records, strict=True)]
    earlier = [t.start_s + t.length_s + r.offset_s for t, r in zip(before, records, strict=True) if t is not None]
    length_s = max(ends) - (max(earlier) if len(earlier) == len(ends) else zero_s)
    width = len(programs[0].actions)
    shown, told = [], []
    for rank, (timing, record) in enumerate(zip(timings, records, strict=True)):
        replica, place = divmod(rank, width)
        at_s = timing.start_s + record.offset_s - zero_s
        shown.append(_timed(programs[replica], place, timing, at_s, f"rank {rank}"))
        told.append({operation: at_s + seconds for operation, seconds in timing.completions})
    flights = _flights(programs, shown, told)
    return tuple(
        Course(
            program,
            tuple(shown[k * width : (k + 1) * width]),
            flights[k],
            length_s,
            tuple(t.input_s or 0.0 for t in timings[k * width : (k + 1) * width]),
            zero_s,
        )
        for k, program in enumerate(programs)
    )


def _timed(program: Program, place: int, timing: StepTiming, at_s: float, who: str) -> tuple[Timed, ...]:
    actions = program.actions[place]
    if timing.names != tuple(named(a) for a in actions):
        raise RecordError(
            f"timeline of {who}, step {timing.step}: its {len(timing.actions)} actions are not those of the run's "
            f"plan, which has {len(actions)}; train again to record with this version"
        )
    return tuple(Timed(a, at_s + t[4], at_s + t[5]) for a, t in zip(actions, timing.actions, strict=True))


def _flights(
    programs: Sequence[Program], ranks: Sequence[Sequence[Timed]], told: Sequence[Mapping[int, float]]
) -> list[tuple[Flight, ...]]:
    """Return every operation from when its last participant had started it to when its last one had it complete.

    A message is complete when its receiver has it. Who is not told of a completion sees it at the end of a wait.
    """
    begins: dict[tuple[int, _Place], float] = {}
    ends: dict[tuple[int, _Place], float] = {}
    for rank, timed in enumerate(ranks):
        replica, place = divmod(rank, len(programs[0].actions))
        for action, _, end_s in timed:
            if action.operation is None:
                continue
            operation = programs[replica].operations[action.operation]
            key = _key(operation, replica)
            if action.kind == "start":
                begins[key] = max(begins.get(key, end_s), end_s)
            elif operation.kind != "send" or operation.ranks[1] == place:
                at_s = told[rank].get(operation.index, end_s)
                ends[key] = max(ends.get(key, at_s), at_s)
    flights = []
    for replica, program in enumerate(programs):
        keys = {o.index: _key(o, replica) for o in program.operations if not o.alone}
        flights.append(
            tuple(
                Flight(i, begins[k], max(begins[k], ends[k])) for i, k in keys.items() if k in begins and k in ends
            )
        )
    return flights


def _key(operation: Operation, replica: int) -> tuple[int, _Place]:
    return (-1, operation.place) if operation.across else (replica, operation.index)


def typical(courses: Sequence[tuple[Course, ...]]) -> tuple[Course, ...]:
    """Return the step of median length."""
    length_s = median_low(step[0].length_s for step in courses)
    return next(step for step in courses if step[0].length_s == length_s)
