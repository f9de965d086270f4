"""A program with its costs, flattened: what the two simulators walk through.

Starts and waits take no time of their own here; what they cost their rank counts with its next computation.
Operations are served by the queues of their communicators and, above the node level, by their nodes' cards, in one
fixed order: the one in which the program's sequence completes their starts. That order depends on the program
alone, never on durations, so without contention the step time is a longest path: a faster part never makes a step
slower.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable
from dataclasses import dataclass

from hybridpar.planning.check import queue_of
from hybridpar.planning.costs import Costs
from hybridpar.planning.program import Action, Operation, Program

SMALL_BYTES = 4096
"""An operation up to this size does not wait for a card: it slips in between the packets of larger ones."""

COMPUTE, START, WAIT = range(3)


@dataclass(frozen=True)
class Walk:
    """The actions that matter in time, in an order in which all can run.

    ``steps`` has tuples (rank, code, what): seconds of a COMPUTE, or the operation of a START or WAIT; ``actions``
    the actions themselves. ``servers`` lists, per operation, the queues and cards that serve one operation at a
    time.
    """

    world: int
    """Ranks of one plan replica."""
    replicas: int
    steps: list[tuple[int, int, float]]
    actions: list[Action]
    members: list[tuple[int, ...]]
    """Local ranks of every operation."""
    seconds: list[float]
    contention: list[float]
    """Seconds of computation that a participant loses per second in which an operation is in flight."""
    servers: list[tuple[int, ...]]
    server_count: int


def walk(program: Program, costs: Costs) -> Walk:
    """Flatten a program."""
    world = len(program.actions)
    own = [zip(program.actions[r], _folded(program, r, costs), strict=True) for r in range(world)]
    steps: list[tuple[int, int, float]] = []
    actions: list[Action] = []
    for rank in program.sequence:
        action, seconds = next(own[rank])
        if action.operation is not None:
            steps.append((rank, START if action.kind == "start" else WAIT, action.operation))
        elif seconds > 0.0:
            steps.append((rank, COMPUTE, seconds))
        else:
            continue
        actions.append(action)
    numbers: dict[Hashable, int] = {}
    servers = [_servers(program, o, costs, numbers) for o in program.operations]
    return Walk(
        world,
        program.plan.replicas,
        steps,
        actions,
        [o.ranks for o in program.operations],
        [costs.operation(program, o) for o in program.operations],
        [costs.contention(program, o) for o in program.operations],
        servers,
        len(numbers),
    )


def _folded(program: Program, rank: int, costs: Costs) -> list[float]:
    """Return the seconds of a rank's actions.

    What starts and waits cost counts with the next computation.
    """
    actions = program.actions[rank]
    seconds = costs.actions(program, rank)
    carried, last = 0.0, None
    for i, action in enumerate(actions):
        if action.operation is not None:
            carried, seconds[i] = carried + seconds[i], 0.0
        elif seconds[i] > 0:
            carried, seconds[i], last = 0.0, seconds[i] + carried, i
    if last is not None:
        seconds[last] += carried
    return seconds


def _servers(
    program: Program, operation: Operation, costs: Costs, numbers: dict[Hashable, int]
) -> tuple[int, ...]:
    """Number the queue and the cards (by node and direction) that an operation occupies."""
    names: list[Hashable] = [queue_of(operation)]
    if operation.bytes > SMALL_BYTES:
        names += costs.cards(program, operation)
    return tuple(numbers.setdefault(name, len(numbers)) for name in names)


def service_order(walked: Walk) -> list[list[int]]:
    """Return, for every server, its operations in the order of their service."""
    left = [len(m) for m in walked.members]
    order: dict[int, list[int]] = defaultdict(list)
    for _, code, what in walked.steps:
        if code == START:
            operation = int(what)
            left[operation] -= 1
            if not left[operation]:
                for server in walked.servers[operation]:
                    order[server].append(operation)
    return [order[i] for i in range(walked.server_count)]
