"""A linear layer that adds its weight's gradient up where it lies.

Autograd makes a gradient anew for every micro-batch and adds it to the one that is there. Where a layer is wide
and the samples are few, that is more than twice the memory traffic, and on a CPU the system clears the pages of
each new one. Here the matrix product itself adds (Megatron-LM calls it gradient accumulation fusion).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable


class GatheringLinear(nn.Module):
    """A linear map, or a slice of one, from (samples, in) to (samples, out).

    By columns a slice takes all input features and gives a slice of the outputs. By rows it takes a slice of the
    input features and gives summands of all outputs; the bias belongs to the first shard's summand.

    ``weight.grad`` is complete after a backward, as ever, but it never goes through autograd: tensor hooks of the
    weight do not see it.

    Under autocast the matrix products are of its dtype, and a gradient is added in the weight's. Input and weight
    are kept as they are and lowered again for the backward, so that nothing is kept beside them.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Take two parameters, or values for them."""
        super().__init__()
        self.weight = _parameter(weight)
        self.bias = None if bias is None else _parameter(bias)
        self.home: torch.Tensor | None = None
        """Where the weight's gradient is to lie: a backward that finds none writes it there. None: somewhere."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (samples, in) to (samples, out)."""
        y: torch.Tensor = _Map.apply(x, self.weight, self.bias, self)
        return y

    def gather(self, gradient: torch.Tensor, x: torch.Tensor) -> None:
        """Add the weight's gradient, given the output's (samples, out) and the input (samples, in).

        Both of one dtype; if it is not the weight's, the product is made before it is added.
        """
        weight = self.weight
        if gradient.dtype != weight.dtype:
            self._add(torch.mm(gradient.t(), x))
        elif weight.grad is not None:
            weight.grad.addmm_(gradient.t(), x)
        elif self.home is not None:
            weight.grad = torch.mm(gradient.t(), x, out=self.home)
        else:
            weight.grad = torch.mm(gradient.t(), x)

    def _add(self, product: torch.Tensor) -> None:
        """Add a gradient of another dtype."""
        weight = self.weight
        if weight.grad is not None:
            weight.grad.add_(product)
        else:
            home = torch.empty_like(weight, requires_grad=False) if self.home is None else self.home
            weight.grad = home.copy_(product)


def _parameter(value: torch.Tensor) -> nn.Parameter:
    return value if isinstance(value, nn.Parameter) else nn.Parameter(value)


class _Map(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, layer: GatheringLinear
    ) -> torch.Tensor:
        ctx.layer, ctx.dtype, needs = layer, x.dtype, ctx.needs_input_grad
        ctx.save_for_backward(x if needs[1] else None, weight if needs[0] else None)
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        kind = gradient.dtype
        of_bias = gradient.sum(0, dtype=ctx.layer.bias.dtype) if ctx.needs_input_grad[2] else None
        of_input = (gradient @ weight.to(kind)).to(ctx.dtype) if weight is not None else None
        if x is not None:
            ctx.layer.gather(gradient, x.to(kind))
        return of_input, None, of_bias, None
