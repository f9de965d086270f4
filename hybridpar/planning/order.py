"""The order of a step's computations: one global sequence, of which every rank executes its part.

The sequence comes from a list schedule in abstract time. Costs there are counts (a position's share of a step's
samples), never durations, so that the order of a plan is the same on every machine, and a faster device can only
make a step faster. In-flight caps are dependencies: a chunk may enter a position once all but the last ``cap``
samples up to its end have left it backwards.

Every rank's order being the projection of one sequence, and communications starting in its order, the program
cannot deadlock; :mod:`hybridpar.planning.check` verifies that independently.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

from hybridpar.errors import PlanError
from hybridpar.planning.blocks import Block, Position
from hybridpar.planning.boundary import Boundary
from hybridpar.planning.layout import Transfer, length
from hybridpar.planning.plan import OrderRule

TICKS = 1 << 20
"""Abstract time in which a rank runs one pass of one position over all its samples of a step."""

TaskKind = Literal["forward", "loss", "backward", "norm", "update"]


@dataclass(frozen=True, slots=True)
class Task:
    """One computation, on one replica or on all shards at once. ``block`` is a position index for updates."""

    kind: TaskKind
    block: int
    micro_batch: int
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class Flow:
    """What the order depends on, for one step of ``samples``."""

    rule: OrderRule
    samples: int
    positions: tuple[Position, ...]
    blocks: tuple[Block, ...]
    boundaries: tuple[Boundary, ...]
    train: bool
    normed: bool
    """Every update waits for the global norm of all gradients."""
    together: frozenset[int] = frozenset()
    """Blocks whose chunks all replicas of their position compute together, as batch norms make them meet."""
    partial: bool = False
    """A last partial batch: caps that its shorter regroupings do not fit are raised to what it needs."""
    finishing: frozenset[int] = frozenset()
    """Positions whose ranks take a micro-batch's backward to its end before they begin the next one."""


def default_caps(positions: tuple[Position, ...], samples: int) -> tuple[int, ...]:
    """Return the in-flight caps of one-forward-one-backward: samples, one per position.

    A position may run ahead of its own backward by its own chunk, those of the positions behind it, and once more
    the largest chunk from here on, which covers regroupings whose boundaries do not meet. With chunks of
    equal size c this is the classical warm-up of one chunk per position behind, plus one.
    """
    sizes = [_chunk(p, samples) for p in positions]
    return tuple(min(sum(sizes[i:]) + max(sizes[i:]), samples) for i in range(len(sizes)))


def sequence(flow: Flow) -> tuple[Task, ...]:
    """Return all computations of a step in their global order.

    Raises:
        PlanError: an in-flight cap is below what the coupled stages need; names the least cap that works.

    """
    order = _Graph(flow, _caps(flow)).schedule()
    if order is None and flow.partial:
        flow = _with_caps(flow, _least_caps(flow))
        order = _Graph(flow, _caps(flow)).schedule()
    if order is None:
        raise PlanError(_explain_stall(flow))
    return order


def _chunk(position: Position, samples: int) -> int:
    intervals = position.micro_batches(samples)[0]
    return max(i[1] for i in intervals) - min(i[0] for i in intervals)


def _caps(flow: Flow) -> tuple[int, ...]:
    if flow.rule == "fill_drain":
        default = (flow.samples,) * len(flow.positions)
    else:
        default = default_caps(flow.positions, flow.samples)
    return tuple(d if p.in_flight is None else p.in_flight for p, d in zip(flow.positions, default, strict=True))


def _explain_stall(flow: Flow) -> str:
    """Name the least cap of one stage that lets the step finish, or of each where several are too low."""
    capped = _capped(flow)
    for stage, position in capped.items():
        if _finishes(flow, {stage: flow.samples}):
            return (
                f"plan.{position.kind}.in_flight: {position.in_flight} samples are fewer than the next stage "
                f"collects before it answers; the least that works is {_least_cap(flow, stage, {})}"
            )
    least = _least_caps(flow)
    needs = ", ".join(f"{p.kind} {p.in_flight} instead of {least[i]}" for i, p in capped.items())
    return f"plan.stages: several in-flight caps are too low ({needs}); raise or remove them"


def _capped(flow: Flow) -> dict[int, Position]:
    """Map every stage that has a cap to one of its positions."""
    return {p.stage: p for p in flow.positions if p.in_flight is not None}


def _least_caps(flow: Flow) -> dict[int, int]:
    """Return caps of all capped stages with which the step finishes: each its own least, if that is enough."""
    capped = _capped(flow)
    free = dict.fromkeys(capped, flow.samples)
    least = {i: max(p.in_flight or 0, _least_cap(flow, i, free)) for i, p in capped.items()}
    return least if _finishes(flow, least) else free


def _least_cap(flow: Flow, stage: int, others: dict[int, int]) -> int:
    """Return the least in-flight cap of a stage with which the step finishes; a higher one only frees."""
    return 1 + bisect_left(range(1, flow.samples), True, key=lambda cap: _finishes(flow, {**others, stage: cap}))


def _finishes(flow: Flow, caps: dict[int, int]) -> bool:
    """Whether the step finishes with these in-flight caps, by stage."""
    trial = _with_caps(flow, caps)
    return _Graph(trial, _caps(trial)).schedule() is not None


def _with_caps(flow: Flow, caps: dict[int, int]) -> Flow:
    changed = tuple(replace(p, in_flight=caps.get(p.stage, p.in_flight)) for p in flow.positions)
    return replace(flow, positions=changed)


class _Graph:
    """Tasks with their dependencies."""

    def __init__(self, flow: Flow, caps: tuple[int, ...]) -> None:
        self.flow = flow
        self.tasks: list[Task] = []
        self.cost: list[int] = []
        self.key: list[tuple[int, ...]] = []
        self.before: list[int] = []
        self.after: list[list[int]] = []
        self.at: dict[tuple[TaskKind, int, int, int], int] = {}
        self.chunks = [p.micro_batches(flow.samples) for p in flow.positions]
        self._add_passes()
        self._add_turns()
        self._add_exchanges()
        if flow.train:
            self._add_caps(caps)
            self._finish_backwards()
            self._add_updates()

    def _add(self, task: Task, cost: int, key: tuple[int, ...]) -> None:
        number = len(self.tasks)
        self.tasks.append(task)
        self.cost.append(cost)
        self.key.append((*key, number))
        self.before.append(0)
        self.after.append([])
        for rank in task.ranks:
            self.at[task.kind, task.block, task.micro_batch, rank] = number

    def _depend(self, later: int, earlier: int) -> None:
        self.after[earlier].append(later)
        self.before[later] += 1

    def _pieces(
        self, position: Position, *, together: bool = False
    ) -> Iterable[tuple[int, tuple[int, ...], int, int]]:
        """Yield (micro-batch, ranks, first sample, ticks) of every call of a position.

        ``together``: one call per chunk on all replicas, those without samples too.
        """
        total = [sum(length(c[i]) for c in self.chunks[position.index]) for i in range(len(position.ranks))]
        for m, intervals in enumerate(self.chunks[position.index]):
            if position.kind == "tail":
                ticks = TICKS * length(intervals[0]) // self.flow.samples
                yield m, position.ranks, intervals[0][0], max(ticks, 1)
                continue
            if together:
                shares = zip(intervals, total, strict=True)
                ticks = max(TICKS * length(interval) // max(share, 1) for interval, share in shares)
                yield m, position.ranks, intervals[0][0], max(ticks, 1)
                continue
            for rank, interval, share in zip(position.ranks, intervals, total, strict=True):
                if length(interval) > 0:
                    yield m, (rank,), interval[0], max(TICKS * length(interval) // share, 1)

    def _add_passes(self) -> None:
        flow, last = self.flow, len(self.flow.blocks) - 1
        count = defaultdict(int)  # type: dict[int, int]
        for block in flow.blocks:
            count[block.position] += 1
        for block in flow.blocks:
            position = flow.positions[block.position]
            for m, ranks, start, ticks in self._pieces(position, together=block.index in flow.together):
                ticks = max(ticks // count[position.index], 1)  # noqa: PLW2901
                self._add(Task("forward", block.index, m, ranks), ticks, self._forward_key(block, start))
                if flow.train and block.backward:
                    self._add(Task("backward", block.index, m, ranks), ticks, (1, -block.index, start))
        for m, ranks, start, _ in self._pieces(flow.positions[-1]):
            self._add(Task("loss", last, m, ranks), 1, (1, -last - 1, start))
            self._depend(self.at["loss", last, m, ranks[0]], self.at["forward", last, m, ranks[0]])
            if flow.train:
                self._depend(self.at["backward", last, m, ranks[0]], self.at["loss", last, m, ranks[0]])

    def _add_turns(self) -> None:
        """Chunks that replicas compute together follow each other, as running statistics go by their order."""
        for block in sorted(self.flow.together):
            position = self.flow.positions[self.flow.blocks[block].position]
            for m in range(1, len(self.chunks[position.index])):
                later, earlier = (self.at["forward", block, n, position.ranks[0]] for n in (m, m - 1))
                self._depend(later, earlier)

    def _forward_key(self, block: Block, start: int) -> tuple[int, ...]:
        if self.flow.rule == "fill_drain":
            return (0, block.position, start, block.index)
        return (2, -block.index, start, 0)

    def _add_exchanges(self) -> None:
        for i, boundary in enumerate(self.flow.boundaries):
            self._link("forward", i, i + 1, boundary.activation)
            if self.flow.train:
                self._link("backward", i + 1, i, boundary.gradient)

    def _link(self, kind: TaskKind, source: int, target: int, transfers: tuple[Transfer, ...]) -> None:
        pairs = {
            (
                self.at[kind, target, t.target_micro_batch, t.target],
                self.at[kind, source, t.source_micro_batch, t.source],
            )
            for t in transfers
        }
        for later, earlier in sorted(pairs):
            self._depend(later, earlier)

    def _add_caps(self, caps: tuple[int, ...]) -> None:
        first_block, first_trained = {}, {}  # type: dict[int, int], dict[int, int]
        for b in self.flow.blocks:
            first_block.setdefault(b.position, b.index)
            if b.backward:
                first_trained.setdefault(b.position, b.index)
        for position, cap in zip(self.flow.positions, caps, strict=True):
            if position.index not in first_trained:
                continue  # nothing is kept for a backward
            block, chunk_list = first_block[position.index], self.chunks[position.index]
            starts = [min(i[0] for i in intervals) for intervals in chunk_list]
            stops = [max(i[1] for i in intervals) for intervals in chunk_list]
            for i, rank in enumerate(position.ranks):
                own = [m for m, intervals in enumerate(chunk_list) if length(intervals[i]) > 0]
                begins = [starts[m] for m in own]
                for m in own:
                    held = bisect_left(begins, stops[m] - cap)
                    if held:
                        later = self.at["forward", block, m, rank]
                        self._depend(
                            later, self.at["backward", first_trained[position.index], own[held - 1], rank]
                        )

    def _finish_backwards(self) -> None:
        """Let the backwards of a position's blocks follow each other: all ranks then reduce them in one order."""
        for index in sorted(self.flow.finishing):
            own = [b.index for b in self.flow.blocks if b.position == index and b.backward]
            if not own:
                continue
            for i, rank in enumerate(self.flow.positions[index].ranks):
                calls = [m for m, intervals in enumerate(self.chunks[index]) if length(intervals[i]) > 0]
                for earlier, later in pairwise(calls):
                    ended = self.at["backward", own[0], earlier, rank]
                    self._depend(self.at["backward", own[-1], later, rank], ended)

    def _add_updates(self) -> None:
        """Norms and updates wait for the last backward of every block, on all replicas.

        An update of reduced gradients also waits until its ranks have nothing else to do: how long a reduction
        takes is not known here, and a rank that waits for one computes nothing.
        """
        ends: dict[int, set[int]] = defaultdict(set)
        for (kind, block, _, _), number in self.at.items():
            if kind == "backward":
                ends[self.flow.blocks[block].position].add(number)
        norms = self._add_norms(ends) if self.flow.normed else None
        for position in self.flow.positions:
            for rank in position.ranks:
                self._add(Task("update", position.index, 0, (rank,)), 1, (4, -position.index))
                later = self.at["update", position.index, 0, rank]
                required = set(ends[position.index] if norms is None else norms)
                if position.reduced and norms is None:
                    required.update(*(ends[p.index] for p in self.flow.positions if rank in p.ranks))
                for end in sorted(required):
                    self._depend(later, end)

    def _add_norms(self, ends: dict[int, set[int]]) -> list[int]:
        norms = []
        for rank in dict.fromkeys(r for p in self.flow.positions for r in p.ranks):
            self._add(Task("norm", 0, 0, (rank,)), 1, (3, 0))
            norms.append(self.at["norm", 0, 0, rank])
            own = [ends[p.index] for p in self.flow.positions if rank in p.ranks]
            for end in sorted(set().union(*own)):
                self._depend(norms[-1], end)
        return norms

    def schedule(self) -> tuple[Task, ...] | None:
        """List-schedule in abstract time; None if some tasks can never start."""
        order = _ListSchedule(self).run()
        return None if order is None else tuple([self.tasks[number] for number in order])


class _ListSchedule:
    """At every moment each free rank starts its best ready task; one that needs more ranks waits for them.

    Ranks go by the places where positions first name them, and not by their numbers, so that equal ranks can
    exchange theirs.
    """

    def __init__(self, graph: _Graph) -> None:
        places: dict[int, int] = {}
        for position in graph.flow.positions:
            for rank in position.ranks:
                places.setdefault(rank, len(places))
        self.members = [tuple([places[r] for r in task.ranks]) for task in graph.tasks]
        self.cost, self.after, self.waiting = graph.cost, graph.after, list(graph.before)
        self.number = sorted(range(len(graph.key)), key=graph.key.__getitem__)
        """Tasks, the best one first."""
        self.value = [0] * len(self.number)
        for value, number in enumerate(self.number):
            self.value[number] = value
        self.ready: list[list[int]] = [[] for _ in places]
        """By place, the values of tasks that could start, as a heap."""
        self.running: list[tuple[int, int]] = []
        self.busy = [False] * len(places)
        self.started: list[int] = []

    def run(self) -> list[int] | None:
        """Return the tasks' numbers in the order of their starts; None if some can never start."""
        touched: set[int] = set()
        for number, count in enumerate(self.waiting):
            if count == 0:
                self._offer(number, touched)
        self._start_best(touched, 0)
        while self.running:
            now = self.running[0][0]
            touched = set()
            while self.running and self.running[0][0] == now:
                self._finish(heapq.heappop(self.running)[1], touched)
            self._start_best(touched, now)
        return self.started if len(self.started) == len(self.number) else None

    def _offer(self, number: int, touched: set[int]) -> None:
        for place in self.members[number]:
            heapq.heappush(self.ready[place], self.value[number])
            touched.add(place)

    def _finish(self, number: int, touched: set[int]) -> None:
        for place in self.members[number]:
            self.busy[place] = False
            touched.add(place)
        waiting = self.waiting
        for later in self.after[number]:
            waiting[later] -= 1
            if not waiting[later]:
                self._offer(later, touched)

    def _start_best(self, touched: set[int], now: int) -> None:
        ready, busy = self.ready, self.busy
        for place in sorted(touched):
            if busy[place] or not ready[place]:
                continue
            best = ready[place][0]
            number = self.number[best]
            members = self.members[number]
            if len(members) > 1 and any(busy[m] or not ready[m] or ready[m][0] != best for m in members):
                continue
            for member in members:
                heapq.heappop(ready[member])
                busy[member] = True
            self.started.append(number)
            heapq.heappush(self.running, (now + self.cost[number], number))
