"""The section of a job's configuration that is about the training itself: plain frozen objects, without torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from hybridpar.errors import ConfigError, require
from hybridpar.model.chain import Autocast, MemoryFormat
from hybridpar.planning.plan import Kind, Precision


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
        require(0 < self.init < 2.0**127, f"{where}.init", self.init, "must lie above 0 and below 2^127")
        grows = 1 < self.growth_factor < math.inf
        require(grows, f"{where}.growth_factor", self.growth_factor, "must be a number above 1")
        shrinks = 0 < self.backoff_factor < 1
        require(shrinks, f"{where}.backoff_factor", self.backoff_factor, "must lie between 0 and 1")
        require(self.growth_interval >= 1, f"{where}.growth_interval", self.growth_interval, "must be at least 1")


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
        require(self.patience >= 1, "train.early_stop.patience", self.patience, "must be at least 1")
        least = self.min_improvement
        require(0 <= least < math.inf, "train.early_stop.min_improvement", least, "must be a number of 0 or more")


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


def check_window(name: str, window: tuple[int, int] | None) -> None:
    """Raise ConfigError, which names the field, for steps that are none."""
    fits = window is None or 0 <= window[0] < window[1]
    require(fits, name, list(window or ()), "must be [first,last] with 0 <= first < last, or null")


def check_apart(timeline: tuple[int, int] | None, trace: tuple[int, int] | None) -> None:
    """Raise ConfigError where steps are to be both timed and traced."""
    if timeline is not None and trace is not None and max(timeline[0], trace[0]) < min(timeline[1], trace[1]):
        raise ConfigError(
            f"monitor.trace.steps: {list(trace)} overlaps train.timeline={list(timeline)}, whose times the "
            "profiler would distort; choose other steps for one of them"
        )


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
        check_window("train.timeline", self.timeline)
        for name in ("global_batch", "epochs", "steps", "eval_every", "eval_every_steps", "log_every"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"train.{name}", value, "must be at least 1")
        once = len(set(self.loggers)) == len(self.loggers)
        require(once, "train.loggers", list(self.loggers), "must name each one once")
        fits = self.ema is None or 0 <= self.ema < 1
        require(fits, "train.ema", self.ema, "must lie in [0, 1), as 0.999, or null")
        require(
            self.autocast is None or self.precision == "float32",
            "train.autocast",
            self.autocast,
            f"needs parameters in float32, but train.precision={self.precision}; change one of them",
        )
        require(
            self.early_stop.metric is None or (self.eval_every or self.eval_every_steps) is not None,
            "train.early_stop.metric",
            self.early_stop.metric,
            "needs evaluations before the end; set train.eval_every or train.eval_every_steps",
        )
        require(0 <= self.seed < 2**63, "train.seed", self.seed, "must lie in 0..2**63-1")
        require(self.timeout_s > 0, "train.timeout_s", self.timeout_s, "must be above 0 seconds")

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
