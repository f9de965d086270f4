"""The sections of a job's configuration: plain frozen objects that know neither Hydra nor torch."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

from hybridpar.errors import ConfigError, PlanError
from hybridpar.model.chain import Autocast, InputKind, MemoryFormat
from hybridpar.monitor.settings import DEFAULT_INTERVAL_S, DEFAULT_MAX_BYTES, Settings
from hybridpar.names import nearest
from hybridpar.planning.compression import Compression, Method
from hybridpar.planning.plan import Kind, OrderRule, Precision
from hybridpar.planning.request import Effort, Pin, Shape

_ANY = ("weight_decay", "maximize", "foreach", "differentiable")
_ADAM = ("betas", "eps", "amsgrad", "capturable", "fused", *_ANY)
OPTIMIZER_OPTIONS = {
    "SGD": ("momentum", "dampening", "nesterov", "fused", *_ANY),
    "Adam": (*_ADAM, "decoupled_weight_decay"),
    "AdamW": _ADAM,
    "RMSprop": ("alpha", "eps", "momentum", "centered", "capturable", *_ANY),
}
"""Arguments of the optimizers that are known without torch; a test compares them with torch's own."""


def check_options(name: str, options: Mapping[str, Any], known: Collection[str]) -> None:
    """Raise ConfigError for an option that the optimizer ``name``, which has the ``known`` ones, does not have."""
    for option in options:
        if option not in known:
            raise ConfigError(
                f"optimizer.options.{option}: {name} has no such option{nearest(option, sorted(known))} "
                f"(options: {', '.join(known)})"
            )


def _require(condition: bool, name: str, value: object, remedy: str) -> None:
    if not condition:
        raise ConfigError(f"{name}: {value} {remedy}")


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
        _require(
            self.weights is not None or not self.fresh, "model.fresh", list(self.fresh), "needs model.weights"
        )
        fits = all(min(shape, default=1) >= 1 for shape in self.in_shapes) and bool(self.in_shape)
        _require(fits, "model.in_shape", list(self.in_shape), "must be positive sizes, as in [3,224,224]")
        fits = not (self.input_dtype == "bool" and isinstance(self.in_shape[0], int))
        _require(fits, "model.input_dtype", "bool", "is for one of several tensors; take int or float")
        _require(self.classes >= 1, "model.classes", self.classes, "must be at least 1")

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

    def __post_init__(self) -> None:
        if self.path is not None and self.kind != "from_file":
            raise ConfigError(
                f"profile.path: {self.path} is read by profile=from_file only; "
                f"use profile=from_file profile.path={self.path}"
            )
        least = min(self.micro_batches, default=1)
        _require(least >= 1, "profile.micro_batches", list(self.micro_batches), "must be positive")
        ascending = list(self.micro_batches) == sorted(set(self.micro_batches))
        _require(ascending, "profile.micro_batches", list(self.micro_batches), "must ascend")
        shares = list(self.fractions)
        descending = shares[:1] == [1.0] and shares == sorted(set(shares), reverse=True) and shares[-1] > 0
        _require(descending, "profile.fractions", shares, "must descend from 1.0 and stay above 0")
        _require(self.budget_s > 0, "profile.budget_s", self.budget_s, "must be above 0 seconds")


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
class ScheduleConfig:
    """How the learning rate goes over the steps."""

    name: Literal["constant", "cosine", "step"] = "constant"
    warmup_steps: int = 0
    """First steps, in which the rate grows linearly to the learning rate; fewer than the training's."""
    minimum: float = 0.0
    """Where the cosine ends, as a share of the learning rate."""
    milestones: tuple[float, ...] = (0.5, 0.75)
    """Shares of the training at which ``step`` multiplies by ``factor``."""
    factor: float = 0.1

    def __post_init__(self) -> None:
        where = "optimizer.schedule"
        _require(self.warmup_steps >= 0, f"{where}.warmup_steps", self.warmup_steps, "must be 0 or more")
        _require(0 <= self.minimum <= 1, f"{where}.minimum", self.minimum, "must lie in 0..1")
        inside = all(0 < m < 1 for m in self.milestones)
        _require(inside, f"{where}.milestones", list(self.milestones), "must lie between 0 and 1")
        _require(self.factor > 0, f"{where}.factor", self.factor, "must be above 0")


_KEPT = ("momentum", "amsgrad", "centered")
"""Options that decide what an optimizer keeps per parameter."""
_WHOLE = ("fused", "foreach", "capturable", "differentiable", "maximize", "decoupled_weight_decay")
"""Options that an optimizer has as a whole."""


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that an optimizer treats in a way of their own. Raises ConfigError for values out of range."""

    match: str
    """Of full names of parameters, as in a shell: ``features.*``, ``*.bias``."""
    options: Mapping[str, Any]
    """Arguments of the optimizer that are other ones here, ``lr`` among them."""

    def __post_init__(self) -> None:
        _require(bool(self.options), "optimizer.groups", self.match, "sets nothing; give it an lr, say")
        for name in ("lr", "weight_decay"):
            value = self.options.get(name, 0)
            fits = isinstance(value, int | float) and value >= 0
            _require(fits, f"optimizer.groups.{name}", f"{value} of {self.match}", "must be a number of 0 or more")
        for name in _WHOLE:
            fits = name not in self.options
            _require(fits, f"optimizer.groups.{name}", f"of {self.match}", "is for all; set it in options")

    def has(self, name: str) -> bool:
        """Whether a parameter of this name matches."""
        return fnmatchcase(name, self.match)


@dataclass(frozen=True)
class PowerSgdConfig:
    """How ``optimizer.compression=power_sgd`` compresses; ``planning.compression`` says what the fields mean."""

    rank: int = Compression.rank
    error_feedback: bool = Compression.error_feedback
    warmup_steps: int = Compression.warmup_steps
    min_rate: float = Compression.min_rate

    def __post_init__(self) -> None:
        where = "optimizer.power_sgd"
        _require(self.rank >= 1, f"{where}.rank", self.rank, "must be at least 1")
        _require(self.warmup_steps >= 0, f"{where}.warmup_steps", self.warmup_steps, "must be 0 or more")
        _require(0 < self.min_rate < math.inf, f"{where}.min_rate", self.min_rate, "must be above 0")


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer. Raises ConfigError for values that are out of range or do not go together."""

    name: str = "SGD"
    """A class of ``torch.optim``."""
    lr: float = 0.01
    options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the class; ``runtime.optimizer`` checks those of a class that is not known here."""
    sharding: Literal["none", "zero1", "zero2", "auto"] = "none"
    """``auto``: the planner chooses, and the plan's recipe says what runs."""
    offload: bool = False
    """Sharded state lies in the memory of a GPU's host, and is updated there."""
    clip: float | None = None
    """Largest global norm of the gradients; None: no clipping."""
    compression: Literal["none", Method] = "none"
    """Of gradients that are summed over replicas; lossy."""
    power_sgd: PowerSgdConfig = field(default_factory=PowerSgdConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    groups: tuple[dict[str, Any], ...] = ()
    """Each with ``match`` and the options that differ, as in ``{match: features.*, lr: 0.01}``; the first one that
    matches a parameter has it."""

    def __post_init__(self) -> None:
        _require(self.lr >= 0, "optimizer.lr", self.lr, "must be 0 or more")
        _require(self.clip is None or self.clip > 0, "optimizer.clip", self.clip, "must be above 0, or null")
        if self.name in OPTIMIZER_OPTIONS:
            check_options(self.name, self.options, OPTIMIZER_OPTIONS[self.name])
        named = not self.offload or self.sharding in {"zero1", "zero2"}
        _require(
            named, "optimizer.offload", self.offload, "needs optimizer.sharding=zero1 or zero2; set one of them"
        )
        self._check_groups()

    def _check_groups(self) -> None:
        for group in self.parameter_groups:
            fits = self.lr > 0 or not group.options.get("lr")
            _require(fits, "optimizer.lr", self.lr, f"must be above 0 for a schedule that {group.match} scales")
            own = {name: value for name, value in group.options.items() if name != "lr"}
            if self.name in OPTIMIZER_OPTIONS:
                check_options(self.name, own, OPTIMIZER_OPTIONS[self.name])
            for name in (n for n in _KEPT if n in own):
                same = bool(own[name]) == bool(self.options.get(name))
                _require(
                    same,
                    f"optimizer.groups.{name}",
                    f"{own[name]} of {group.match}",
                    "is on or off for all parameters; change it in optimizer.options",
                )

    @property
    def compressed(self) -> Compression | None:
        """The compression of gradients, as a plan's recipe has it."""
        if self.compression == "none":
            return None
        if self.compression != "power_sgd":
            return Compression(self.compression)
        own = self.power_sgd
        return Compression("power_sgd", own.rank, own.error_feedback, own.warmup_steps, own.min_rate)

    @property
    def parameter_groups(self) -> tuple[ParameterGroup, ...]:
        """The groups, checked. Raises ConfigError."""
        made = []
        for i, group in enumerate(self.groups):
            match = group.get("match")
            fits = isinstance(match, str) and bool(match)
            _require(fits, f"optimizer.groups[{i}].match", match, "must be a pattern of names, as in features.*")
            made.append(ParameterGroup(str(match), {k: v for k, v in group.items() if k != "match"}))
        return tuple(made)

    @property
    def elementwise(self) -> bool | None:
        """Whether every element of a parameter is updated by itself; None: ``runtime.elementwise`` finds out."""
        return True if self.name in OPTIMIZER_OPTIONS else None

    @property
    def state_count(self) -> int | None:
        """Tensors of a parameter's size that the optimizer keeps; None: ``runtime.optimizer`` can measure it."""
        on = {name for name, value in self.options.items() if value}
        if self.name == "SGD":
            return int("momentum" in on)
        if self.name in {"Adam", "AdamW"}:
            return 2 + ("amsgrad" in on)
        if self.name == "RMSprop":
            return 1 + ("momentum" in on) + ("centered" in on)
        return None


@dataclass(frozen=True)
class MarginConfig:
    """The margin of a softmax over cosines."""

    name: Literal["none", "arcface", "cosface"] = "none"
    scale: float = 64.0
    """Multiplies the cosines."""
    size: float | None = None
    """Of arcface in radians; None: 0.5 of arcface, 0.35 of cosface."""

    def __post_init__(self) -> None:
        _require(0 < self.scale < math.inf, "loss.margin.scale", self.scale, "must be above 0")
        fits = self.size is None or 0 <= self.size < (2.0 if self.name == "cosface" else math.pi)
        _require(fits, "loss.margin.size", self.size, "must be 0 or more, and below pi (arcface) or 2 (cosface)")


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
        _require(fits, "loss.sampled", self.sampled, "must be above 0 and at most 1, or null")
        _require(0 <= self.label_smoothing < 1, "loss.label_smoothing", self.label_smoothing, "must lie in [0, 1)")
        if isinstance(self.class_weights, tuple):
            fits = all(0 <= w < math.inf for w in self.class_weights)
            _require(fits, "loss.class_weights", list(self.class_weights), "must be finite numbers, none below 0")


@dataclass(frozen=True)
class LossScale:
    """How the loss is scaled, so that float16 holds small gradients; the defaults are torch's (GradScaler)."""

    init: float = 2.0**16
    """The scale of the first step."""
    growth_factor: float = 2.0
    """The scale is multiplied by it after every ``growth_interval`` steps in a row with finite gradients."""
    backoff_factor: float = 0.5
    """The scale is multiplied by it after a step with others, which is skipped."""
    growth_interval: int = 2000

    def __post_init__(self) -> None:
        where = "train.loss_scale"
        _require(0 < self.init < 2.0**127, f"{where}.init", self.init, "must lie above 0 and below 2^127")
        grows = 1 < self.growth_factor < math.inf
        _require(grows, f"{where}.growth_factor", self.growth_factor, "must be a number above 1")
        shrinks = 0 < self.backoff_factor < 1
        _require(shrinks, f"{where}.backoff_factor", self.backoff_factor, "must lie between 0 and 1")
        _require(self.growth_interval >= 1, f"{where}.growth_interval", self.growth_interval, "must be at least 1")


@dataclass(frozen=True)
class LossScaleConfig(LossScale):
    """When the loss is scaled, and how."""

    enabled: bool | None = None
    """None: with autocast in float16."""


Logger = Literal["tensorboard", "wandb", "mlflow"]


@dataclass(frozen=True)
class EarlyStopConfig:
    """When a training ends before its last step."""

    metric: str | None = None
    """Of evaluations, ``accuracy``, ``loss`` or an own metric; None: never."""
    patience: int = 3
    """Evaluations in a row that are no better than the best one before."""
    min_improvement: float = 0.0
    """No better are also those that are better by no more than this."""

    def __post_init__(self) -> None:
        _require(self.patience >= 1, "train.early_stop.patience", self.patience, "must be at least 1")
        least = self.min_improvement
        _require(0 <= least < math.inf, "train.early_stop.min_improvement", least, "must be a number of 0 or more")


@dataclass(frozen=True)
class Compiling:
    """What ``torch.compile`` compiles, as far as it can."""

    stages: tuple[Kind, ...] | None = None
    """None: all of the plan."""
    backend: str = "inductor"
    """One of ``torch.compiler.list_backends(exclude_tags=())``."""

    def has(self, kind: Kind) -> bool:
        """Whether a stage is to be compiled."""
        return self.stages is None or kind in self.stages


@dataclass(frozen=True)
class TrainConfig:
    """The training itself."""

    global_batch: int = 64
    epochs: int = 1
    steps: int | None = None
    """Train for this many, over as many epochs as they take; None: all steps of ``epochs``."""
    drop_last: bool = False
    seed: int = 0
    precision: Precision = "float32"
    """Of parameters, gradients and the optimizer's state."""
    autocast: Autocast | None = None
    """In which the layers compute, with parameters in float32; None: in ``precision``."""
    memory_format: MemoryFormat | None = None
    """Order in memory of images and of the weights that make them; None: that of their dims."""
    loss_scale: LossScaleConfig = field(default_factory=LossScaleConfig)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    eval_every: int | None = 1
    """Epochs between evaluations; None: none after epochs."""
    eval_every_steps: int | None = None
    """Steps between evaluations, besides; None: none amid an epoch."""
    early_stop: EarlyStopConfig = field(default_factory=EarlyStopConfig)
    log_every: int = 10
    mode: Literal["auto", "progress", "plain", "quiet"] = "auto"
    loggers: tuple[Logger, ...] = ("tensorboard",)
    """Where rank 0 shows scalars, besides ``metrics.jsonl`` and ``evaluations.jsonl``."""
    timeout_s: float = 120.0
    """Of one communication: longer than any rank computes or reads between two of them."""
    ema: float | None = None
    """Decay of a moving average of the weights; None: no average."""
    callbacks: tuple[str, ...] = ()
    """``module:Class`` each, made on every rank."""
    compile: bool | tuple[Kind, ...] = False
    """Whether ``torch.compile`` compiles layers, or those of which stages."""
    compile_backend: str = "inductor"
    timeline: tuple[int, int] | None = None
    """Steps in which every action is timed, from the first that this process runs, the last not included."""

    def __post_init__(self) -> None:
        window = self.timeline
        fits = window is None or 0 <= window[0] < window[1]
        _require(
            fits, "train.timeline", list(window or ()), "must be [first,last] with 0 <= first < last, or null"
        )
        for name in ("global_batch", "epochs", "steps", "eval_every", "eval_every_steps", "log_every"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"train.{name}", value, "must be at least 1")
        once = len(set(self.loggers)) == len(self.loggers)
        _require(once, "train.loggers", list(self.loggers), "must name each one once")
        fits = self.ema is None or 0 <= self.ema < 1
        _require(fits, "train.ema", self.ema, "must lie in [0, 1), as 0.999, or null")
        _require(
            self.autocast is None or self.precision == "float32",
            "train.autocast",
            self.autocast,
            f"needs parameters in float32, but train.precision={self.precision}; change one of them",
        )
        _require(
            self.early_stop.metric is None or (self.eval_every or self.eval_every_steps) is not None,
            "train.early_stop.metric",
            self.early_stop.metric,
            "needs evaluations before the end; set train.eval_every or train.eval_every_steps",
        )
        _require(0 <= self.seed < 2**63, "train.seed", self.seed, "must lie in 0..2**63-1")
        _require(self.timeout_s > 0, "train.timeout_s", self.timeout_s, "must be above 0 seconds")

    @property
    def compiling(self) -> Compiling | None:
        """What is compiled; None: nothing."""
        if isinstance(self.compile, tuple):
            return Compiling(self.compile, self.compile_backend) if self.compile else None
        return Compiling(None, self.compile_backend) if self.compile else None

    @property
    def scaling(self) -> LossScale | None:
        """How the loss is scaled; None: it is not."""
        wanted = self.loss_scale.enabled
        on = self.autocast == "float16" if wanted is None else wanted
        return self.loss_scale if on else None


@dataclass(frozen=True)
class MonitorConfig:
    """Sampling of the GPUs."""

    mode: Literal["auto", "off", "required"] = "auto"
    interval_s: float = DEFAULT_INTERVAL_S
    max_bytes: int = DEFAULT_MAX_BYTES

    def __post_init__(self) -> None:
        Settings(path="", parent=0, interval_s=self.interval_s, max_bytes=self.max_bytes)  # checks the ranges


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
        _require(self.budget_s > 0, "probe.budget_s", self.budget_s, "must be above 0 seconds")
        per_node = self.ranks_per_node
        _require(per_node is None or per_node >= 1, "probe.ranks_per_node", per_node, "must be at least 1")


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
        _require(
            self.every is None or self.every >= 1, "checkpoint.every", self.every, "must be at least 1, or null"
        )
        _require(self.keep >= 1, "checkpoint.keep", self.keep, "must be at least 1")
        idle = self.every is None and self.best is not None
        _require(not idle, "checkpoint.best", self.best, "is of no effect without checkpoint.every; set that too")


@dataclass(frozen=True)
class VerifyConfig:
    """How a plan is compared with a single process."""

    precision: Literal["float32", "float64"] = "float64"
    """In which both compute, whatever ``train.precision`` is."""
    steps: int = 2
    tolerance: float | None = None
    """Largest difference, as a share of a layer's largest value; None: 1e-10 in float64, 1e-4 in float32."""

    def __post_init__(self) -> None:
        _require(self.steps >= 1, "verify.steps", self.steps, "must be at least 1")
        _require(
            self.tolerance is None or self.tolerance > 0, "verify.tolerance", self.tolerance, "must be above 0"
        )


@dataclass(frozen=True)
class RunConfig:
    """Where a training job writes."""

    dir: str | None = None
    """None: ``runs/<model>-<data>-<time>``."""
