"""Whether an optimizer updates every element of a parameter by itself: parameters may then be flat, and cut."""

from __future__ import annotations

import torch
from torch import nn

from hybridpar.errors import ConfigError
from hybridpar.runtime.update import OptimizerFactory

_SIDE, _STEPS = 8, 2
_LOOSE = 1e-5
"""Relative; the same updates round alike, others differ in the first digits."""


def is_elementwise(optimizer: OptimizerFactory) -> bool:
    """Whether a matrix and the vector of its elements are updated alike, found by some steps on small ones."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(_SIDE, _SIDE, generator=generator)
    gradients = [torch.randn(_SIDE, _SIDE, generator=generator) for _ in range(_STEPS)]
    try:
        matrix, vector = (_updated(optimizer, start.view(s), gradients) for s in ((_SIDE, _SIDE), (-1,)))
    except (TypeError, ValueError, RuntimeError):  # it takes no vectors
        return False
    return torch.allclose(matrix.flatten(), vector, rtol=_LOOSE, atol=_LOOSE)


def check_elementwise(optimizer: OptimizerFactory) -> None:
    """Raise ConfigError for an optimizer whose state cannot be sharded, as it is not one of elements."""
    if not is_elementwise(optimizer):
        name = type(optimizer([nn.Parameter(torch.zeros(_SIDE, _SIDE))])).__name__
        raise ConfigError(
            f"optimizer.sharding: {name} updates a parameter by more than its elements (by rows, norms), but "
            "sharded state is of flat runs of them; set optimizer.sharding=none, or use another optimizer"
        )


def check_rowwise(optimizer: OptimizerFactory) -> None:
    """Raise ConfigError for an optimizer that cannot update some rows of a parameter and leave others alone."""
    if not (is_elementwise(optimizer) and _begins_with_zeros(optimizer)):
        name = type(optimizer([nn.Parameter(torch.zeros(_SIDE, _SIDE))])).__name__
        raise ConfigError(
            f"loss.sampled: {name} updates a parameter by more than its elements, or has state that does not "
            "begin with zeros, so rows cannot be updated alone; set loss.sampled=null, or take another optimizer"
        )


def _begins_with_zeros(optimizer: OptimizerFactory) -> bool:
    """Whether state of a parameter's size that a step makes is zero where values and gradients are."""
    parameter = nn.Parameter(torch.zeros(_SIDE, _SIDE))
    parameter.grad = torch.zeros(_SIDE, _SIDE)
    made = optimizer([parameter])
    before = set(made.state.get(parameter, ()))
    made.step()
    later = (v for k, v in made.state[parameter].items() if k not in before)
    large = (v for v in later if isinstance(v, torch.Tensor) and v.shape == parameter.shape)
    return all(bool((v.abs() < _LOOSE).all()) for v in large)


def _updated(optimizer: OptimizerFactory, start: torch.Tensor, gradients: list[torch.Tensor]) -> torch.Tensor:
    parameter = nn.Parameter(start.clone())
    made = optimizer([parameter])
    for gradient in gradients:
        parameter.grad = gradient.view(start.shape).clone()
        made.step()
    return parameter.detach()
