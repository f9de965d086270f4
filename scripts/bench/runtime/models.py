"""The models that rivals train: equal weights for all, no dropout, so that their losses must agree."""

from __future__ import annotations

from itertools import accumulate, pairwise

import torch
import torchvision
from torch import nn

from hybridpar.model.chain import Chain

CHAIN_OF_LINEARS = "linears"
"""A model that computes next to nothing: what it takes is what its actions cost."""
CLASSES = {CHAIN_OF_LINEARS: 8}
IN_SHAPE = {CHAIN_OF_LINEARS: (8,)}
IMAGE = (3, 64, 64)


def build(name: str) -> nn.Module:
    """Return torchvision's model with random weights, the same ones each time."""
    torch.manual_seed(0)
    if name == CHAIN_OF_LINEARS:
        return nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    model: nn.Module = torchvision.models.get_model(name, weights=None)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def batch(name: str, samples: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the samples of every step, (samples, ...) and (samples,) int64; all ranks make the same ones."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(samples, *IN_SHAPE.get(name, IMAGE), generator=generator)
    return x, torch.randint(CLASSES.get(name, 1000), (samples,), generator=generator)


def optimizer(parameters: object) -> torch.optim.Optimizer:
    """Return what everybody updates with."""
    return torch.optim.SGD(parameters, lr=0.001, momentum=0.9, fused=True)  # type: ignore[arg-type]


def balanced(chain: Chain, parts: int) -> list[tuple[int, int]]:
    """Cut a chain into runs of layers with about equal numbers of operations."""
    done = list(accumulate(layer.flops_per_sample for layer in chain.layers))
    cuts = [0]
    for part in range(1, parts):
        nearest = min(range(len(done) - 1), key=lambda i: abs(done[i] - done[-1] * part / parts))
        cuts.append(max(nearest + 1, cuts[-1] + 1))
    return list(pairwise([*cuts, len(done)]))
