"""Linear layers that add their weight's gradient up where it lies.

Autograd makes a gradient anew for every micro-batch and adds it to the one that is there. Where a layer is wide
and the samples are few, that is more than twice the memory traffic, and on a CPU the system clears the pages of
each new one. Here the matrix product itself adds (Megatron-LM calls it gradient accumulation fusion).
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable


class CosineLinear(nn.Module):
    """The cosines between an embedding (samples, ..., in) and a vector per class: (samples, ..., out), in [-1, 1].

    The head of recognition models that margin losses are for. A tail shards it by its classes, never by features,
    over all of which it normalises. Neither has a length below 1e-12, as for ``F.normalize``.

    Args:
        in_features: of the embedding.
        out_features: classes.

    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        nn.init.normal_(self.weight, std=1 / math.sqrt(in_features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Give the cosines, (samples, ..., out), of (samples, ..., in)."""
        return F.linear(F.normalize(x, dim=-1), F.normalize(self.weight))

    def extra_repr(self) -> str:
        """Show the sizes."""
        return f"in_features={self.in_features}, out_features={self.out_features}"


class GatheringLinear(nn.Module):
    """A linear map, or a slice of one, from (samples, ..., in) to (samples, ..., out).

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
        """Map (samples, ..., in) to (samples, ..., out)."""
        y: torch.Tensor = _Map.apply(x, self.weight, self.bias, self)
        return y

    def gather(self, gradient: torch.Tensor, x: torch.Tensor) -> None:
        """Add the weight's gradient, given the output's (rows, out) and the input (rows, in).

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


class GatheringCosine(GatheringLinear):
    """``CosineLinear``, or some of its classes, that adds its weight's gradient up where it lies.

    With u the embedding x over its length, w a class's vector and r one over its length, the cosine is
    ``c = r u w``, and for the gradient g of c::

        dw = sum g r u  -  (sum g c) r^2 w        (sums over samples)
        du = sum g r w  (over classes),           dx = (du - (du u) u) / |x|

    so that no normalised weight is ever made. ``du`` is a sum over classes, hence over shards, and dx is linear in
    it: shards sum dx. It computes in the weight's dtype, under autocast too: cosines of lower precision would blur
    the margin.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        """Take a parameter, or values for it."""
        super().__init__(weight, None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Give the cosines, (samples, ..., out), of (samples, ..., in)."""
        rows: torch.Tensor = _Cosines.apply(x.flatten(0, -2), self.weight, self)
        return rows.view(*x.shape[:-1], -1)

    def gather_cosines(self, gradient: torch.Tensor, unit: torch.Tensor, cosines: torch.Tensor) -> None:
        """Add the weight's gradient, given the output's, the unit embeddings and the output."""
        inverse = _inverse_lengths(self.weight)
        self.gather(gradient * inverse, unit)
        along = (gradient * cosines).sum(0).mul_(inverse).mul_(inverse)
        assert self.weight.grad is not None
        self.weight.grad.addcmul_(self.weight, along[:, None], value=-1)


def gathering(module: nn.Module, weight: torch.Tensor, bias: torch.Tensor | None) -> GatheringLinear:
    """Return what stands for a linear layer in a run, with the weight and bias of it or of a slice."""
    normalizes = isinstance(module, CosineLinear | GatheringCosine)
    return GatheringCosine(weight) if normalizes else GatheringLinear(weight, bias)


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
        rows = gradient.flatten(0, -2)
        of_bias = rows.sum(0, dtype=ctx.layer.bias.dtype) if ctx.needs_input_grad[2] else None
        of_input = (gradient @ weight.to(kind)).to(ctx.dtype) if weight is not None else None
        if x is not None:
            ctx.layer.gather(rows, x.flatten(0, -2).to(kind))
        return of_input, None, of_bias, None


_LEAST_LENGTH = 1e-12


def _inverse_lengths(rows: torch.Tensor) -> torch.Tensor:
    lengths: torch.Tensor = torch.linalg.vector_norm(rows, dim=1)
    return lengths.clamp_min_(_LEAST_LENGTH).reciprocal_()


def _unlowered(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Let no autocast touch what is computed; on the meta device there is none."""
    return contextlib.nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


class _Cosines(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, layer: GatheringCosine) -> torch.Tensor:
        ctx.layer, needs = layer, ctx.needs_input_grad
        with _unlowered(x.device):
            own = x.to(weight.dtype)
            unit = own * _inverse_lengths(own)[:, None]
            y = torch.mm(unit, weight.t()).mul_(_inverse_lengths(weight))
        ctx.save_for_backward(
            x if needs[0] or needs[1] else None, weight if needs[0] else None, y if needs[1] else None
        )
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, cosines = ctx.saved_tensors
        own = x.to(gradient.dtype)
        inverse = _inverse_lengths(own)[:, None]
        unit, of_input = own * inverse, None
        if weight is not None:
            toward = (gradient * _inverse_lengths(weight)) @ weight
            across = toward - (toward * unit).sum(1, keepdim=True) * unit
            of_input = across.mul_(inverse).to(x.dtype)
        if cosines is not None:
            ctx.layer.gather_cosines(gradient, unit, cosines)
        return of_input, None, None
