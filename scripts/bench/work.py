"""The work that contestants share: one model, its initial weights, the samples of every step, one optimizer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from hybridpar.model.copies import blank, named_tensors
from hybridpar.model.deferred import Source
from hybridpar.model.keyed import KeyedDropout
from hybridpar.model.trace import Traced, trace

UPDATES: dict[str, dict[str, bool]] = {
    "fused": {"fused": True},
    "foreach": {"foreach": True},
    "loop": {"foreach": False},
}
"""How torch's SGD goes through the parameters."""


@dataclass(frozen=True)
class Work:
    """What everybody trains, on the same samples and from the same weights."""

    source: Source
    """The model with its dropouts as they are, and its initial weights, made by those who hold them."""
    traced: Traced
    """Its layers."""
    global_batch: int
    """Samples per step."""
    rate: float
    """Learning rate."""
    seed: int = 0
    """Of weights and samples."""
    dropout: bool = False
    """Whether the model's dropouts drop: each contestant's own way, so that losses agree only without."""
    dtype: torch.dtype = torch.float32
    """Of parameters, samples and computation."""

    def channels_last(self) -> Work:
        """Return the same work for who has images and weights so in memory."""
        chain, module = self.traced.chain, self.source.module
        return replace(self, traced=trace(module, chain.in_shape, chain.model, memory_format="channels_last"))

    def whole(self) -> nn.Module:
        """Return the model with its initial weights."""
        module = blank(self.source.module, "cpu").to(self.dtype)
        self._fill(module, {name: name for name in named_tensors(module)})
        return module

    def part(self, first: int, last: int) -> nn.Sequential:
        """Return the layers from ``first`` up to ``last`` with their initial weights, and torch's own dropouts."""
        layers = []
        for index in range(first, last):
            layer = blank(self.traced.modules[index], "cpu").to(self.dtype)
            self._fill(layer, self.traced.names[index])
            layers.append(_unkeyed(layer))
        return nn.Sequential(*layers)

    def silence(self, module: nn.Module) -> None:
        """Stop the dropouts of a module, unless they are to drop."""
        if not self.dropout:
            for dropout in module.modules():
                if isinstance(dropout, nn.Dropout | KeyedDropout):
                    dropout.p = 0.0

    def samples(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return all samples of a step, (samples, ...) and (samples,) int64; every rank makes the same ones."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        chain = self.traced.chain
        x = torch.randn(self.global_batch, *chain.in_shape, generator=generator).to(self.dtype)
        return x, torch.randint(chain.classes, (self.global_batch,), generator=generator)

    def sgd(self, parameters: Iterable[Any], update: str = "fused") -> torch.optim.Optimizer:
        """Return the optimizer that everybody updates with; ``update`` is one of ``UPDATES``."""
        return torch.optim.SGD(parameters, lr=self.rate, momentum=0.9, **UPDATES[update])

    def _fill(self, module: nn.Module, names: dict[str, str]) -> None:
        """Give a module its initial weights; ``names`` are those in the model, by those in the module."""
        with torch.no_grad():
            for name, tensor in named_tensors(module).items():
                tensor.copy_(self.source.materialize(names[name], self.seed, self.dtype))
        self.silence(module)


def _unkeyed(layer: nn.Module) -> nn.Module:
    """Return a layer with torch's dropouts in place of those that need keys."""
    if isinstance(layer, KeyedDropout):
        return nn.Dropout(layer.p)
    for name, child in layer.named_children():
        setattr(layer, name, _unkeyed(child))
    return layer
