"""A bucket: the gradients of a block's parameters in one flat tensor, to be summed over those who hold them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from hybridpar.runtime.modules import Owned


class Bucket:
    """Flat gradients, of which the parameters' gradients are views.

    What autograd makes is copied there at the first backward, and later ones add to it. Gradients that a layer
    gathers by itself have their place from the start. A ``lasting`` bucket stays from step to step; another one
    lives from ``open``, or from the first gradient if that is earlier, until it is taken. It is earlier of a
    parameter that a layer of a later block uses too.

    Args:
        owned: trained parameters, in the order in which their gradients are to lie.
        lasting: whether it stays.

    """

    def __init__(self, owned: Sequence[Owned], *, lasting: bool) -> None:
        self._owned, self._lasting = list(owned), lasting
        self._numel = sum(o.tensor.numel() for o in self._owned)
        self.flat: torch.Tensor | None = None
        """All of it, while there is any."""
        self._places: dict[nn.Parameter, torch.Tensor] = {}
        for o in self._owned:
            if o.layer is None:
                o.tensor.register_post_accumulate_grad_hook(self._move)  # type: ignore[no-untyped-call]
        if lasting:
            self.open()

    def open(self) -> torch.Tensor:
        """Make room for gradients, unless there is; return all of it."""
        if self.flat is None:
            some = self._owned[0].tensor if self._owned else torch.empty(0)
            self.flat, at = some.new_empty(self._numel, requires_grad=False), 0
            for o in self._owned:
                # In the parameter's order in memory: fused optimizers run through both from end to end.
                place = self._places[o.tensor] = self.flat.as_strided(o.tensor.shape, o.tensor.stride(), at)
                at += o.tensor.numel()
                if o.layer is not None:
                    o.layer.home = place
        return self.flat

    def complete(self) -> torch.Tensor:
        """Return the flat gradients after the last backward; zeros where there was none."""
        flat = self.open()
        for parameter, place in self._places.items():
            if parameter.grad is None:  # the rank had no samples, or the loss does not depend on it
                parameter.grad = place.zero_()
        return flat

    def take(self) -> torch.Tensor:
        """Return the same, and let go of it unless it stays; the next backward begins anew."""
        flat = self.complete()
        if not self._lasting:
            for o in self._owned:
                o.tensor.grad = None
                if o.layer is not None:
                    o.layer.home = None
            self._places.clear()
            self.flat = None
        return flat

    def _move(self, parameter: nn.Parameter) -> None:
        """Move the gradient that autograd made of a parameter to its place, unless it lies there already."""
        self.open()
        place = self._places[parameter]
        if parameter.grad is not place:
            assert parameter.grad is not None
            parameter.grad = place.copy_(parameter.grad)
