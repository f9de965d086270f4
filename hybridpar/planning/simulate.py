"""The simulation: when every action of a program starts and ends, from its costs.

Ranks run their actions in order. An operation runs once all participants have started it and its queue is free;
above the node level it also needs its nodes' cards, which serve operations in the order of their readiness.
Ranks on a node with fewer cores than busy ranks share the cores evenly, and an idle rank's time is lent to the
others, as an operating system does.
"""

from __future__ import annotations

import heapq
from collections import defaultdict, deque
from collections.abc import Hashable
from dataclasses import dataclass, field

from hybridpar.cluster.topology import Cluster
from hybridpar.planning.check import queue_of
from hybridpar.planning.costs import Costs, wire_bytes
from hybridpar.planning.memory import peak_per_rank
from hybridpar.planning.plan import Prediction, StagePrediction
from hybridpar.planning.program import Action, Operation, Program

SMALL_BYTES = 4096
"""An operation up to this size does not wait for a card: it slips in between the packets of larger ones."""


@dataclass(frozen=True, slots=True)
class Span:
    """One computation or operation in the simulated time."""

    rank: int
    start_s: float
    end_s: float
    action: Action


@dataclass
class Timeline:
    """The simulated steps."""

    ends_s: list[float]
    """When each step was over on all ranks."""
    spans: list[Span] = field(default_factory=list)
    """Computations of the last step."""

    @property
    def period_s(self) -> float:
        """Time of a step in the steady state: the last end minus the one before."""
        return self.ends_s[-1] - (self.ends_s[-2] if len(self.ends_s) > 1 else 0.0)


def simulate(program: Program, costs: Costs, steps: int = 2) -> Timeline:
    """Run ``steps`` steps of the program in simulated time. The program must pass the deadlock check.

    Ranks that are through go on with the step after, until all are: its work competes for cores and cards with the
    end of the last step as it does at the end of every other.
    """
    return _Simulation(program, costs, steps).run()


def predict(program: Program, costs: Costs) -> Prediction:
    """Simulate a training program and sum up what its user wants to know."""
    timeline = simulate(program, costs)
    period = timeline.period_s
    busy = sum(s.end_s - s.start_s for s in timeline.spans)
    return Prediction(
        step_s=period,
        samples_per_s=program.samples / period if period else 0.0,
        bubble=max(0.0, 1.0 - busy / (period * program.plan.world)) if period else 0.0,
        wire_bytes=sum(wire_bytes(o) for o in program.operations),
        memory_bytes=peak_per_rank(program),
        stages=_stage_predictions(program, costs),
        source=costs.profile.source,
    )


def _stage_predictions(program: Program, costs: Costs) -> tuple[StagePrediction, ...]:
    """Per stage, the device seconds of its busiest rank."""
    total: dict[tuple[int, int, str], float] = defaultdict(float)
    for rank, actions in enumerate(program.actions):
        for action in actions:
            if action.kind in {"forward", "backward", "score", "loss"}:
                position = program.blocks[action.block or 0].position
            elif action.kind == "update":
                position = action.block or 0
            else:
                continue
            kind = {"score": "forward", "loss": "forward"}.get(action.kind, action.kind)
            total[program.positions[position].stage, rank, kind] += costs.action(program, rank, action)
    result = []
    for index, stage in enumerate(program.plan.stages):
        own = [[total[index, r, k] for k in ("forward", "backward", "update")] for r in stage.ranks]
        result.append(StagePrediction(stage.kind, *max(own, key=sum)))
    return tuple(result)


def _folded(program: Program, rank: int, costs: Costs) -> list[float]:
    """Return the seconds of a rank's actions; what starts and waits cost counts with the next computation."""
    actions = program.actions[rank]
    seconds = [costs.action(program, rank, action) for action in actions]
    carried, last = 0.0, None
    for i, action in enumerate(actions):
        if action.operation is not None:
            carried, seconds[i] = carried + seconds[i], 0.0
        elif seconds[i] > 0:
            carried, seconds[i], last = 0.0, seconds[i] + carried, i
    if last is not None:
        seconds[last] += carried
    return seconds


class _Node:
    """The cores of a node, shared evenly by the ranks that compute."""

    def __init__(self, cores: float) -> None:
        self.cores = cores
        self.left: dict[int, float] = {}
        self.now = 0.0
        self.version = 0

    def advance(self, now: float) -> None:
        """Work off what the computing ranks did since the last change."""
        if self.left:
            done = (now - self.now) * self.rate()
            for rank in self.left:
                self.left[rank] -= done
        self.now = now

    def rate(self) -> float:
        """Device seconds per second of each computing rank."""
        return min(1.0, self.cores / len(self.left))

    def next_end(self) -> tuple[float, int]:
        """Return when the first computation ends, and its rank."""
        rank = min(self.left, key=lambda r: (self.left[r], r))
        return self.now + max(self.left[rank], 0.0) / self.rate(), rank


class _Simulation:
    def __init__(self, program: Program, costs: Costs, steps: int) -> None:
        self.program, self.costs, self.steps = program, costs, steps
        cluster: Cluster = costs.cluster
        self.nodes = [_Node(n.cores or float("inf")) for n in cluster.nodes]
        self.node_of = cluster.node_of
        self.at = [0] * program.plan.world
        self.step = [0] * program.plan.world
        self.began: dict[int, float] = {}
        self.events: list[tuple[float, int, int, object]] = []
        self.count = 0
        self.queues: dict[tuple[int, Hashable], deque[tuple[int, int]]] = defaultdict(deque)
        self.complete: set[tuple[int, int]] = set()
        self.running: set[tuple[int, int]] = set()
        self.waiting: dict[int, tuple[int, int]] = {}
        self.cards: dict[tuple[int, str], float] = defaultdict(float)
        self.ends = [0.0] * steps
        self.ended = 0
        self.spans: list[Span] = []
        self.cost = [_folded(program, rank, costs) for rank in range(program.plan.world)]
        self.seconds = [costs.operation(program, o) if len(o.ranks) > 1 else 0.0 for o in program.operations]

    def run(self) -> Timeline:
        """Process events until all ranks are through."""
        world = self.program.plan.world
        for rank in range(world):
            self._proceed(rank, 0.0)
        while self.events and self.ended < world:
            now, _, version, what = heapq.heappop(self.events)
            if isinstance(what, int):
                if version == self.nodes[what].version:
                    self._finish_computation(what, now)
            else:
                self._finish_operation(what, now)  # type: ignore[arg-type]
        return Timeline(self.ends, self.spans)

    def _push(self, time: float, version: int, what: object) -> None:
        self.count += 1
        heapq.heappush(self.events, (time, self.count, version, what))

    def _proceed(self, rank: int, now: float) -> None:
        """Run a rank's actions until it computes, waits, or is through."""
        actions = self.program.actions[rank]
        while True:
            if self.at[rank] == len(actions):
                self._end_step(rank, now)
                if self.ended == self.program.plan.world:
                    return
                continue
            number = self.at[rank]
            action, seconds = actions[number], self.cost[rank][number]
            if action.kind == "start" and action.operation is not None:
                self._start(rank, action.operation, now)
            elif action.kind == "wait" and action.operation is not None:
                key = (self.step[rank], action.operation)
                if key not in self.complete:
                    self.waiting[rank] = key
                    return
            elif seconds > 0:
                self._compute(rank, seconds, now)
                return
            self.at[rank] += 1

    def _end_step(self, rank: int, now: float) -> None:
        step = self.step[rank]
        if step < self.steps:
            self.ends[step] = max(self.ends[step], now)
            self.ended += step == self.steps - 1
        self.step[rank], self.at[rank] = step + 1, 0

    def _compute(self, rank: int, seconds: float, now: float) -> None:
        node = self.nodes[self.node_of[rank]]
        node.advance(now)
        node.left[rank] = seconds
        self.began[rank] = now
        self._schedule(self.node_of[rank])

    def _schedule(self, index: int) -> None:
        node = self.nodes[index]
        node.version += 1
        if node.left:
            self._push(node.next_end()[0], node.version, index)

    def _finish_computation(self, index: int, now: float) -> None:
        node = self.nodes[index]
        _, rank = node.next_end()
        node.advance(now)
        del node.left[rank]
        self._schedule(index)
        if self.step[rank] == self.steps - 1:
            action = self.program.actions[rank][self.at[rank]]
            self.spans.append(Span(rank, self.began[rank], now, action))
        self.at[rank] += 1
        self._proceed(rank, now)

    def _start(self, rank: int, index: int, now: float) -> None:
        operation = self.program.operations[index]
        self.queues[rank, queue_of(operation)].append((self.step[rank], index))
        self._try_begin(operation, self.step[rank], now)

    def _try_begin(self, operation: Operation, step: int, now: float) -> None:
        key, queue = (step, operation.index), queue_of(operation)
        own = [self.queues[r, queue] for r in operation.ranks]
        if key in self.running or any(not q or q[0] != key for q in own):
            return
        self.running.add(key)
        seconds = self.seconds[operation.index]
        cards = self._cards(operation)
        begin = max((self.cards[c] for c in cards), default=now)
        end = max(begin, now) + seconds
        for card in cards:
            self.cards[card] = end
        self._push(end, 0, key)

    def _cards(self, operation: Operation) -> list[tuple[int, str]]:
        """The cards, by node and direction, that an operation occupies."""
        nodes = [self.node_of[r] for r in operation.ranks]
        if operation.bytes <= SMALL_BYTES or len(set(nodes)) == 1:
            return []
        if operation.kind == "send":
            return [(nodes[0], "out"), (nodes[1], "in")]
        return [(n, way) for n in sorted(set(nodes)) for way in ("out", "in")]

    def _finish_operation(self, key: tuple[int, int], now: float) -> None:
        operation = self.program.operations[key[1]]
        self.complete.add(key)
        queue = queue_of(operation)
        for rank in operation.ranks:
            self.queues[rank, queue].popleft()
        for rank in operation.ranks:
            if self.queues[rank, queue]:
                step, index = self.queues[rank, queue][0]
                self._try_begin(self.program.operations[index], step, now)
        for rank in operation.ranks:
            if self.waiting.get(rank) == key:
                del self.waiting[rank]
                self.at[rank] += 1
                self._proceed(rank, now)
