"""The plan: which layers run where, with what kind of parallelism and micro-batch size."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from hybridpar.errors import PlanError
from hybridpar.model.chain import Chain
from hybridpar.planning.compression import Compression
from hybridpar.planning.layout import Interval, chunks, length, split
from hybridpar.schema import digest, from_data, read_json, to_data

SCHEMA_VERSION = 1
ITEMSIZE = {"float32": 4, "float64": 8}
"""Bytes per element of the training precisions."""

Kind = Literal["front", "middle", "tail"]
Precision = Literal["float32", "float64"]
OrderRule = Literal["fill_drain", "one_forward_one_backward"]
OptimizerSharding = Literal["none", "zero1", "zero2"]
SHARDINGS: tuple[OptimizerSharding, ...] = ("none", "zero1", "zero2")
"""Each one needs less memory than those before it."""
KINDS: tuple[Kind, ...] = ("front", "middle", "tail")


@dataclass(frozen=True)
class Segment:
    """A run of neighbouring layers on some ranks.

    In the front and the middle the ranks are replicas and ``shares`` their relative numbers of samples; in the
    tail they are shards and ``shares`` their relative numbers of features. None means equal.
    """

    layers: Interval
    """Half-open interval of layer indices."""
    ranks: tuple[int, ...]
    shares: tuple[float, ...] | None = None

    @property
    def weights(self) -> tuple[float, ...]:
        """The shares, written out."""
        return self.shares or (1.0,) * len(self.ranks)


@dataclass(frozen=True)
class Stage:
    """A run of neighbouring layers with one kind of parallelism and one micro-batch size."""

    kind: Kind
    micro_batch: int
    """Samples in one forward call on one rank."""
    segments: tuple[Segment, ...]
    """One in the front and the tail, one per pipeline position in the middle."""
    sharding: tuple[Literal["column", "row"], ...] = ()
    """Of a tail with several ranks: one entry per linear layer."""
    in_flight: int | None = None
    """Most samples between forward and backward at any time; None: what the order rule gives."""
    recompute: bool = False
    """A forward keeps its input only, and runs again right before its backward."""

    @property
    def layers(self) -> Interval:
        """Half-open interval of layer indices."""
        return self.segments[0].layers[0], self.segments[-1].layers[1]

    @property
    def degree(self) -> int:
        """Replicas of the front, segments of the middle, shards of the tail."""
        return len(self.segments) if self.kind == "middle" else len(self.segments[0].ranks)

    @property
    def ranks(self) -> tuple[int, ...]:
        """All ranks that hold a part of the stage, ascending."""
        return tuple(sorted({r for s in self.segments for r in s.ranks}))


@dataclass(frozen=True)
class Recipe:
    """What the training asks of every step, as far as it changes the program or its cost."""

    clipping: bool = False
    """The update waits for one global gradient norm."""
    sharding: OptimizerSharding = "none"
    """Of the front and of replicated segments: optimizer state whole on every replica, or sharded by ZeRO stage 1,
    or by stage 2, which shards gradients too."""
    optimizer_states: int = 1
    """Tensors of a parameter's size that the optimizer keeps (SGD with momentum 1, AdamW 2)."""
    average: bool = False
    """Every rank keeps a moving average of the parameters that it trains."""
    scaling: bool = False
    """The gradients are those of a scaled loss; the update waits for their global norm, to see if it is finite."""
    compression: Compression | None = None
    """Of gradients that are summed over replicas; None: they are summed as they are."""
    synchronised: bool = False
    """Batch norms take their statistics over all replicas of a segment; the chain says which ones."""
    offload: bool = False
    """Sharded state lies in the host's memory, and is updated there."""
    sampling: float | None = None
    """Share of the head's classes, besides those of labels, that take part in a training step; None: all do."""

    @property
    def normed(self) -> bool:
        """Whether every update waits for the global norm of all gradients."""
        return self.clipping or self.scaling

    @property
    def first_step(self) -> int:
        """The first step of a training, from 0, that runs as planned; before it gradients are not compressed."""
        return 0 if self.compression is None else self.compression.first_step


@dataclass(frozen=True)
class StagePrediction:
    """Seconds of one step that the busiest rank of a stage computes for it."""

    kind: Kind
    forward_s: float
    backward_s: float
    update_s: float


@dataclass(frozen=True)
class Prediction:
    """What the simulation of the plan's program says."""

    step_s: float
    samples_per_s: float
    bubble: float
    """Share of the ranks' time in which they neither compute nor update."""
    wire_bytes: int
    """Bytes that leave any rank in one step."""
    memory_bytes: tuple[int, ...]
    """Peak per rank of a plan replica, of the one with the most samples."""
    stages: tuple[StagePrediction, ...]
    source: Literal["measured", "estimated"]
    """Of the profile behind it."""


@dataclass(frozen=True)
class Plan:
    """Everything that decides what runs where. Compiled into a program, simulated and executed.

    The stages stand on ranks 0..w-1 of one plan replica; replica k has them on ranks k w..(k + 1) w - 1. Replicas
    share out the samples of every step, and sum their gradients.
    """

    model: str
    chain: str
    """Fingerprint of the chain."""
    world: int
    """All ranks, of all replicas."""
    global_batch: int
    """Samples per optimizer step, of all replicas."""
    precision: Precision
    stages: tuple[Stage, ...]
    order: OrderRule = "one_forward_one_backward"
    bucket_bytes: int = 8 * 2**20
    """Gradients of a replicated segment are reduced in runs of layers of at least this size."""
    recipe: Recipe = field(default_factory=Recipe)
    replicas: int = 1
    """How often the whole plan stands side by side."""
    replica_shares: tuple[float, ...] | None = None
    """Relative numbers of samples of the replicas; None means equal."""
    prediction: Prediction | None = None
    schema: int = SCHEMA_VERSION

    @property
    def itemsize(self) -> int:
        """Bytes per floating element."""
        return ITEMSIZE[self.precision]

    @property
    def reduces(self) -> bool:
        """Whether gradients are summed over ranks, in buckets."""
        segments = (s for stage in self.stages if stage.kind != "tail" for s in stage.segments)
        return self.replicas > 1 or any(len(s.ranks) > 1 for s in segments)

    @property
    def replica_world(self) -> int:
        """Ranks of one replica."""
        return self.world // self.replicas

    def replica_samples(self, samples: int) -> tuple[Interval, ...]:
        """Return which samples of a step of ``samples`` each replica works on; few may leave some without."""
        return split(samples, self.replica_shares or (1.0,) * self.replicas)

    @property
    def replica_batch(self) -> int:
        """Samples of a full step on the replica that has the most."""
        return max(length(i) for i in self.replica_samples(self.global_batch))

    def locate(self, rank: int) -> tuple[int, int]:
        """Return the replica of one of all ranks, and its number within the replica."""
        return divmod(rank, self.replica_world)

    def everywhere(self, ranks: tuple[int, ...]) -> tuple[int, ...]:
        """Return the ranks of all replicas that stand where ``ranks`` do in one."""
        return tuple(k * self.replica_world + r for k in range(self.replicas) for r in ranks)

    def stage(self, kind: Kind) -> Stage | None:
        """Return the stage of a kind, or None where it is empty."""
        return next((s for s in self.stages if s.kind == kind), None)

    @property
    def fingerprint(self) -> str:
        """12 hexadecimal digits, equal for plans that put the same work on the same ranks.

        Whatever is predicted of them.
        """
        return digest(replace(self, prediction=None))

    def save(self, path: Path) -> None:
        """Write the plan as JSON."""
        path.write_text(self.to_json() + "\n")

    def to_json(self) -> str:
        """Return the plan as JSON text."""
        return json.dumps(to_data(self), indent=2)

    @staticmethod
    def load(path: Path, chain: Chain) -> Plan:
        """Read and validate a plan; raises PlanError naming the field."""
        plan = read_json(Plan, path, PlanError)
        validate(plan, chain)
        return plan

    @staticmethod
    def from_data(data: object, chain: Chain) -> Plan:
        """Build and validate a plan from plain data; raises PlanError naming the field."""
        plan = from_data(Plan, data, "plan", PlanError)
        validate(plan, chain)
        return plan


def validate(plan: Plan, chain: Chain) -> None:
    """Raise PlanError, naming the field, its value and the remedy, unless the plan can run the chain."""
    _require(plan.schema == SCHEMA_VERSION, "schema", plan.schema, f"must be {SCHEMA_VERSION}; plan again")
    _require(
        plan.chain == chain.fingerprint,
        "chain",
        plan.chain,
        f"belongs to another model or input size than {chain.model} ({chain.fingerprint}); plan again",
    )
    _require(plan.global_batch >= 1, "global_batch", plan.global_batch, "must be at least 1")
    _require(plan.world >= 1, "world", plan.world, "must be at least 1")
    _require(plan.bucket_bytes >= 1, "bucket_bytes", plan.bucket_bytes, "must be at least 1")
    validate_recipe(plan.recipe, plan.precision)
    _require(
        plan.recipe.synchronised == chain.synchronised,
        "recipe.synchronised",
        plan.recipe.synchronised,
        f"but the model's batch norms are {'' if chain.synchronised else 'not '}synchronised; plan again",
    )
    _validate_replicas(plan)
    _validate_sampling(plan, chain)
    _require(bool(plan.stages), "stages", plan.stages, "must not be empty")
    kinds = [s.kind for s in plan.stages]
    _require(kinds == sorted(set(kinds), key=KINDS.index), "stages", kinds, "must be front, middle, tail in order")
    at = 0
    for stage in plan.stages:
        _validate_stage(plan, stage, chain)
        for i, segment in enumerate(stage.segments):
            where = f"{stage.kind}.segments[{i}].layers"
            contiguous = segment.layers[0] == at and segment.layers[1] > at
            _require(contiguous, where, segment.layers, f"must start at layer {at} and hold at least one layer")
            at = segment.layers[1]
    _require(at == len(chain.layers), "stages", at, f"must end at layer {len(chain.layers)}, the model's last")
    unused = set(range(plan.replica_world)) - {r for s in plan.stages for r in s.ranks}
    _require(
        not unused,
        "stages",
        sorted(unused),
        "are ranks without any stage; place a stage there, or lower the world",
    )
    _validate_ties(plan, chain)
    shared = [s for stage in plan.stages if stage.kind != "tail" for s in stage.segments]
    _require(
        not plan.recipe.offload or plan.replicas > 1 or any(len(s.ranks) > 1 for s in shared),
        "recipe.offload",
        plan.recipe.offload,
        "moves nothing, as no stage of the plan is replicated; set optimizer.offload=false",
    )
    predicted = plan.prediction
    if predicted is not None:
        fits = len(predicted.stages) == len(plan.stages) and len(predicted.memory_bytes) == plan.replica_world
        _require(
            fits, "prediction", "its stages or ranks", "are not the plan's; remove the field, it is made anew"
        )


def validate_recipe(recipe: Recipe, precision: Precision) -> None:
    """Raise PlanError, naming the field, for demands on a step that are impossible or exclude each other."""
    if recipe.compression is not None:
        _validate_compression(recipe.compression, recipe)
    fits = recipe.sampling is None or 0 < recipe.sampling <= 1
    _require(fits, "recipe.sampling", recipe.sampling, "must be above 0 and at most 1; set loss.sampled so")
    if recipe.sharding == "none":
        _require(
            not recipe.offload,
            "recipe.offload",
            recipe.offload,
            "is of sharded optimizer state only; set optimizer.sharding=zero1 or zero2, or offload=false",
        )
        return
    _require(
        precision == "float32",
        "recipe.sharding",
        recipe.sharding,
        f"keeps float32 state, but the precision is {precision}; "
        "set train.precision=float32 or optimizer.sharding=none",
    )


def _validate_compression(compression: Compression, recipe: Recipe) -> None:
    where = "recipe.compression"
    _require(compression.rank >= 1, f"{where}.rank", compression.rank, "must be at least 1")
    _require(compression.warmup_steps >= 0, f"{where}.warmup_steps", compression.warmup_steps, "must be 0 or more")
    positive = 0 < compression.min_rate < math.inf
    _require(positive, f"{where}.min_rate", compression.min_rate, "must be above 0")
    _require(
        recipe.sharding == "none",
        where,
        compression.method,
        f"does not work with sharding={recipe.sharding}, which sums gradients to parts of them; "
        "set optimizer.compression=none or optimizer.sharding=none",
    )


def _validate_replicas(plan: Plan) -> None:
    count, shares = plan.replicas, plan.replica_shares
    _require(count >= 1, "replicas", count, "must be at least 1")
    _require(
        plan.world % count == 0,
        "replicas",
        count,
        f"do not share out the {plan.world} ranks evenly; set world to a multiple of it",
    )
    if shares is not None:
        fits = len(shares) == count and all(0 < s < math.inf for s in shares)
        _require(fits, "replica_shares", shares, f"must be {count} positive numbers, one per replica")
    fewest = min(length(i) for i in plan.replica_samples(plan.global_batch))
    _require(
        fewest >= 1,
        "replicas",
        count,
        f"leave a replica without any of the global batch's {plan.global_batch} samples; "
        "raise the global batch, or use fewer replicas or more even shares",
    )


def _require(condition: bool, name: str, value: object, remedy: str) -> None:
    if not condition:
        raise PlanError(f"plan.{name}: {value} {remedy}")


def _validate_stage(plan: Plan, stage: Stage, chain: Chain) -> None:
    name = stage.kind
    _require(bool(stage.segments), f"{name}.segments", stage.segments, "must not be empty")
    if name != "middle":
        _require(len(stage.segments) == 1, f"{name}.segments", len(stage.segments), "must be one segment")
    for i, segment in enumerate(stage.segments):
        where = f"{name}.segments[{i}]" if name == "middle" else name
        ranks = segment.ranks
        _require(bool(ranks), f"{where}.ranks", ranks, "must not be empty")
        _require(len(set(ranks)) == len(ranks), f"{where}.ranks", list(ranks), "names a rank twice")
        inside = all(0 <= r < plan.replica_world for r in ranks)
        _require(inside, f"{where}.ranks", list(ranks), f"must lie in 0..{plan.replica_world - 1}")
        if segment.shares is not None:
            fits = len(segment.shares) == len(ranks) and all(0 < s < math.inf for s in segment.shares)
            _require(
                fits, f"{where}.shares", segment.shares, f"must be {len(ranks)} positive numbers, one per rank"
            )
        _validate_micro_batch(plan, stage, segment, where)
    if stage.in_flight is not None:
        _require(stage.in_flight >= 1, f"{name}.in_flight", stage.in_flight, "must be at least 1 sample")
    if stage.recompute:
        unkeyed = [layer.name for layer in chain.layers[slice(*stage.layers)] if layer.random == "unkeyed"]
        _require(
            not unkeyed,
            f"{name}.recompute",
            stage.recompute,
            f"would draw other random numbers the second time in layers {', '.join(unkeyed)}; set it to false",
        )
    if name == "tail":
        _validate_tail(stage, chain)
    else:
        _require(not stage.sharding, f"{name}.sharding", stage.sharding, "belongs to the tail only")


def _validate_micro_batch(plan: Plan, stage: Stage, segment: Segment, where: str) -> None:
    size = stage.micro_batch
    _require(size >= 1, f"{stage.kind}.micro_batch", size, "must be at least 1 sample")
    batch = plan.replica_batch
    if stage.kind == "tail":
        share = batch
    else:
        share = max(length(i) for i in chunks(batch, batch, segment.weights)[0])
        share = -(-batch // len(segment.ranks)) if segment.shares is None else share
    _require(
        size <= share,
        f"{where}.micro_batch",
        size,
        f"is above the {share} samples of one rank's share of the global batch {plan.global_batch}",
    )


def _validate_tail(stage: Stage, chain: Chain) -> None:
    first, last = stage.layers
    shards = len(stage.segments[0].ranks)
    if shards == 1:
        _require(not stage.sharding, "tail.sharding", stage.sharding, "needs a tail of several ranks")
        return
    _require(
        first >= chain.tail_start,
        "tail.layers",
        stage.layers,
        f"must start at layer {chain.tail_start} or later, from where on {chain.model} can be tensor-parallel",
    )
    linears = [layer for layer in chain.layers[first:last] if layer.linear]
    _require(
        len(stage.sharding) == len(linears),
        "tail.sharding",
        stage.sharding,
        f"must have {len(linears)} entries, column or row for each linear layer",
    )
    for layer, mode in zip(linears, stage.sharding, strict=True):
        _require(
            mode == "column" or layer.linear is None or not layer.linear.normalized,
            "tail.sharding",
            list(stage.sharding),
            f"gives {layer.name} rows, which it cannot have: it normalises over all features; use column there",
        )
    widths = [(f"entering layer {chain.layers[first].name}", chain.width(first))]
    for layer in linears:
        if layer.linear is not None:
            widths.append((f"of layer {layer.name}", layer.linear.out_features))
            widths.append((f"entering layer {layer.name}", layer.linear.in_features))
    for what, width in widths:
        empty = [i for i, part in enumerate(split(width, stage.segments[0].weights)) if not length(part)]
        _require(
            not empty,
            "tail.ranks",
            f"{shards} shards",
            f"leave shard {empty[:1]} none of the {width} features {what}; use fewer ranks or more even shares",
        )


def _validate_sampling(plan: Plan, chain: Chain) -> None:
    """Sampled classes are rows of a linear layer at the end, each held by one rank."""
    share, head = plan.recipe.sampling, chain.layers[-1]
    if share is None:
        return
    where, remedy = "recipe.sampling", "set loss.sampled=null"
    _require(
        chain.gathered[-1] > 0,
        where,
        share,
        f"takes classes of a linear layer at the end that is trained and not tied, but {chain.model} ends in "
        f"{head.name} ({head.kind}); {remedy}",
    )
    last = plan.stages[-1]
    _require(
        plan.replicas == 1 and (last.kind == "tail" or len(last.segments[-1].ranks) == 1),
        where,
        share,
        f"does not work with a head that several ranks hold; have a tail, in one plan replica, or {remedy}",
    )
    by_rows = last.sharding[-1:] == ("row",)
    _require(not by_rows, where, share, f"needs column, not row, for {head.name}; or {remedy}")


def _validate_ties(plan: Plan, chain: Chain) -> None:
    """Layers that share a parameter must lie in one segment, and not in a sharded one, whose slices differ."""
    places = [(stage, segment) for stage in plan.stages for segment in stage.segments]
    for parameter, layers in chain.tied:
        names = f"layers {', '.join(chain.layers[i].name for i in layers)}"
        homes = {
            number
            for number, (_, segment) in enumerate(places)
            for i in layers
            if segment.layers[0] <= i < segment.layers[1]
        }
        remedy = f"share parameter {parameter} and must lie in one segment; move the cut"
        _require(len(homes) == 1, "stages", names, remedy)
        stage, segment = places[homes.pop()]
        sharded = stage.kind == "tail" and len(segment.ranks) > 1
        remedy = (
            f"share parameter {parameter}, which a tail of several shards cannot hold; move the cut behind them"
        )
        _require(not sharded, "tail.layers", names, remedy)
