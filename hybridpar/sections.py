"""The sections of a job's configuration: plain frozen objects that know neither Hydra nor torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from hybridpar.errors import ConfigError, PlanError, require
from hybridpar.model.chain import InputKind
from hybridpar.monitor.settings import Options
from hybridpar.planning.plan import Kind, OrderRule
from hybridpar.planning.request import Effort, Pin, Shape
from hybridpar.train_section import check_window


@dataclass(frozen=True)
class ModelConfig:
    """Which model. Raises ConfigError for a value out of range."""

    name: str
    builder: str
    """``module:function``, resolved by ``hybridpar.model.build``."""
    in_shape: tuple[int, ...] | tuple[tuple[int, ...], ...]
    """Of one input sample; a list of shapes where the model takes several tensors."""
    classes: int
    options: dict[str, Any] = field(default_factory=dict)
    """Further keyword arguments of the builder."""
    input_dtype: InputKind | tuple[InputKind, ...] = "float"
    """``int`` for token ids; of several tensors one for all, or a list with one each, ``bool`` among them."""
    weights: str | None = None
    """A file with the state dict to begin with."""
    fresh: tuple[str, ...] = ()
    """Patterns of parameters that keep their initial values nevertheless."""
    frozen: tuple[str, ...] = ()
    """Patterns of parameters that are not trained."""
    batch_norm: Literal["replica", "synchronised"] = "replica"
    """Whose samples batch norms take their statistics of: a replica's own, or all replicas'."""

    def __post_init__(self) -> None:
        require(self.weights is not None or not self.fresh, "model.fresh", list(self.fresh), "needs model.weights")
        fits = all(min(shape, default=1) >= 1 for shape in self.in_shapes) and bool(self.in_shape)
        require(fits, "model.in_shape", list(self.in_shape), "must be positive sizes, as in [3,224,224]")
        fits = not (self.input_dtype == "bool" and isinstance(self.in_shape[0], int))
        require(fits, "model.input_dtype", "bool", "is for one of several tensors; take int or float")
        require(self.classes >= 1, "model.classes", self.classes, "must be at least 1")

    @property
    def in_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of all tensors that one sample has."""
        several = tuple(shape for shape in self.in_shape if not isinstance(shape, int))
        return several or (tuple(n for n in self.in_shape if isinstance(n, int)),)


@dataclass(frozen=True)
class ProfileConfig:
    """Where the layers' times come from."""

    kind: Literal["analytic", "measured", "from_file"]
    path: str | None = None
    micro_batches: tuple[int, ...] = ()
    """Samples per timed forward, of a measured profile."""
    fractions: tuple[float, ...] = (1.0, 0.5, 0.25)
    """Shares of a linear layer's features that are timed."""
    budget_s: float = 60.0
    cache: bool = True
    occupancy: bool = False
    """Whether a measured profile also says how busy and how full the device was, by micro-batch size."""

    def __post_init__(self) -> None:
        fits = self.kind == "measured" or not self.occupancy
        require(fits, "profile.occupancy", self.occupancy, "is measured; use profile=measured")
        if self.path is not None and self.kind != "from_file":
            raise ConfigError(
                f"profile.path: {self.path} is read by profile=from_file only; "
                f"use profile=from_file profile.path={self.path}"
            )
        least = min(self.micro_batches, default=1)
        require(least >= 1, "profile.micro_batches", list(self.micro_batches), "must be positive")
        ascending = list(self.micro_batches) == sorted(set(self.micro_batches))
        require(ascending, "profile.micro_batches", list(self.micro_batches), "must ascend")
        shares = list(self.fractions)
        descending = shares[:1] == [1.0] and shares == sorted(set(shares), reverse=True) and shares[-1] > 0
        require(descending, "profile.fractions", shares, "must descend from 1.0 and stay above 0")
        require(self.budget_s > 0, "profile.budget_s", self.budget_s, "must be above 0 seconds")


@dataclass(frozen=True)
class PlanConfig:
    """What the planner is asked for; the fields of the stages are pins."""

    shape: Literal[Shape, "from_file"]
    path: str | None = None
    """The plan's file, of ``from_file``."""
    front: Pin = field(default_factory=Pin)
    middle: Pin = field(default_factory=Pin)
    tail: Pin = field(default_factory=Pin)
    order: OrderRule | None = None
    bucket_bytes: int | None = None
    """Least bytes of a gradient bucket; None: the planner's choice."""
    distinct: bool = False
    """Only plans whose stages all have different micro-batch sizes."""
    least_micro_batch: int = 1
    """No smaller micro-batches, apart from pinned ones."""
    replicas: int | None = None
    """Number of plan replicas; None: the planner's choice."""
    effort: Effort = "normal"
    """How much the search simulates."""
    global_batch_range: tuple[int, int] | None = None
    """Least and greatest global batch of a front of throughput against memory; None: one plan."""

    def __post_init__(self) -> None:
        if self.bucket_bytes is not None and self.bucket_bytes < 1:
            raise PlanError(f"bucket_bytes: {self.bucket_bytes} is below 1; give a number of bytes, or null")
        if self.replicas is not None and self.replicas < 1:
            raise PlanError(f"replicas: {self.replicas} is below 1; give a number of plan replicas, or null")
        if (
            self.global_batch_range is not None
            and not 1 <= self.global_batch_range[0] <= self.global_batch_range[1]
        ):
            raise PlanError(
                f"global_batch_range: {list(self.global_batch_range)} must be [least,most] with 1 <= least <= most"
            )
        if self.shape == "from_file" and self.global_batch_range is not None:
            raise PlanError("global_batch_range: a plan from a file has one global batch; drop one of the two")
        if self.path is not None and self.shape != "from_file":
            raise PlanError(
                f"path: {self.path} is read by plan=from_file only; use plan=from_file plan.path={self.path}"
            )

    @property
    def pins(self) -> dict[Kind, Pin]:
        """The pins of the stages that have any."""
        given: dict[Kind, Pin] = {"front": self.front, "middle": self.middle, "tail": self.tail}
        return {kind: pin for kind, pin in given.items() if pin != Pin()}


@dataclass(frozen=True)
class MarginConfig:
    """The margin of a softmax over cosines."""

    name: Literal["none", "arcface", "cosface"] = "none"
    scale: float = 64.0
    """Multiplies the cosines."""
    size: float | None = None
    """Of arcface in radians; None: 0.5 of arcface, 0.35 of cosface."""

    def __post_init__(self) -> None:
        require(0 < self.scale < math.inf, "loss.margin.scale", self.scale, "must be above 0")
        fits = self.size is None or 0 <= self.size < (2.0 if self.name == "cosface" else math.pi)
        require(fits, "loss.margin.size", self.size, "must be 0 or more, and below pi (arcface) or 2 (cosface)")


@dataclass(frozen=True)
class LossConfig:
    """The cross-entropy, with the meaning of ``torch.nn.CrossEntropyLoss``."""

    label_smoothing: float = 0.0
    class_weights: tuple[float, ...] | str | None = None
    """One number per class, or the path of a JSON file with a list of them; None: 1 each."""
    ignore_index: int = -100
    """Label of samples that do not count."""
    margin: MarginConfig = field(default_factory=MarginConfig)
    """Of a model that ends in cosines."""
    sampled: float | None = None
    """Share of classes, besides those of labels, that take part in a training step; None: all do."""

    def __post_init__(self) -> None:
        fits = self.sampled is None or 0 < self.sampled <= 1
        require(fits, "loss.sampled", self.sampled, "must be above 0 and at most 1, or null")
        require(0 <= self.label_smoothing < 1, "loss.label_smoothing", self.label_smoothing, "must lie in [0, 1)")
        if isinstance(self.class_weights, tuple):
            fits = all(0 <= w < math.inf for w in self.class_weights)
            require(fits, "loss.class_weights", list(self.class_weights), "must be finite numbers, none below 0")


@dataclass(frozen=True)
class TraceConfig:
    """A look at every kernel, by torch's profiler."""

    steps: tuple[int, int] | None = None
    """Those that are traced, from the first that this process runs, the last not included; None: none."""

    def __post_init__(self) -> None:
        check_window("monitor.trace.steps", self.steps)


@dataclass(frozen=True)
class MonitorConfig(Options):
    """Sampling of the nodes and their GPUs."""

    mode: Literal["auto", "off", "required"] = "auto"
    trace: TraceConfig = field(default_factory=TraceConfig)

    @property
    def options(self) -> Options:
        """What the sampler is told of it."""
        return Options(**{option.name: getattr(self, option.name) for option in fields(Options)})


@dataclass(frozen=True)
class ProbeConfig:
    """How the cluster at hand is measured."""

    out: str = "cluster.yaml"
    """The description's file."""
    budget_s: float = 40.0
    ranks_per_node: int | None = None
    """None: ranks with one agent of the launcher, one host name and one network namespace are on one node."""
    racks: tuple[str, ...] | None = None
    """The rack of every node; None: all in one."""
    sites: tuple[str, ...] | None = None
    """The site of every node; None: all in one."""

    def __post_init__(self) -> None:
        require(self.budget_s > 0, "probe.budget_s", self.budget_s, "must be above 0 seconds")
        per_node = self.ranks_per_node
        require(per_node is None or per_node >= 1, "probe.ranks_per_node", per_node, "must be at least 1")


@dataclass(frozen=True)
class CheckpointConfig:
    """What a training saves, and how long it stays."""

    every: int | None = None
    """Steps between checkpoints; None: no checkpoints."""
    keep: int = 2
    """Latest ones that stay."""
    best: str | None = None
    """Of an evaluation, ``accuracy``, ``loss`` or an own metric: a checkpoint is also made after the best one so
    far, and the best one stays."""
    asynchronous: bool = True
    """Write while the training goes on; needs the memory for a copy on the CPU."""

    def __post_init__(self) -> None:
        require(
            self.every is None or self.every >= 1, "checkpoint.every", self.every, "must be at least 1, or null"
        )
        require(self.keep >= 1, "checkpoint.keep", self.keep, "must be at least 1")
        idle = self.every is None and self.best is not None
        require(not idle, "checkpoint.best", self.best, "is of no effect without checkpoint.every; set that too")


@dataclass(frozen=True)
class VerifyConfig:
    """How a plan is compared with a single process."""

    precision: Literal["float32", "float64"] = "float64"
    """In which both compute, whatever ``train.precision`` is."""
    steps: int = 2
    tolerance: float | None = None
    """Largest difference, as a share of a layer's largest value; None: 1e-10 in float64, 1e-4 in float32."""

    def __post_init__(self) -> None:
        require(self.steps >= 1, "verify.steps", self.steps, "must be at least 1")
        require(
            self.tolerance is None or self.tolerance > 0, "verify.tolerance", self.tolerance, "must be above 0"
        )


@dataclass(frozen=True)
class RunConfig:
    """Where a training job writes."""

    dir: str | None = None
    """None: ``runs/<model>-<data>-<time>``."""
