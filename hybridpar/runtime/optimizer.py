"""Optimizers of torch from configuration, and the learning rate over the steps."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from hybridpar.errors import ConfigError
from hybridpar.names import nearest
from hybridpar.optimizer_section import OptimizerConfig, ScheduleConfig, check_options
from hybridpar.runtime.update import OptimizerFactory

Rate = Callable[[int], float]
"""Learning rate of a step, counted from 0."""

_PROBE_SIZE = 64
_FUSED = {"SGD", "Adam", "AdamW"}
"""They update in one pass through memory on CPU and GPU, if told so; else in up to a dozen."""
_WAYS = {"fused", "foreach", "differentiable"}
"""Options that say how to update: of a user who gives one, the others stay torch's."""


def make_factory(config: OptimizerConfig) -> OptimizerFactory:
    """Return a function from parameters to their optimizer, a fused one if torch has it and the options let it.

    Raises ConfigError for a name that is no class of ``torch.optim``, for an option that the class does not have
    or refuses (of a group of parameters too), and for a class that cannot update a plain parameter from its
    gradient alone (LBFGS, SparseAdam).
    """
    factory = _factory(config)
    _probe(config, factory)
    for group in config.parameter_groups:
        options = {**config.options, **group.options}
        alone = replace(config, lr=options.pop("lr", config.lr), options=options, groups=())
        _probe(alone, _factory(alone))
    return factory


def state_count(config: OptimizerConfig) -> int:
    """Return how many tensors of a parameter's size the optimizer keeps, found by a step on a small parameter.

    Raises ConfigError as ``make_factory`` does.
    """
    optimizer = _probe(config, _factory(config))
    tensors = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    return round(sum(t.numel() for t in tensors if t.numel() > 1) / _PROBE_SIZE)


def make_rate(lr: float, schedule: ScheduleConfig, steps: int) -> Rate:
    """Return the learning rate as a function of the step, for a training of ``steps`` steps.

    With w warm-up steps it is ``lr (step + 1) / w`` below w. After that, with t the share of the remaining steps
    that is done: ``lr`` (constant), ``lr (m + (1 - m) (1 + cos(pi t)) / 2)`` (cosine, m its minimum; Loshchilov
    and Hutter, "SGDR", ICLR 2017, equation 5), or ``lr`` times the factor for every milestone below or at
    ``step / steps`` (step). Raises ConfigError where the warm-up takes all steps.
    """
    warmup = schedule.warmup_steps
    if warmup >= steps:
        raise ConfigError(
            f"optimizer.schedule.warmup_steps: {warmup}, but the training has {steps} steps and would never leave "
            "the warm-up; set it below, or train longer"
        )

    def rate(step: int) -> float:
        if step < warmup:
            return lr * (step + 1) / warmup
        if schedule.name == "cosine":
            done = min(1.0, (step - warmup) / max(1, steps - warmup))
            return lr * (schedule.minimum + (1 - schedule.minimum) * (1 + math.cos(math.pi * done)) / 2)
        if schedule.name == "step":
            return lr * schedule.factor ** sum(step >= m * steps for m in schedule.milestones)
        return lr

    return rate


def _factory(config: OptimizerConfig) -> OptimizerFactory:
    kind = _kind(config.name)
    names = [p for p in inspect.signature(kind).parameters if p not in {"params", "lr"}]
    check_options(config.name, config.options, names)
    options = dict(config.options)
    if config.name in _FUSED and not _WAYS & options.keys():
        options["fused"] = True

    def make(parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]]) -> torch.optim.Optimizer:
        try:
            return kind(parameters, lr=config.lr, **options)
        except (TypeError, ValueError) as e:
            raise _unusable(config, e) from e

    return make


def _kind(name: str) -> Callable[..., torch.optim.Optimizer]:
    kinds: dict[str, Callable[..., torch.optim.Optimizer]] = {
        n: k
        for n, k in vars(torch.optim).items()
        if inspect.isclass(k) and issubclass(k, torch.optim.Optimizer) and k is not torch.optim.Optimizer
    }
    if name not in kinds:
        raise ConfigError(f"optimizer.name: torch.optim has no {name}{nearest(name, sorted(kinds))}")
    return kinds[name]


def _probe(config: OptimizerConfig, factory: OptimizerFactory) -> torch.optim.Optimizer:
    """Take one step with a small parameter."""
    side = math.isqrt(_PROBE_SIZE)
    parameter = nn.Parameter(torch.zeros(side, side))
    parameter.grad = torch.ones_like(parameter)
    optimizer = factory([parameter])
    try:
        optimizer.step()
    except (TypeError, ValueError, RuntimeError) as e:
        raise _unusable(config, e) from e
    return optimizer


def _unusable(config: OptimizerConfig, cause: Exception) -> ConfigError:
    text = ", ".join(f"{k}={v}" for k, v in {"lr": config.lr, **config.options}.items())
    return ConfigError(
        f"optimizer: {config.name}({text}) cannot be used: {cause}; choose another or other options"
    )
