"""Whether an optimizer updates every element of a parameter by itself: parameters may then be flat, and cut."""

from __future__ import annotations

import torch
from torch import nn

from hybridpar.errors import ConfigError
from hybridpar.runtime.update import OptimizerFactory

_SIDE, _STEPS = 8, 2
_CUT = 20
"""Elements of a run: no multiple of a row of ``_SIDE``, so that runs end within rows."""
_RATE = 0.1
"""Learning rate of the steps that are compared: with the job's own, which may be 0, they might not differ."""
_LOOSE = 1e-5
"""Of the largest update; the same updates round alike, others differ in the first digits."""


def is_elementwise(optimizer: OptimizerFactory) -> bool:
    """Whether runs of elements with optimizers of their own are updated as a matrix of them is, by some steps."""
    generator = torch.Generator().manual_seed(0)
    # Doubles, as updates may be small beside the values.
    start, *gradients = torch.randn(1 + _STEPS, _SIDE, _SIDE, generator=generator, dtype=torch.float64)
    runs = zip(*(t.flatten().split(_CUT) for t in (start, *gradients)), strict=True)
    try:
        whole = _update(optimizer, start, gradients).flatten()
        parts = torch.cat([_update(optimizer, run, own) for run, *own in runs])
    except (ConfigError, TypeError, ValueError, RuntimeError):  # it takes no vectors
        return False
    return torch.allclose(whole, parts, rtol=0.0, atol=_LOOSE * float(whole.abs().max()))


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


def _update(optimizer: OptimizerFactory, start: torch.Tensor, gradients: list[torch.Tensor]) -> torch.Tensor:
    """Return by how much some steps change a parameter."""
    parameter = nn.Parameter(start.clone())
    made = optimizer([parameter])
    for group in made.param_groups:
        group["lr"] = _RATE
    for gradient in gradients:
        parameter.grad = gradient.clone()
        made.step()
    return parameter.detach() - start
