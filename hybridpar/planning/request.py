"""What the user asks of the planner, and the space that it searches."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from hybridpar.errors import PlanError
from hybridpar.planning.layout import Interval
from hybridpar.planning.plan import Kind, OptimizerSharding, OrderRule, Precision, Recipe

Shape = Literal["auto", "three_stage", "data_parallel", "pipeline", "front_tail"]
SHAPES: tuple[Shape, ...] = ("data_parallel", "pipeline", "front_tail", "three_stage")
"""What ``auto`` chooses from."""

STAGES_OF: dict[Shape, tuple[Kind, ...]] = {
    "data_parallel": ("front",),
    "pipeline": ("middle",),
    "front_tail": ("front", "tail"),
    "three_stage": ("front", "middle", "tail"),
}
BUCKET_BYTES = tuple(2**k * 2**20 for k in range(9))
"""Sizes of gradient buckets to choose from: 1 to 256 MiB."""
USUAL_BUCKET_BYTES = 8 * 2**20
"""The size that a search begins with."""
Mode = Literal["column", "row"]
Effort = Literal["quick", "normal", "long", "exact"]


@dataclass(frozen=True)
class Pin:
    """Fields of a stage that the user fixes; None leaves the choice to the planner."""

    layers: Interval | None = None
    """Half-open interval of layer indices."""
    degree: int | None = None
    """Replicas of the front, segments of the middle, shards of the tail."""
    ranks: tuple[int, ...] | None = None
    """Of the middle: segment by segment, replicas of a segment next to each other."""
    micro_batch: int | None = None
    shares: tuple[float, ...] | None = None
    """Relative samples per replica (front), relative features per shard (tail)."""
    sharding: tuple[Mode, ...] | None = None
    """Of the tail: one entry per linear layer."""
    in_flight: int | None = None
    recompute: bool | None = None

    def __post_init__(self) -> None:
        if self.degree is not None and self.degree < 1:
            raise PlanError(f"degree: {self.degree} is below 1; a stage needs at least one rank")
        if self.micro_batch is not None and self.micro_batch < 1:
            raise PlanError(f"micro_batch: {self.micro_batch} is below 1; give a number of samples")


@dataclass(frozen=True)
class Space:
    """What the search may choose from where nothing is pinned; docs/planner.md defines it. None: the whole of it.

    A space of at most ``search.EXHAUSTIVE`` drafts is searched whole, and its best plan is then the best there is.
    """

    cuts: tuple[int, ...] | None = None
    """Layer indices where a stage or a segment may end."""
    micro_batches: tuple[int, ...] | None = None
    in_flight: tuple[int | None, ...] | None = None
    """Caps in samples; None among them is what the order rule gives."""
    orders: tuple[OrderRule, ...] = ("one_forward_one_backward", "fill_drain")
    sharding: tuple[Mode, ...] = ("column", "row")
    recompute: tuple[bool, ...] = (False, True)
    optimizer_sharding: tuple[OptimizerSharding, ...] | None = None
    """None: what the recipe says."""
    replicas: tuple[int, ...] | None = None
    """Numbers of plan replicas."""
    placements: Literal["families", "every"] = "families"
    """Rank sets: those that are usual, or all of them up to the order of equal ranks."""
    segments: tuple[int, ...] | None = None
    """Numbers of middle segments."""
    buckets: tuple[int, ...] = BUCKET_BYTES
    """Least bytes of a gradient bucket, ascending."""


@dataclass(frozen=True)
class Request:
    """A planning problem, apart from chain, profile and cluster."""

    global_batch: int
    shape: Shape = "auto"
    precision: Precision = "float32"
    recipe: Recipe = field(default_factory=Recipe)
    pins: dict[Kind, Pin] = field(default_factory=dict)
    order: OrderRule | None = None
    replicas: int | None = None
    """Number of plan replicas."""
    bucket_bytes: int | None = None
    """Least bytes of a gradient bucket; None leaves it to the planner."""
    distinct: bool = False
    """Only plans whose stages all have different micro-batch sizes."""
    least_micro_batch: int = 1
    """No smaller micro-batches, apart from pinned ones."""
    space: Space = field(default_factory=Space)
    effort: Effort = "normal"
    """How much is simulated before the search is content; ``exact`` searches the whole space."""

    def __post_init__(self) -> None:
        if self.global_batch < 1:
            raise PlanError(f"train.global_batch: {self.global_batch} is below 1; give a number of samples")
        if self.least_micro_batch < 1:
            raise PlanError(f"plan.least_micro_batch: {self.least_micro_batch} is below 1; give a size")
        if self.bucket_bytes is not None and self.bucket_bytes < 1:
            raise PlanError(f"plan.bucket_bytes: {self.bucket_bytes} is below 1; give a number of bytes, or null")
        if self.replicas is not None and self.replicas < 1:
            raise PlanError(f"plan.replicas: {self.replicas} is below 1; give a number of plan replicas")

    def pin(self, kind: Kind) -> Pin:
        """Return the pins of a stage."""
        return self.pins.get(kind, Pin())

    @property
    def sampled(self) -> bool:
        """Whether the head's classes are sampled: one rank holds each of them, as a row."""
        return self.recipe.sampling is not None

    @property
    def orders(self) -> tuple[OrderRule, ...]:
        """The order rules to choose from."""
        return self.space.orders if self.order is None else (self.order,)

    @property
    def optimizer_shardings(self) -> tuple[OptimizerSharding, ...]:
        """The optimizer shardings to choose from."""
        return self.space.optimizer_sharding or (self.recipe.sharding,)

    @property
    def buckets(self) -> tuple[int, ...]:
        """The sizes of gradient buckets to choose from, in bytes, ascending."""
        return self.space.buckets if self.bucket_bytes is None else (self.bucket_bytes,)

    @property
    def usual_bucket(self) -> int:
        """The size to begin with: of those to choose from, the one nearest to the usual."""
        return min(self.buckets, key=lambda size: abs(size - USUAL_BUCKET_BYTES))
