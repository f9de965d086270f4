"""Pinned choices: which shapes they leave, and whether anything can respect them."""

from __future__ import annotations

import math

from hybridpar.cluster.topology import Cluster
from hybridpar.errors import PlanError
from hybridpar.model.chain import Chain
from hybridpar.planning.plan import Kind
from hybridpar.planning.request import SHAPES, STAGES_OF, Pin, Request, Shape


def wanted(request: Request) -> tuple[Shape, ...]:
    """Return the shapes to choose from: the one that was asked for, or all that have the pinned stages."""
    if request.shape != "auto":
        return (request.shape,)
    return tuple(s for s in SHAPES if _pinned(request) <= set(STAGES_OF[s]))


def _pinned(request: Request) -> set[Kind]:
    return {kind for kind, pin in request.pins.items() if pin != Pin()}


def check_pins(request: Request, chain: Chain) -> None:
    """Raise PlanError for pins that no placement could respect."""
    for kind, pin in request.pins.items():
        if kind in _pinned(request) and request.shape != "auto" and kind not in STAGES_OF[request.shape]:
            raise PlanError(
                f"plan.{kind}: shape {request.shape} has no {kind}; drop the override or use plan=three_stage"
            )
        if pin.shares is not None and kind == "middle":
            raise PlanError(
                f"plan.middle.shares: {list(pin.shares)} cannot be pinned, since the replicas of a segment share "
                "its samples evenly; drop it, or give shares of the front or the tail"
            )
        if pin.shares is not None and not all(0 < share < math.inf for share in pin.shares):
            raise PlanError(
                f"plan.{kind}.shares: {pin.shares} must be {len(pin.shares)} positive numbers, one per rank"
            )
        if pin.sharding is not None and kind != "tail":
            raise PlanError(f"plan.{kind}.sharding: {list(pin.sharding)} belongs to the tail only; drop it")
        if pin.in_flight is not None and pin.in_flight < 1:
            raise PlanError(f"plan.{kind}.in_flight: {pin.in_flight} is below 1; give a number of samples")
        last = len(chain.layers)
        if pin.layers is not None and not 0 <= pin.layers[0] < pin.layers[1] <= last:
            raise PlanError(
                f"plan.{kind}.layers: {list(pin.layers)} is no run of layers of {chain.model}; "
                f"give [first,end] with 0 <= first < end <= {last}"
            )


def check_replicas(request: Request, cluster: Cluster) -> None:
    """Raise PlanError for a number of plan replicas that ranks, samples or pins do not go with."""
    count, world = request.replicas or 1, cluster.world
    if count == 1:
        return
    if world % count:
        raise PlanError(
            f"plan.replicas: {count} does not divide the {world} ranks of cluster {cluster.name}; give a divisor"
        )
    if count > request.global_batch:
        raise PlanError(
            f"plan.replicas: {count} replicas cannot share out a global batch of {request.global_batch}; "
            "raise train.global_batch, or use fewer replicas"
        )
    size = world // count
    for kind, pin in request.pins.items():
        if (pin.degree or 1) > size or max(pin.ranks or (0,)) >= size:
            field, value = ("ranks", list(pin.ranks)) if pin.ranks else ("degree", pin.degree)
            raise PlanError(
                f"plan.{kind}.{field}: {value} does not fit the ranks 0..{size - 1} of one of the {count} "
                "plan replicas; lower it, or plan.replicas"
            )


def check_layers(request: Request, chain: Chain, kinds: tuple[Kind, ...]) -> None:
    """Raise PlanError where pinned layers leave a gap, overlap, or miss an end of the chain."""
    last = len(chain.layers)
    edges: dict[int, tuple[int, str]] = {0: (0, "the first layer"), len(kinds): (last, "the last layer")}
    tail = request.pin("tail")
    sharded = tail.degree != 1 and len(tail.ranks or (0, 1)) > 1
    if "tail" in kinds and sharded and tail.layers and tail.layers[0] < chain.tail_start:
        raise PlanError(
            f"plan.tail.layers: {list(tail.layers)} must start at layer {chain.tail_start} or later, "
            f"from where on {chain.model} can be tensor-parallel"
        )
    for i, kind in enumerate(kinds):
        pinned = request.pin(kind).layers
        for edge, at in ((i, pinned[0]), (i + 1, pinned[1])) if pinned else ():
            known, what = edges.setdefault(edge, (at, f"plan.{kind}.layers"))
            if known != at:
                side = "start" if edge == i else "end"
                raise PlanError(
                    f"plan.{kind}.layers: {list(pinned or ())} must {side} at {known}, as {what} does; change it"
                )
            if not edge <= at <= last - len(kinds) + edge:
                others = ", ".join(k for k in kinds if k != kind)
                raise PlanError(f"plan.{kind}.layers: {list(pinned or ())} leaves no layer for every {others}")
