"""Blocks: the runs of layers that a rank computes without any communication inside.

A segment is cut into blocks where something crosses the wire: at gradient buckets where its gradients are reduced,
at sums and gathers where it is sharded. The executor runs blocks without knowing kinds of stage.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import Literal, NamedTuple

from hybridpar.model.chain import Chain
from hybridpar.planning.layout import Interval, Layout, Piece, chunks, length, split
from hybridpar.planning.plan import Kind, Plan, Segment, Stage

State = Literal["full", "sharded", "partial"]
"""Of a value on the shards of a tail: every shard has all features, its slice, or a summand of all features."""


SideName = Literal["in", "out"]

Modes = tuple[Literal["column", "row"], ...]
"""Of a sharded tail: one entry per linear layer."""


class Bucket(NamedTuple):
    """From which size on gradients are reduced apart."""

    bytes: int
    itemsize: int


@dataclass(frozen=True)
class Span:
    """The slice of one layer that one shard computes, as intervals of the features of its input and output."""

    inputs: Interval
    outputs: Interval
    mode: Literal["column", "row", "slice"]
    """How a linear layer is cut; ``slice`` for a channelwise layer."""


@dataclass(frozen=True)
class Position:
    """One segment's place in the pipeline, counted over all stages."""

    index: int
    kind: Kind
    stage: int
    segment: int
    layers: Interval
    ranks: tuple[int, ...]
    weights: tuple[float, ...]
    micro_batch: int
    in_flight: int | None
    recompute: bool = False
    copies: int = 1
    """Plan replicas: how often each of the ranks has one of its kind that holds the same parameters."""
    synchronised: bool = False
    """Batch norms take their statistics over all samples of a chunk."""
    joint: bool = False
    """And over those of all plan replicas, of which each has its samples of a step in one chunk."""

    @property
    def sharded(self) -> bool:
        """Whether the ranks are shards; otherwise they are replicas."""
        return self.kind == "tail" and len(self.ranks) > 1

    @property
    def replicated(self) -> bool:
        """Whether several ranks of a plan replica hold the same parameters."""
        return self.kind != "tail" and len(self.ranks) > 1

    @property
    def reduced(self) -> bool:
        """Whether gradients have to be summed: over the ranks, over the plan replicas, or both."""
        return self.replicated or self.copies > 1

    @property
    def meets(self) -> bool:
        """Whether batch norms in training have ranks to meet."""
        return self.synchronised and not self.sharded and (self.replicated or self.joint)

    @property
    def moments(self) -> str:
        """The name of the communicator on which they do."""
        return f"moments:{self.name}"

    def sharers(self, rank: int) -> tuple[int, ...]:
        """Return the ranks of a plan replica whose gradients are summed with those of ``rank``."""
        return (rank,) if self.sharded else self.ranks

    def gradients(self, rank: int) -> str:
        """Return the name of the communicator that sums the gradients of ``rank``."""
        shard = f".{self.ranks.index(rank)}" if self.sharded else ""
        return f"gradients:{self.name}{shard}"

    @property
    def name(self) -> str:
        """``front``, ``middle.0``, ..., ``tail``."""
        return f"middle.{self.segment}" if self.kind == "middle" else self.kind

    def micro_batches(self, samples: int) -> tuple[tuple[Interval, ...], ...]:
        """Intervals of work numbers: one tuple per chunk, one entry per rank (the same for all shards)."""
        return micro_batches(self.kind, self.micro_batch, self.weights, samples)


@dataclass(frozen=True)
class Block:
    """A run of layers of one position that is computed in one go.

    ``enters`` and ``leaves`` say how the input and the output lie on the shards; a replica's are always full.
    ``spans`` has one entry per shard and layer; empty where nothing is sharded. A tail that ends in a row-sharded
    linear has a last block without layers, which stands for the loss: it takes the summed logits, one slice of the
    classes per shard. Its one span per shard is that slice. A block that is to ``recompute`` keeps its input only
    between forward and backward.
    """

    index: int
    position: int
    layers: Interval
    enters: State = "full"
    leaves: State = "full"
    spans: tuple[tuple[Span, ...], ...] = ()
    recompute: bool = False
    backward: bool = True
    """Whether a backward runs: this block, or one before it, has parameters to train."""
    answers: bool = True
    """Whether its backward gives the gradient of its input: a block before it has parameters to train."""
    sampled: float | None = None
    """Of a block that ends in a head whose classes are sampled: the share of them that is expected in a step."""

    def computed(self, chain: Chain, shard: int, layer: int) -> float:
        """Share of a layer's work that a shard does in a step: of a sampled head, with the expected classes."""
        is_head = self.sampled is not None and layer == self.layers[1] - 1
        return self.fraction(chain, shard, layer) * (self.sampled if self.sampled is not None and is_head else 1.0)

    def fraction(self, chain: Chain, shard: int, layer: int) -> float:
        """Share of a layer's work that a shard does."""
        if not self.spans:
            return 1.0
        span = self.spans[shard][layer - self.layers[0]]
        if span.mode == "column":
            return length(span.outputs) / chain.width(layer + 1)
        return length(span.inputs) / chain.width(layer)

    def by_rows(self, shard: int, layer: int) -> bool:
        """Whether a shard has some of a layer's input features and all of its outputs."""
        return bool(self.spans) and self.spans[shard][layer - self.layers[0]].mode == "row"

    def point(self, side: SideName) -> int:
        """Where in the chain the input or output is."""
        return self.layers[side == "out"]

    def trailing(self, chain: Chain, side: SideName) -> int:
        """Elements per sample and feature of the input or output."""
        point = self.point(side)
        return math.prod(chain.shape(point)) // chain.width(point)

    def out_last(self, chain: Chain) -> bool:
        """Whether the output and its gradient lie in memory with their channels last."""
        return chain.layers[self.layers[1] - 1].channels_last

    def out_itemsize(self, chain: Chain, itemsize: int) -> int:
        """Bytes per element of the output and its gradient, if parameters have ``itemsize``."""
        return chain.out_itemsize(self.layers[1] - 1, itemsize)

    def features(self, chain: Chain, shard: int, side: SideName) -> Interval:
        """Interval of the features that the shard's input or output covers."""
        state = self.enters if side == "in" else self.leaves
        if not self.spans or state != "sharded":
            return 0, chain.width(self.point(side))
        return self.spans[shard][0].inputs if side == "in" else self.spans[shard][-1].outputs


def micro_batches(
    kind: Kind, micro_batch: int, weights: tuple[float, ...], samples: int
) -> tuple[tuple[Interval, ...], ...]:
    """Return a position's intervals of work numbers, as ``Position.micro_batches`` does."""
    if kind == "tail":
        return tuple((chunk[0],) * len(weights) for chunk in chunks(samples, micro_batch, (1.0,)))
    return chunks(samples, micro_batch, weights)


def positions(plan: Plan) -> tuple[Position, ...]:
    """Return the plan's segments in pipeline order."""
    flat = [(i, j, stage, seg) for i, stage in enumerate(plan.stages) for j, seg in enumerate(stage.segments)]
    return tuple(
        Position(
            n,
            stage.kind,
            i,
            j,
            seg.layers,
            seg.ranks,
            seg.weights,
            stage.micro_batch,
            stage.in_flight,
            stage.recompute,
            plan.replicas,
            plan.recipe.synchronised,
            plan.recipe.synchronised and _joint(plan, stage, seg),
        )
        for n, (i, j, stage, seg) in enumerate(flat)
    )


def _joint(plan: Plan, stage: Stage, segment: Segment) -> bool:
    """Whether there are plan replicas, and each works on its samples of any step in one chunk of the segment."""
    if plan.replicas == 1:
        return False
    most = _most_samples(plan.global_batch, plan.replica_shares or (1.0,) * plan.replicas)
    return len(micro_batches(stage.kind, stage.micro_batch, segment.weights, most)) == 1


@lru_cache(maxsize=1024)
def _most_samples(samples: int, shares: tuple[float, ...]) -> int:
    """Return the most samples that a replica has in a step of at most ``samples``.

    Largest remainders may give more of fewer samples to one of unequal shares.
    """
    if len(set(shares)) == 1:
        return -(-samples // len(shares))
    return max(length(interval) for count in range(1, samples + 1) for interval in split(count, shares))


def blocks(plan: Plan, chain: Chain) -> tuple[Block, ...]:
    """Cut every position of the plan into blocks, in chain order."""
    result: list[Block] = []
    for position in positions(plan):
        for b in blocks_of(position, plan, chain):
            result.append(replace(b, index=len(result), position=position.index))
    return tuple(result)


def blocks_of(position: Position, plan: Plan, chain: Chain) -> tuple[Block, ...]:
    """Cut one position into blocks, numbered from 0 and at position 0."""
    stage = plan.stages[position.stage]
    least = Bucket(plan.bucket_bytes, plan.itemsize) if position.reduced else None
    if position.sharded:
        weights, recompute = position.weights, position.recompute
        cut = _sharded_cut(stage.sharding, position.layers, weights, chain, least, recompute)
    else:
        cut = _whole_cut(position.layers, chain, least, position.recompute)
    if plan.recipe.sampling is None or position.layers[1] < len(chain.layers):
        return cut
    return *cut[:-1], replace(cut[-1], sampled=expected_share(plan.recipe.sampling, plan.global_batch, chain))


def expected_share(share: float, samples: int, chain: Chain) -> float:
    """Return the share of the classes that is expected in a step of so many samples, if every label is another.

    All C classes but p of labels are drawn with probability q: ``(p + q (C - p)) / C``.
    """
    positive = min(1.0, samples * chain.labels / chain.classes)
    return positive + share * (1 - positive)


@lru_cache(maxsize=4096)
def _whole_cut(layers: Interval, chain: Chain, least: Bucket | None, recompute: bool) -> tuple[Block, ...]:
    """Cut at gradient buckets, if there are any."""
    cut = [layers] if least is None else _buckets(layers, chain, least)
    return tuple(_passed(Block(0, 0, own, recompute=recompute), chain) for own in cut)


@lru_cache(maxsize=4096)
def _sharded_cut(
    sharding: Modes,
    layers: Interval,
    weights: tuple[float, ...],
    chain: Chain,
    least: Bucket | None,
    recompute: bool,
) -> tuple[Block, ...]:
    """Cut where shards communicate, and at gradient buckets."""
    cut = _sharded_blocks(sharding, layers, weights, chain)
    if least is not None:
        cut = [part for whole in cut for part in _shard_buckets(whole, chain, least)]
    return tuple(_passed(replace(block, recompute=recompute), chain) for block in cut)


def _passed(block: Block, chain: Chain) -> Block:
    """Return a block that knows how far a backward goes through the chain."""
    first, last = block.layers
    return replace(block, backward=last > chain.first_trained, answers=first > chain.first_trained)


class Side(NamedTuple):
    """All that the layouts of a block's input or output depend on, apart from the samples."""

    kind: Kind
    ranks: tuple[int, ...]
    weights: tuple[float, ...]
    micro_batch: int
    features: tuple[Interval, ...]
    """Per rank."""
    partial: bool
    """The value is a summand on every rank."""
    gradient_partial: bool

    def layouts(self, samples: int) -> tuple[Layout, Layout]:
        """Return the layouts of the value and of its gradient for a step of ``samples``.

        The gradient of a full input is partial where each shard computed it from its own columns only; the
        gradient of an output is wanted complete.
        """
        pieces = []
        for micro_batch, intervals in enumerate(micro_batches(self.kind, self.micro_batch, self.weights, samples)):
            for rank, interval, features in zip(self.ranks, intervals, self.features, strict=True):
                if interval[1] > interval[0] and features[1] > features[0]:
                    pieces.append(Piece(rank, micro_batch, interval, features))
        value = Layout(tuple(pieces), partial=self.partial)
        return value, Layout(value.pieces, partial=self.gradient_partial)


def block_side(block: Block, position: Position, chain: Chain, side: SideName) -> Side:
    """Return one side of a block."""
    state = block.enters if side == "in" else block.leaves
    return Side(
        position.kind,
        position.ranks,
        position.weights,
        position.micro_batch,
        tuple(block.features(chain, i, side) for i in range(len(position.ranks))),
        state == "partial",
        side == "in" and position.sharded and state == "full",
    )


def _buckets(layers: Interval, chain: Chain, least: Bucket) -> list[Interval]:
    """Cut from the back, because the last layers' gradients are ready first."""
    cuts, size = [layers[1]], 0
    for i in range(layers[1] - 1, layers[0], -1):
        size += chain.trained[i] * least.itemsize
        if size >= least.bytes and any(chain.trained[layers[0] : i]):
            cuts.append(i)
            size = 0
    cuts.append(layers[0])
    return [(a, b) for b, a in pairwise(cuts)][::-1]


def _shard_buckets(block: Block, chain: Chain, least: Bucket) -> list[Block]:
    """Cut a block before its row-sharded linear, whose input lies in slices, if it is a bucket of its own."""
    first, last = block.layers
    for at in range(first + 1, last):
        before, behind = chain.trained[first:at], chain.trained[at:last]
        size = sum(behind) * least.itemsize // len(block.spans)
        large = size >= least.bytes and any(before)
        if large and block.spans[0][at - first].mode == "row":
            count = at - first
            return [
                replace(
                    block, layers=(first, at), leaves="sharded", spans=tuple(own[:count] for own in block.spans)
                ),
                replace(
                    block, layers=(at, last), enters="sharded", spans=tuple(own[count:] for own in block.spans)
                ),
            ]
    return [block]


def _sharded_blocks(sharding: Modes, layers: Interval, weights: tuple[float, ...], chain: Chain) -> list[Block]:
    """Walk the tail's layers and cut where the state of the value has to change.

    A row-sharded linear leaves summands: they are summed for a column-sharded successor (all-reduce), and summed
    and split for a row-sharded one or for the loss (reduce-scatter). A column-sharded linear that meets slices has
    them gathered first.
    """
    first, last = layers
    modes = iter(sharding)
    mode_of = {i: next(modes) for i in range(first, last) if chain.layers[i].linear}
    coming = list(sharding)
    state: State = "full" if coming[0] == "column" else "sharded"
    features = _feature_intervals(chain.width(first), weights, state)
    cut: list[Block] = []
    start, enters, spans = first, state, [[] for _ in weights]  # type: tuple[int, State, list[list[Span]]]

    def close(stop: int, leaves: State) -> None:
        nonlocal start, spans
        if stop > start:
            cut.append(Block(0, 0, (start, stop), enters, leaves, tuple(tuple(s) for s in spans)))
            start, spans = stop, [[] for _ in weights]

    for i in range(first, last):
        if mode_of.get(i) == "column" and state == "sharded":
            close(i, "sharded")
            enters = state = "full"
            features = _feature_intervals(chain.width(i), weights, state)
        outputs = _outputs((chain.width(i), chain.width(i + 1)), mode_of.get(i), features, weights)
        for shard, own in enumerate(spans):
            own.append(Span(features[shard], outputs[shard], mode_of.get(i, "slice")))
        features = outputs
        if i in mode_of:
            coming.pop(0)
        if mode_of.get(i) == "column":
            state = "sharded"
        elif mode_of.get(i) == "row":
            close(i + 1, "partial")
            enters = state = "full" if coming and coming[0] == "column" else "sharded"
            features = _feature_intervals(chain.width(i + 1), weights, state)
    close(last, state)
    if cut[-1].leaves == "partial":
        slices = tuple((Span(own, own, "slice"),) for own in features)
        cut.append(Block(0, 0, (last, last), "sharded", "sharded", slices))
    return cut


def _feature_intervals(width: int, weights: tuple[float, ...], state: State) -> list[Interval]:
    if state == "sharded":
        return list(split(width, weights))
    return [(0, width)] * len(weights)


def _outputs(
    widths: tuple[int, int], mode: str | None, features: list[Interval], weights: tuple[float, ...]
) -> list[Interval]:
    """Return what every shard gives of a layer with so many features before and behind it."""
    before, behind = widths
    if mode == "column":
        return list(split(behind, weights))
    if mode == "row":
        return [(0, behind)] * len(features)
    ratio = behind // before
    return [(a * ratio, b * ratio) for a, b in features]
