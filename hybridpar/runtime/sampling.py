"""Sampled classes: in each training step a head has only some of its classes (Partial FC, An et al., CVPR 2022).

A class takes part in a step if a label of the step is of it, or if ``hash(seed, step, class)`` is below a share.
So it is drawn for itself, whoever holds it: one process, or any shards. (The paper has every shard take exactly
``max(positives, share * classes of the shard)``, which depends on the shards.)
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from hybridpar.model.keyed import Keys, keep_mask
from hybridpar.model.linear import GatheringLinear, gathering

_DRAW = -1
"""What tells the draw apart from a model's dropouts, which are numbered from 0."""


class SampledHead(nn.Module):
    """A linear layer, or some of its classes, for which in training a layer with rows of it stands in.

    Args:
        layer: (classes, features), of the classes from ``first`` on.
        first: its first class.

    """

    def __init__(self, layer: GatheringLinear, first: int) -> None:
        super().__init__()
        self.layer, self.first = layer, first
        self.standing: GatheringLinear | None = None
        """Between a step's draw and its update: copies of the rows that take part, and their gradients."""
        self.classes = torch.empty(0, dtype=torch.int64)
        """Of the last draw, ascending, (rows,)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (samples, ..., in) to (samples, ..., rows) in training, to (samples, ..., classes) else."""
        layer = self.standing if self.training and self.standing is not None else self.layer
        y: torch.Tensor = layer(x)
        return y

    def draw(self, seed: int, step: int, share: float, labels: torch.Tensor) -> None:
        """Choose the classes of a step: those of ``labels``, all that count in it, and a share of the rest."""
        weight = self.layer.weight
        classes = torch.arange(self.first, self.first + len(weight), device=weight.device)
        taken = keep_mask(Keys(seed, step, classes), _DRAW, 1 - share, (1,))[:, 0]
        own = labels[(labels >= self.first) & (labels < self.first + len(weight))]
        taken[own - self.first] = True
        self.classes = classes[taken]
        rows, bias = self.classes - self.first, self.layer.bias
        self.standing = gathering(self.layer, weight.detach()[rows], None if bias is None else bias.detach()[rows])
        for whole, part in zip(self.layer.parameters(), self.standing.parameters(), strict=True):
            part.requires_grad_(whole.requires_grad)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Step the optimizer of the layer and of others, and let go of the rows."""
        assert self.standing is not None
        parts = dict(zip(self.layer.parameters(), self.standing.parameters(), strict=True))
        step_rows(optimizer, parts, self.classes - self.first)
        self.standing = None


def step_rows(
    optimizer: torch.optim.Optimizer, parts: Mapping[nn.Parameter, nn.Parameter], rows: torch.Tensor
) -> None:
    """Step an optimizer, of some parameters only in some rows.

    ``parts`` has these rows, with their gradients. Other rows keep their values and their state, whatever
    momentum or decay would do; a count of steps is the parameter's. State that is made for a part begins with
    zeros in other rows.
    """
    _exchange(optimizer, parts)
    for whole, part in parts.items():
        if whole in optimizer.state:
            state = optimizer.state[whole].items()
            optimizer.state[part] = {k: v[rows] if _is_like(v, whole) else v for k, v in state}
    optimizer.step()
    _exchange(optimizer, {part: whole for whole, part in parts.items()})
    with torch.no_grad():
        for whole, part in parts.items():
            whole.index_copy_(0, rows, part)
            for key, value in optimizer.state.pop(part, {}).items():
                state = optimizer.state[whole]
                if not _is_like(value, part):
                    state[key] = value
                    continue
                if key not in state:
                    state[key] = torch.zeros_like(whole)
                state[key].index_copy_(0, rows, value)


def _exchange(optimizer: torch.optim.Optimizer, others: Mapping[nn.Parameter, nn.Parameter]) -> None:
    for group in optimizer.param_groups:
        group["params"] = [others.get(p, p) for p in group["params"]]


def _is_like(value: object, parameter: nn.Parameter) -> bool:
    return isinstance(value, torch.Tensor) and value.shape == parameter.shape
