"""Placements: which ranks hold which stage, as starting points of the search."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from hybridpar.errors import PlanError
from hybridpar.planning.plan import Kind
from hybridpar.planning.request import Pin, Request

Groups = tuple[tuple[int, ...], ...]
"""Ranks of a stage, one tuple per segment."""


def placements(kinds: tuple[Kind, ...], world: int, request: Request) -> Iterator[tuple[Groups, ...]]:
    """Yield placements that use every rank and respect the pinned ranks and degrees.

    Stages share all ranks, or have ranks of their own at the end of the list (middle before tail), or overlap.

    Raises:
        PlanError: a pinned rank does not exist, or a pinned degree is above the number of ranks.
    """
    for kind in kinds:
        _check_pin(kind, request.pin(kind), world)
    if len(kinds) == 1:
        yield from ((groups,) for groups in _stage_options(kinds[0], world, request.pin(kinds[0]), alone=True))
        return
    seen = set()
    options = [list(_stage_options(kind, world, request.pin(kind), alone=False)) for kind in kinds]
    for choice in product(*options):
        used = {r for groups in choice for ranks in groups for r in ranks}
        if len(used) == world and choice not in seen and _enough(kinds, choice, world, request):
            seen.add(choice)
            yield choice


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


def _stage_options(kind: Kind, world: int, pin: Pin, *, alone: bool) -> Iterator[Groups]:
    if pin.ranks is not None:
        if kind != "middle":
            yield (pin.ranks,)
            return
        degree = pin.degree or len(pin.ranks)
        yield _groups(pin.ranks, degree)
        return
    everyone = tuple(range(world))
    if kind == "middle":
        yield from _middle_options(everyone, pin, alone=alone)
        return
    if alone and pin.degree is not None and pin.degree < world:
        raise PlanError(
            f"plan.{kind}.degree: {pin.degree} leaves {world - pin.degree} of the cluster's {world} ranks without "
            "work; use them all, another shape, or fewer devices"
        )
    sizes = [pin.degree] if pin.degree is not None else ([world] if alone else _sizes(world))
    for size in sizes:
        yield (everyone[:size],) if kind == "front" else (everyone[world - size :],)


def _sizes(world: int) -> list[int]:
    """Return all ranks, half of them, all but a few, and a few."""
    few = {max(world // 4, 1), max(world // 8, 1), 2, 1}
    return sorted(
        {world, max(world // 2, 1)} | {n for n in few if n <= world} | {world - n for n in few if n < world}
    )


def _middle_options(everyone: tuple[int, ...], pin: Pin, *, alone: bool) -> Iterator[Groups]:
    """Yield pipelines over all ranks (each segment on its share of them), and over a few ranks at either end."""
    world = len(everyone)
    degrees = (
        [pin.degree] if pin.degree is not None else sorted({d for d in (2, 3, 4, 8, world) if d <= world} or {1})
    )
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
            yield _groups(everyone[middle : middle + degree], degree)


def _groups(ranks: tuple[int, ...], degree: int) -> Groups:
    size = len(ranks) // degree
    return tuple(ranks[i * size : (i + 1) * size] for i in range(degree))


def _enough(kinds: tuple[Kind, ...], choice: tuple[Groups, ...], world: int, request: Request) -> bool:
    """Whether each of several stages is really parallel, as far as there are ranks: at least two of everything."""
    least = min(2, world)
    return all(
        request.pin(kind).degree is not None
        or request.pin(kind).ranks is not None
        or (len(groups) if kind == "middle" else len(groups[0])) >= least
        for kind, groups in zip(kinds, choice, strict=True)
    )
