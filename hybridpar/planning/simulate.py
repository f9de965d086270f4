"""The simulation: when every action of a program starts and ends, from its costs.

Ranks run their actions in order. An operation runs once all participants have started it and the queues and cards
it needs have served those before it. Where ranks share cores, or communication slows computation down, events
decide (:mod:`hybridpar.planning.events`); otherwise one pass over the program's sequence does.
"""

from __future__ import annotations

from collections import defaultdict

from hybridpar.planning.compression import WORKS
from hybridpar.planning.costs import Costs, wire_bytes
from hybridpar.planning.events import EventSimulation
from hybridpar.planning.plan import Prediction, StagePrediction
from hybridpar.planning.program import Program
from hybridpar.planning.resident import peak_per_rank
from hybridpar.planning.timeline import Flight, Span, Timeline
from hybridpar.planning.walk import COMPUTE, START, Walk, walk

PART_OF = {"score": "forward", "loss": "forward"} | dict.fromkeys(map(str, WORKS), "update")
"""What a stage's time counts an action as, apart from passes and updates."""


def simulate(program: Program, costs: Costs, steps: int = 2) -> Timeline:
    """Run ``steps`` steps of the program in simulated time. The program must pass the deadlock check.

    Ranks that are through go on with the step after, until all are: its work competes for cores and cards with the
    end of the last step as it does at the end of every other.
    """
    walked = walk(program, costs)
    if costs.contended:
        return EventSimulation(walked, costs, steps).run()
    pass_ = _Pass(walked)
    ends = [pass_.step() for _ in range(steps)]
    return Timeline(ends, *pass_.record())


def step_time(program: Program, costs: Costs) -> float:
    """Return the seconds of a step in the steady state; the same as ``simulate``'s, sooner."""
    walked = walk(program, costs)
    if costs.contended:
        return EventSimulation(walked, costs, 2).run().period_s
    return _period(walked)


def step_time_at_least(program: Program, costs: Costs) -> float:
    """Return the seconds of a step if nothing contended: a lower bound, by one pass."""
    return _period(walk(program, costs))


def _period(walked: Walk) -> float:
    pass_ = _Pass(walked)
    first = pass_.step()
    return pass_.step() - first


class _Pass:
    """The longest path, in one pass per step over the program's sequence."""

    def __init__(self, walked: Walk) -> None:
        self.walked = walked
        self.clock = [0.0] * walked.world
        self.free = [0.0] * walked.server_count
        self.begin = [0.0] * len(walked.members)
        self.end = [0.0] * len(walked.members)

    def step(self) -> float:
        """Run one more step; return when it is over on all ranks."""
        walked, clock, free, end = self.walked, self.clock, self.free, self.end
        self.last_clock = list(clock)
        begin = self.begin = [0.0] * len(walked.members)
        left = [len(m) for m in walked.members]
        seconds, servers = walked.seconds, walked.servers
        for rank, code, what in walked.steps:
            if code == COMPUTE:
                clock[rank] += what
                continue
            operation = int(what)
            if code == START:
                at = clock[rank]
                begin[operation] = max(at, begin[operation])
                left[operation] -= 1
                if left[operation]:
                    continue
                at = begin[operation]
                for server in servers[operation]:
                    at = max(at, free[server])
                begin[operation] = at
                over = end[operation] = at + seconds[operation]
                for server in servers[operation]:
                    free[server] = over
            elif end[operation] > clock[rank]:
                clock[rank] = end[operation]
        return max(clock)

    def record(self) -> tuple[list[Span], list[Flight]]:
        """Return the computations and operations of the last step."""
        clock = list(self.last_clock)
        spans = []
        for (rank, code, what), action in zip(self.walked.steps, self.walked.actions, strict=True):
            if code == COMPUTE:
                spans.append(Span(rank, clock[rank], clock[rank] + what, action))
                clock[rank] += what
            elif code != START:
                clock[rank] = max(clock[rank], self.end[int(what)])
        started = sorted({int(what) for _, code, what in self.walked.steps if code == START})
        flights = [Flight(i, self.begin[i], self.end[i]) for i in started]
        return spans, flights


def predict(program: Program, costs: Costs) -> Prediction:
    """Simulate a training program and sum up what its user wants to know."""
    timeline = simulate(program, costs)
    period = timeline.period_s
    busy = sum(s.end_s - s.start_s for s in timeline.spans)
    return Prediction(
        step_s=period,
        samples_per_s=program.plan.global_batch / period if period else 0.0,
        bubble=max(0.0, 1.0 - busy / (period * len(program.actions))) if period else 0.0,
        wire_bytes=sum(wire_bytes(o, program.plan.replicas) for o in program.operations),
        memory_bytes=peak_per_rank(program, costs.workspaces),
        stages=_stage_predictions(program, costs),
        source=costs.profile.source,
    )


def _stage_predictions(program: Program, costs: Costs) -> tuple[StagePrediction, ...]:
    """Per stage, the device seconds of its busiest rank."""
    total: dict[tuple[int, int, str], float] = defaultdict(float)
    for rank, actions in enumerate(program.actions):
        for action, seconds in zip(actions, costs.actions(program, rank), strict=True):
            if action.kind in {"forward", "backward", "score", "loss"} or action.kind in WORKS:
                position = program.blocks[action.block or 0].position
            elif action.kind == "update":
                position = action.block or 0
            else:
                continue
            kind = PART_OF.get(action.kind, action.kind)
            total[program.positions[position].stage, rank, kind] += seconds
    result = []
    for index, stage in enumerate(program.plan.stages):
        own = [[total[index, r, k] for k in ("forward", "backward", "update")] for r in stage.ranks]
        result.append(StagePrediction(stage.kind, *max(own, key=sum)))
    return tuple(result)
