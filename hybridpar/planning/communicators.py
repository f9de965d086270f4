"""Communicators: who may communicate with whom under which name, and in which order they are made."""

from __future__ import annotations

from itertools import pairwise
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


def connections(plan: Plan) -> tuple[tuple[int, int], ...]:
    """Return the pairs of ranks of a plan replica of which the first may send to the second in a forward.

    In a backward it is the other way round. Ranks of neighbouring positions, and the shards of one.
    """
    places = positions(plan)
    beside = [*pairwise(places), *((p, p) for p in places if p.sharded)]
    return tuple(sorted({(a, b) for p, q in beside for a in p.ranks for b in q.ranks if a != b}))


def communicators(plan: Plan) -> tuple[Communicator, ...]:
    """Return the communicators that a rank of a plan replica knows.

    Exchanges have one communicator per pass and way (to a higher or a lower rank) that anything goes, so that
    between two ranks each carries messages one way only and their order is the program's.
    """
    replica, across = tuple(range(plan.replica_world)), plan.replicas > 1
    ups = {source < target for source, target in connections(plan)}
    ways = [(f"forward.{way}", way == "up") for way in ("up", "down")]
    ways += [(f"backward.{way}", way == "down") for way in ("up", "down")]
    result = [Communicator("control", replica, across)]
    result += [Communicator(name, replica) for name, up in ways if up in ups]
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
