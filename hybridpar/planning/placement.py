"""Placements: which ranks of a plan replica hold which stage.

Two sets of them: families, the usual ones for any number of ranks, and every one there is up to the order of equal
ranks, for a few ranks. All use every rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations_with_replacement, pairwise, product

from hybridpar.errors import PlanError
from hybridpar.planning.plan import Kind
from hybridpar.planning.request import Pin, Request

Groups = tuple[tuple[int, ...], ...]
"""Ranks of a stage, one tuple per segment."""

LARGEST_REPLICA = 64
"""Ranks of the largest plan replica that is searched for, unless pins or the request want a larger one."""
ALL_SIZES, SOME_SIZES = 4, 16
"""Ranks of a replica up to which the families hold all, and some, of the sizes of :func:`_sizes`."""
LONGEST_PIPELINE = 16
"""Segments."""


@dataclass(frozen=True)
class Placement:
    """Plan replicas and, per stage, the ranks of the first replica's segments."""

    kinds: tuple[Kind, ...]
    replicas: int
    groups: tuple[Groups, ...]

    @property
    def world(self) -> int:
        """Ranks of one replica."""
        return 1 + max(r for groups in self.groups for ranks in groups for r in ranks)


def placements(kinds: tuple[Kind, ...], nodes: tuple[int, ...], request: Request) -> Iterator[Placement]:
    """Yield the placements of a shape on nodes with these numbers of ranks that respect the pins.

    Raises:
        PlanError: a pinned rank does not exist, or a pinned degree or number of replicas does not fit.
    """
    world = sum(nodes)
    for kind in kinds:
        _check_pin(kind, request.pin(kind), world)
    for replicas in replica_counts(nodes, request):
        size = world // replicas
        if request.space.placements == "every":
            choices = _every(kinds, _nodes_of_replica(nodes, size), request)
        else:
            choices = _families(kinds, size, request)
        for groups in choices:
            if kinds == ("front",) or _parallel(kinds, groups, min(2, world), request):
                yield Placement(kinds, replicas, groups)


def replica_counts(nodes: tuple[int, ...], request: Request) -> list[int]:
    """Return the numbers of plan replicas: those whose replicas fill nodes, or of which nodes hold a whole number.

    Pinned ranks are ranks of the cluster, and pinned degrees are counted over it, so both mean a single replica.
    """
    world = sum(nodes)
    if request.replicas is not None:
        if world % request.replicas:
            raise PlanError(
                f"plan.replicas: {request.replicas} does not divide the cluster's {world} ranks; give a divisor"
            )
        return [request.replicas]
    if any(
        pin.ranks is not None or pin.degree is not None or pin.shares is not None for pin in request.pins.values()
    ):
        return [1]
    allowed = request.space.replicas
    counts = [r for r in range(1, world + 1) if world % r == 0 and (allowed is None or r in allowed)]
    counts = [r for r in counts if r == 1 or (_aligned(nodes, world // r) and request.global_batch >= r)]
    small = [r for r in counts if world // r <= LARGEST_REPLICA]
    return small or counts[-1:]


def _aligned(nodes: tuple[int, ...], size: int) -> bool:
    return all(n % size == 0 for n in nodes) or (len(set(nodes)) == 1 and size % nodes[0] == 0)


def _nodes_of_replica(nodes: tuple[int, ...], size: int) -> tuple[int, ...]:
    """Return the ranks that the first replica has on each node."""
    own, left = [], size
    for n in nodes:
        own.append(min(n, left))
        left -= own[-1]
        if not left:
            break
    return tuple(own)


def _check_pin(kind: Kind, pin: Pin, world: int) -> None:
    if pin.ranks is not None:
        bad = [r for r in pin.ranks if not 0 <= r < world]
        if bad or not pin.ranks:
            raise PlanError(f"plan.{kind}.ranks: {list(pin.ranks)} must lie in 0..{world - 1}")
        if pin.degree is not None and kind != "middle" and len(pin.ranks) != pin.degree:
            raise PlanError(
                f"plan.{kind}.degree: {pin.degree} is not the number of pinned ranks {list(pin.ranks)}"
            )
        if pin.degree is not None and len(pin.ranks) % pin.degree:
            raise PlanError(f"plan.{kind}.degree: {pin.degree} does not divide the {len(pin.ranks)} pinned ranks")
    if pin.degree is not None and pin.degree > world:
        raise PlanError(
            f"plan.{kind}.degree: {pin.degree} is above the {world} ranks of the cluster; lower it or add devices"
        )


# Families


def _families(kinds: tuple[Kind, ...], world: int, request: Request) -> Iterator[tuple[Groups, ...]]:
    """Yield the usual placements: stages share all ranks, or have own ones at the end of the list, or overlap."""
    if len(kinds) == 1:
        yield from ((g,) for g in _stage_options(kinds[0], world, request, alone=True))
        return
    options = [list(dict.fromkeys(_stage_options(kind, world, request, alone=False))) for kind in kinds]
    for choice in product(*options):
        used = {r for groups in choice for ranks in groups for r in ranks}
        if len(used) == world:
            yield choice


def _stage_options(kind: Kind, world: int, request: Request, *, alone: bool) -> Iterator[Groups]:
    pin = request.pin(kind)
    if pin.ranks is not None:
        if kind != "middle":
            yield (pin.ranks,)
            return
        yield _groups(pin.ranks, pin.degree or len(pin.ranks))
        return
    everyone = tuple(range(world))
    if kind == "middle":
        yield from _middle_options(everyone, request, alone=alone)
        return
    if alone and pin.degree is not None and pin.degree < world:
        raise PlanError(
            f"plan.{kind}.degree: {pin.degree} leaves {world - pin.degree} of the cluster's {world} ranks without "
            "work; use them all, another shape, or fewer devices"
        )
    sizes = [world] if alone else _sizes(kind, world)
    if pin.degree is not None or pin.shares is not None:
        sizes = [pin.degree or len(pin.shares or ())]
    for size in sizes:
        yield (everyone[:size],) if kind == "front" else (everyone[world - size :],)


def _sizes(kind: Kind, world: int) -> list[int]:
    """Return all ranks, half of them, a few, and all but a few; of many ranks only those that tend to be good."""
    few = {1, 2, max(world // 4, 1), max(world // 8, 1)} if world <= ALL_SIZES else {2, world // 4}
    sizes = {world, max(world // 2, 1)}
    if world > SOME_SIZES:
        sizes = {world, world - world // 4} if kind == "front" else {world, world // 4, world // 8}
    elif kind == "tail" or world <= ALL_SIZES:
        sizes |= few
    if kind == "front" or world <= ALL_SIZES:
        sizes |= {world - n for n in few if n < world} if world <= SOME_SIZES else set()
    return sorted(size for size in sizes if 1 <= size <= world)


def _middle_options(everyone: tuple[int, ...], request: Request, *, alone: bool) -> Iterator[Groups]:
    """Yield pipelines over all ranks (each segment on its share of them), and over a few ranks at either end."""
    world, pin, allowed = len(everyone), request.pin("middle"), request.space.segments
    if pin.degree is not None:
        degrees = [pin.degree]
    else:
        most = {2, 3, 4, 8, world} if world <= ALL_SIZES or alone else {2, 4, 8} if world <= SOME_SIZES else {2, 4}
        usual = sorted({d for d in most if d <= min(world, LONGEST_PIPELINE)} or {1})
        degrees = [d for d in usual if allowed is None or d in allowed]
    if alone and pin.degree is not None and world % pin.degree:
        raise PlanError(
            f"plan.middle.degree: {pin.degree} segments cannot share the cluster's {world} ranks evenly; use a "
            "divisor of it, another shape, or fewer devices"
        )
    for degree in degrees:
        if world % degree == 0:
            yield _groups(everyone, degree)
        if not alone:
            yield _groups(everyone[:degree], degree)
            yield _groups(everyone[world - degree :], degree)
            middle = (world - degree) // 2
            if world <= ALL_SIZES:
                yield _groups(everyone[middle : middle + degree], degree)


def _groups(ranks: tuple[int, ...], degree: int) -> Groups:
    size = len(ranks) // degree
    return tuple(ranks[i * size : (i + 1) * size] for i in range(degree))


def _parallel(kinds: tuple[Kind, ...], choice: tuple[Groups, ...], least: int, request: Request) -> bool:
    """Whether each of several stages is really parallel: at least two of everything, as far as there are ranks."""
    return all(
        request.pin(kind).degree is not None
        or request.pin(kind).ranks is not None
        or (len(groups) if kind == "middle" else len(groups[0])) >= least
        for kind, groups in zip(kinds, choice, strict=True)
    )


# Every placement

Roles = tuple[int, ...]
"""The positions (segments, counted over all stages) that a rank holds; at least one."""


def _every(kinds: tuple[Kind, ...], nodes: tuple[int, ...], request: Request) -> Iterator[tuple[Groups, ...]]:
    """Yield every placement up to the order of a node's ranks and of equal nodes.

    A placement gives every rank a set of positions. Within a node the sets ascend from rank to rank, and so do
    the lists of sets of equal nodes.
    """
    world = sum(nodes)
    allowed = request.space.segments
    degrees = [d for d in range(1, world + 1) if allowed is None or d in allowed] if "middle" in kinds else [1]
    for degree in degrees:
        counts = [degree if kind == "middle" else 1 for kind in kinds]
        positions = range(sum(counts))
        roles = [tuple(p for p in positions if mask >> p & 1) for mask in range(1, 1 << len(positions))]
        roles.sort()
        per_node = [list(combinations_with_replacement(roles, n)) for n in nodes]
        for choice in product(*per_node):
            ordered = all(a <= b for a, b in pairwise(choice) if len(a) == len(b))
            held = [own for node in choice for own in node]
            ranks = [tuple(r for r, own in enumerate(held) if p in own) for p in positions]
            if not ordered or not all(ranks):
                continue
            groups, at = [], 0
            for count in counts:
                groups.append(tuple(ranks[at : at + count]))
                at += count
            yield tuple(groups)
