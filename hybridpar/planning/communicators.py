"""Communicators: who may communicate with whom under which name, and in which order they are made."""

from __future__ import annotations

from typing import NamedTuple

from hybridpar.planning.blocks import positions
from hybridpar.planning.plan import Plan


class Communicator(NamedTuple):
    """A name that operations refer to."""

    name: str
    ranks: tuple[int, ...]
    """Members in a plan replica."""
    across: bool = False
    """One communicator of all replicas together; otherwise every replica has its own."""


def communicators(plan: Plan) -> tuple[Communicator, ...]:
    """Return the communicators that a rank of a plan replica knows.

    Exchanges have one communicator per pass and way (to a higher or a lower rank), so that between two ranks each
    carries messages one way only and their order is the program's.
    """
    replica, across = tuple(range(plan.replica_world)), plan.replicas > 1
    ways = [f"{direction}.{way}" for direction in ("forward", "backward") for way in ("up", "down")]
    result = [Communicator("control", replica, across), *(Communicator(way, replica) for way in ways)]
    for position in positions(plan):
        if position.sharded:
            result.append(Communicator("tail", position.ranks))
        if position.reduced:
            groups = {position.gradients(r): position.sharers(r) for r in position.ranks}
            result += [Communicator(name, ranks, across) for name, ranks in groups.items()]
        if position.meets:
            result.append(Communicator(position.moments, position.ranks, position.joint))
    return tuple(result)


def groups(plan: Plan) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Return the name and all members of every process group of a job, in the order in which all ranks make them.

    Members are numbered over all replicas. A rank is in at most one group of a name; there are none of one member.
    """
    result = []
    for name, ranks, across in communicators(plan):
        if across:
            result.append((name, plan.everywhere(ranks)))
        elif len(ranks) > 1:
            firsts = range(0, plan.world, plan.replica_world)
            result += [(name, tuple(first + r for r in ranks)) for first in firsts]
    return tuple(result)
