"""Placements: which ranks of a plan replica hold which stage.

Two sets of them: families, the usual ones for any number of ranks, and every one there is up to the order of equal
ranks, for a few ranks. All use every rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate, combinations_with_replacement, groupby, pairwise, product

from hybridpar.cluster.topology import Cluster
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

    @property
    def reduces(self) -> bool:
        """As a plan's."""
        pairs = zip(self.kinds, self.groups, strict=True)
        return self.replicas > 1 or any(len(r) > 1 for kind, groups in pairs if kind != "tail" for r in groups)

    @property
    def shares_head(self) -> bool:
        """Whether several ranks hold the last layer's parameters."""
        return self.replicas > 1 or (self.kinds[-1] != "tail" and len(self.groups[-1][-1]) > 1)


def placements(kinds: tuple[Kind, ...], cluster: Cluster, request: Request) -> Iterator[Placement]:
    """Yield the placements of a shape on a cluster that respect the pins.

    Raises:
        PlanError: a pinned rank does not exist, or a pinned degree or number of replicas does not fit.
    """
    world, nodes = cluster.world, tuple(n.devices for n in cluster.nodes)
    for kind in kinds:
        _check_pin(kind, request.pin(kind), world)
    counts = replica_counts(nodes, request)
    if kinds == ("front",) and request.space.placements == "families":
        counts = [_plainest(counts, world)]
    for replicas in counts:
        size = world // replicas
        if request.space.placements == "every":
            choices = _every(kinds, cluster, size, request)
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


def _plainest(counts: list[int], world: int) -> int:
    """Return the number of plan replicas for plain data parallelism, which are all the same to its time.

    One, or of many ranks as many as leave replicas of a few, which are simulated sooner.
    """
    return next(r for r in counts if world // r <= SOME_SIZES or r == counts[-1])


def _aligned(nodes: tuple[int, ...], size: int) -> bool:
    return all(n % size == 0 for n in nodes) or (len(set(nodes)) == 1 and size % nodes[0] == 0)


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
Mark = tuple[object, ...]
"""What tells a rank, or a node, from others: those with the same one can change places."""


def _every(kinds: tuple[Kind, ...], cluster: Cluster, size: int, request: Request) -> Iterator[tuple[Groups, ...]]:
    """Yield every placement up to the order of a node's equal ranks and of equal nodes.

    A placement gives every rank a set of positions. Of equal ranks of a node the sets ascend from rank to rank,
    and of equal nodes the lists of sets.
    """
    marks = _marks(cluster, size, any(_tells_ranks(request.pin(kind)) for kind in kinds))
    ordered = sorted(range(size), key=lambda r: (cluster.node_of[r], -_speed(cluster, size, r), r))
    degrees: Iterable[int] = request.space.segments or range(1, size + 1)
    pin = request.pin("middle")
    if pin.degree is not None or pin.ranks is not None:
        degrees = [pin.degree or len(pin.ranks or ())]
    for degree in degrees if "middle" in kinds else [1]:
        counts = [degree if kind == "middle" else 1 for kind in kinds]
        wanted = _wanted_groups(kinds, degree, request)
        positions = range(sum(counts))
        roles = sorted(tuple(p for p in positions if mask >> p & 1) for mask in range(1, 1 << len(positions)))
        options = [[o for o in roles if _respects(o, r, wanted)] for r in range(size)]
        per_node = [list(_assignments(own, [options[r] for r in ranks])) for ranks, own, _ in marks]
        for choice in product(*per_node):
            held = [own for node in choice for own in node]
            ranks = [tuple(r for r in ordered if p in held[r]) for p in positions]
            if not all(ranks) or not _ascend(choice, [mark for _, _, mark in marks]):
                continue
            ends = list(accumulate(counts, initial=0))
            groups = tuple(
                tuple(wanted[p] or ranks[p] for p in range(start, stop)) for start, stop in pairwise(ends)
            )
            if all(_has_degree(kind, own, request.pin(kind)) for kind, own in zip(kinds, groups, strict=True)):
                yield groups


def _speed(cluster: Cluster, size: int, rank: int) -> float:
    """Return the speed of the slowest device of a replica's rank."""
    return min(cluster.speed(r) for r in range(rank, cluster.world, size))


def _tells_ranks(pin: Pin) -> bool:
    return pin.ranks is not None or pin.shares is not None


def _marks(cluster: Cluster, size: int, pinned: bool) -> list[tuple[tuple[int, ...], tuple[Mark, ...], Mark]]:
    """Return, per node of a replica, its ranks, their marks and its own.

    Equal ranks have the same speed and memory in every replica. A link that is slower in one direction, or a pin
    that names ranks, tells all of them apart.
    """
    directed = {
        level
        for level, link in cluster.links.items()
        if any(link.time(payload) != link.time(payload, reverse=True) for payload in (0, 1))
    }

    def mark(rank: int) -> Mark:
        copies = range(rank, cluster.world, size)
        own = tuple((cluster.speed(r), cluster.memory_bytes(r)) for r in copies)
        return (own, rank) if pinned or "node" in directed else (own,)

    result = []
    for _, same in groupby(range(size), key=lambda r: cluster.node_of[r]):
        ranks = tuple(same)
        nodes = [cluster.nodes[cluster.node_of[r]] for r in range(ranks[0], cluster.world, size)]
        own = tuple(mark(r) for r in ranks)
        place: Mark = (own, *((n.cores, n.rack, n.site) for n in nodes))
        result.append((ranks, own, (*place, ranks[0]) if directed else place))
    return result


def _wanted_groups(kinds: tuple[Kind, ...], degree: int, request: Request) -> list[tuple[int, ...] | None]:
    """Return the pinned ranks of every position."""
    wanted: list[tuple[int, ...] | None] = []
    for kind in kinds:
        ranks, count = request.pin(kind).ranks, degree if kind == "middle" else 1
        wanted += [None] * count if ranks is None else _groups(ranks, count)
    return wanted


def _respects(roles: Roles, rank: int, wanted: list[tuple[int, ...] | None]) -> bool:
    """Whether a rank holds the positions that are pinned to it, and no other pinned ones."""
    return all(ranks is None or (rank in ranks) == (p in roles) for p, ranks in enumerate(wanted))


def _has_degree(kind: Kind, groups: Groups, pin: Pin) -> bool:
    """Whether the front's or the tail's ranks are as many as is pinned."""
    degree = pin.degree or len(pin.shares or ()) or None
    return kind == "middle" or degree is None or len(groups[0]) == degree


def _assignments(marks: tuple[Mark, ...], options: list[list[Roles]]) -> Iterator[tuple[Roles, ...]]:
    """Yield one set of positions per rank of a node, ascending among equal ranks."""
    same: dict[Mark, list[int]] = {}
    for i, mark in enumerate(marks):
        same.setdefault(mark, []).append(i)
    order = [i for own in same.values() for i in own]
    for choice in product(*(combinations_with_replacement(options[own[0]], len(own)) for own in same.values())):
        held = dict(zip(order, (roles for own in choice for roles in own), strict=True))
        yield tuple(held[i] for i in range(len(marks)))


def _ascend(choice: tuple[tuple[Roles, ...], ...], marks: list[Mark]) -> bool:
    """Whether the lists of sets of equal nodes ascend."""
    last: dict[Mark, tuple[Roles, ...]] = {}
    for own, mark in zip(choice, marks, strict=True):
        if own < last.get(mark, own):
            return False
        last[mark] = own
    return True
