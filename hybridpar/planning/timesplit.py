"""Where a step's time goes: every rank's period split into work, exposed communication and bubble, by stage."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from hybridpar.planning.compression import WORKS
from hybridpar.planning.program import Action, Program
from hybridpar.planning.timeline import Span, Timeline

NEVER = float("-inf")
UPDATES = {*WORKS, "norm", "update"}


@dataclass(frozen=True)
class StageTime:
    """Seconds of a step; of one rank, or the mean of several."""

    compute_s: float = 0.0
    """Forward, loss, backward and copies; on shared cores, for as long as the work is under way."""
    update_s: float = 0.0
    """Optimizer steps, the gradient norm, and what compresses gradients."""
    exposed_s: float = 0.0
    """Waiting for a communication that all its participants have started; queueing for a network card counts."""
    bubble_s: float = 0.0
    """Waiting for anything else: for other ranks to compute what is to be sent."""

    @property
    def busy_s(self) -> float:
        """Computing and updating."""
        return self.compute_s + self.update_s

    @property
    def total_s(self) -> float:
        """All four together."""
        return self.busy_s + self.exposed_s + self.bubble_s


@dataclass(frozen=True)
class TimeSplit:
    """The period of the steady state, once per rank: each rank's entries add up to ``period_s``."""

    period_s: float
    ranks: tuple[tuple[StageTime, ...], ...]
    """[rank][stage of the plan]."""

    def stage(self, index: int) -> StageTime:
        """Return a stage's share of the step, as the mean over all ranks; those of all stages make the period."""
        return self._mean(own[index] for own in self.ranks)

    @property
    def total(self) -> StageTime:
        """All stages together, as the mean over all ranks: adds up to the period."""
        return self._mean(time for own in self.ranks for time in own)

    def busy_s(self, rank: int) -> float:
        """Seconds per step in which a rank computes or updates."""
        return sum(time.busy_s for time in self.ranks[rank])

    def _mean(self, times: Iterable[StageTime]) -> StageTime:
        own = list(times)
        count = len(self.ranks)
        return StageTime(
            sum(t.compute_s for t in own) / count,
            sum(t.update_s for t in own) / count,
            sum(t.exposed_s for t in own) / count,
            sum(t.bubble_s for t in own) / count,
        )


@dataclass
class _Gap:
    """A time between two computations of a rank, and the operations that it waits for there."""

    start_s: float
    end_s: float
    stage: int
    operations: list[int]


@dataclass
class _Track:
    """What one rank did in the last step: its computations, and the waits before each and after the last."""

    spans: list[Span] = field(default_factory=list)
    stages: list[int] = field(default_factory=list)
    """Of every computation."""
    waits: list[list[int]] = field(default_factory=lambda: [[]])
    end_s: float = NEVER
    """When its last action was over."""


def split_time(program: Program, timeline: Timeline) -> TimeSplit:
    """Split every rank's period of the simulated steady state.

    A rank's period reaches from the end of its step to the end of the next. Between two computations it waits; the
    wait before the first one is what the period leaves. A wait belongs to the stage of the computation that
    follows, after the last one to that of the last. The part of it in which an operation that the rank waits for
    there was started by all its participants and not over is exposed communication, the rest is bubble.

    A rank that ran ahead of the others in the simulated steps waited longer in the last one than on average; its
    waits are scaled down to what the period leaves.
    """
    ends = {flight.operation: flight.end_s for flight in timeline.flights}
    begins = {flight.operation: flight.start_s for flight in timeline.flights}
    by_rank: dict[int, list[Span]] = defaultdict(list)
    for span in sorted(timeline.spans, key=lambda s: s.start_s):
        by_rank[span.rank].append(span)
    started: dict[int, float] = defaultdict(lambda: NEVER)
    tracks = [_track(program, r, by_rank[r], ends, started) for r in range(len(program.actions))]
    ready = {o: started[o] if started[o] > NEVER else begins[o] for o in ends}
    own = (_rank_times(program, r, t, timeline.period_s, ready, ends) for r, t in enumerate(tracks))
    return TimeSplit(timeline.period_s, tuple(own))


def _track(
    program: Program, rank: int, spans: list[Span], ends: dict[int, float], started: dict[int, float]
) -> _Track:
    """Follow a rank through its actions; ``started`` takes up when the last participant started an operation."""
    track = _Track()
    left = iter(spans)
    due = next(left, None)
    for action in program.actions[rank]:
        if action.kind == "start" and action.operation is not None:
            started[action.operation] = max(started[action.operation], track.end_s)
        elif action.kind == "wait" and action.operation is not None:
            track.waits[-1].append(action.operation)
            track.end_s = max(track.end_s, ends[action.operation])
        elif due is not None and due.action == action:
            track.spans.append(due)
            track.waits.append([])
            track.end_s, due = due.end_s, next(left, None)
    track.stages = _stages(program, rank, [s.action for s in track.spans])
    return track


def _stages(program: Program, rank: int, actions: list[Action]) -> list[int]:
    """Return the stage of every computation; the norm belongs to the update that it precedes."""
    known = [_stage(program, action) for action in actions]
    following = _first_stage(program, rank)
    result = []
    for stage in reversed(known):
        following = following if stage is None else stage
        result.append(following)
    return result[::-1]


def _stage(program: Program, action: Action) -> int | None:
    if action.block is None:
        return None
    if action.kind == "update":
        return program.positions[action.block].stage
    block = action.block + (action.kind == "copy" and action.content == "activation")
    return program.positions[program.blocks[block].position].stage


def _first_stage(program: Program, rank: int) -> int:
    return next((p.stage for p in program.positions if rank in p.ranks), 0)


def _rank_times(
    program: Program,
    rank: int,
    track: _Track,
    period_s: float,
    ready: dict[int, float],
    ends: dict[int, float],
) -> tuple[StageTime, ...]:
    compute: dict[int, float] = defaultdict(float)
    update: dict[int, float] = defaultdict(float)
    for span, stage in zip(track.spans, track.stages, strict=True):
        (update if span.action.kind in UPDATES else compute)[stage] += span.end_s - span.start_s
    gaps = list(_gaps(program, rank, track, period_s))
    waited = sum(gap.end_s - gap.start_s for gap in gaps)
    left = period_s - sum(compute.values()) - sum(update.values())
    scale = left / waited if waited > 0 else 0.0
    exposed: dict[int, float] = defaultdict(float)
    bubble: dict[int, float] = defaultdict(float)
    for gap in gaps:
        in_flight = _covered(gap, [(ready[o], ends[o]) for o in gap.operations])
        exposed[gap.stage] += in_flight * scale
        bubble[gap.stage] += (gap.end_s - gap.start_s - in_flight) * scale
    stages = range(len(program.plan.stages))
    return tuple(StageTime(compute[i], update[i], exposed[i], bubble[i]) for i in stages)


def _gaps(program: Program, rank: int, track: _Track, period_s: float) -> Iterator[_Gap]:
    """Yield the waits of one period: before the first computation, between computations, after the last."""
    if not track.spans:
        end = max(track.end_s, period_s)
        yield _Gap(end - period_s, end, _first_stage(program, rank), track.waits[0])
        return
    first, last = track.spans[0], track.spans[-1]
    after = max(track.end_s - last.end_s, 0.0)
    before = max(period_s - (last.end_s - first.start_s) - after, 0.0)
    yield _Gap(first.start_s - before, first.start_s, track.stages[0], track.waits[0])
    for i in range(1, len(track.spans)):
        start, end = track.spans[i - 1].end_s, track.spans[i].start_s
        yield _Gap(start, max(start, end), track.stages[i], track.waits[i])
    yield _Gap(last.end_s, last.end_s + after, track.stages[-1], track.waits[-1])


def _covered(gap: _Gap, intervals: list[tuple[float, float]]) -> float:
    """Return the seconds of the gap that any of the intervals covers."""
    total, reached = 0.0, gap.start_s
    for start, end in sorted(intervals):
        begin, stop = max(start, reached), min(end, gap.end_s)
        if stop > begin:
            total, reached = total + stop - begin, stop
    return total
