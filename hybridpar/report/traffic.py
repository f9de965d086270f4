"""Bytes that a step sends, by sender and receiver, as the program says; interfaces count them too."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hybridpar.planning.costs import wire_bytes
from hybridpar.planning.program import Operation, Program

Flows = Mapping[tuple[int, int], float]
"""Bytes per step by sender and receiver, ranks of all plan replicas."""


def flows_of(programs: Sequence[Program]) -> Flows:
    """Return what a step sends; ``programs`` by plan replica.

    Collectives are rings, as :func:`hybridpar.planning.costs.wire_bytes` counts them: every participant sends an
    equal part of what leaves all of them to the next one, in the order of the ranks, which are numbered node by
    node. An operation across replicas is one of all of them, and counted once.
    """
    flows: dict[tuple[int, int], float] = defaultdict(float)
    for replica, program in enumerate(programs):
        for operation in program.operations:
            if operation.across and replica:
                continue
            ranks = _participants(program, operation, replica)
            if len(ranks) < 2:
                continue
            if operation.kind == "send":
                flows[ranks[0], ranks[1]] += operation.bytes
                continue
            ring = sorted(ranks)
            each = wire_bytes(operation, program.plan.replicas if operation.across else 1) / len(ring)
            for sender, receiver in zip(ring, [*ring[1:], ring[0]], strict=True):
                flows[sender, receiver] += each
    return flows


def _participants(program: Program, operation: Operation, replica: int) -> tuple[int, ...]:
    if operation.across:
        return program.plan.everywhere(operation.ranks)
    return tuple(replica * program.plan.replica_world + rank for rank in operation.ranks)


@dataclass(frozen=True)
class Crossing:
    """Bytes per step that the ranks of a host send each other, and to and from those of others."""

    inside: float = 0.0
    sent: float = 0.0
    received: float = 0.0


def crossings(flows: Flows, host_of: Mapping[int, str]) -> dict[str, Crossing]:
    """Return what crosses every host; ``host_of`` must know all ranks."""
    found = dict.fromkeys(host_of.values(), (0.0, 0.0, 0.0))
    for (sender, receiver), count in flows.items():
        source, target = host_of[sender], host_of[receiver]
        if source == target:
            found[source] = _plus(found[source], (count, 0.0, 0.0))
        else:
            found[source] = _plus(found[source], (0.0, count, 0.0))
            found[target] = _plus(found[target], (0.0, 0.0, count))
    return {host: Crossing(*sums) for host, sums in found.items()}


def _plus(a: tuple[float, float, float], b: tuple[float, float, float]) -> tuple[float, float, float]:
    return a[0] + b[0], a[1] + b[1], a[2] + b[2]
