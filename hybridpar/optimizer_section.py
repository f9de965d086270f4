"""The section of a job's configuration that is about the optimizer: plain frozen objects, without torch."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

from hybridpar.errors import ConfigError, require
from hybridpar.names import nearest
from hybridpar.planning.compression import Compression, Method

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
        require(self.warmup_steps >= 0, f"{where}.warmup_steps", self.warmup_steps, "must be 0 or more")
        require(0 <= self.minimum <= 1, f"{where}.minimum", self.minimum, "must lie in 0..1")
        inside = all(0 < m < 1 for m in self.milestones)
        require(inside, f"{where}.milestones", list(self.milestones), "must lie between 0 and 1")
        require(self.factor > 0, f"{where}.factor", self.factor, "must be above 0")


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
        require(bool(self.options), "optimizer.groups", self.match, "sets nothing; give it an lr, say")
        for name in ("lr", "weight_decay"):
            value = self.options.get(name, 0)
            fits = isinstance(value, int | float) and value >= 0
            require(fits, f"optimizer.groups.{name}", f"{value} of {self.match}", "must be a number of 0 or more")
        for name in _WHOLE:
            fits = name not in self.options
            require(fits, f"optimizer.groups.{name}", f"of {self.match}", "is for all; set it in options")

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
        require(self.rank >= 1, f"{where}.rank", self.rank, "must be at least 1")
        require(self.warmup_steps >= 0, f"{where}.warmup_steps", self.warmup_steps, "must be 0 or more")
        require(0 < self.min_rate < math.inf, f"{where}.min_rate", self.min_rate, "must be above 0")


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
        require(self.lr >= 0, "optimizer.lr", self.lr, "must be 0 or more")
        require(self.clip is None or self.clip > 0, "optimizer.clip", self.clip, "must be above 0, or null")
        if self.name in OPTIMIZER_OPTIONS:
            check_options(self.name, self.options, OPTIMIZER_OPTIONS[self.name])
        named = not self.offload or self.sharding in {"zero1", "zero2"}
        require(
            named, "optimizer.offload", self.offload, "needs optimizer.sharding=zero1 or zero2; set one of them"
        )
        self._check_groups()

    def _check_groups(self) -> None:
        for group in self.parameter_groups:
            fits = self.lr > 0 or not group.options.get("lr")
            require(fits, "optimizer.lr", self.lr, f"must be above 0 for a schedule that {group.match} scales")
            own = {name: value for name, value in group.options.items() if name != "lr"}
            if self.name in OPTIMIZER_OPTIONS:
                check_options(self.name, own, OPTIMIZER_OPTIONS[self.name])
            for name in (n for n in _KEPT if n in own):
                same = bool(own[name]) == bool(self.options.get(name))
                require(
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
            require(fits, f"optimizer.groups[{i}].match", match, "must be a pattern of names, as in features.*")
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
