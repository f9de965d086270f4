"""Copies of modules that share, or leave out, the original's tensors."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from hybridpar.generators import borrowed


def tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    """Every distinct tensor that the module tree holds: parameters, buffers and plain attributes."""
    seen: set[int] = set()
    for part in module.modules():
        for held in (part._parameters, part._buffers, vars(part)):  # noqa: SLF001 - the three places of tensors
            for value in held.values():
                if isinstance(value, torch.Tensor) and id(value) not in seen:
                    seen.add(id(value))
                    yield value


def named_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters, then buffers (unsaved ones too), by full name; a tied tensor under each of its names."""
    named: dict[str, torch.Tensor] = dict(module.named_parameters(remove_duplicate=False))
    named.update(module.named_buffers(remove_duplicate=False))
    return named


def share(module: nn.Module) -> nn.Module:
    """Copy the module tree; the copy holds the very same tensors, so that no weight is copied."""
    memo: dict[int, Any] = {id(t): t for t in tensors(module)}
    return copy.deepcopy(module, memo)


def blank(module: nn.Module, device: str) -> nn.Module:
    """Copy the module tree with zeros of the same shapes and dtypes on ``device`` in place of its tensors.

    On ``"meta"`` nothing is allocated. Tied tensors stay tied.
    """
    memo: dict[int, Any] = {id(t): _blank_tensor(t, device) for t in tensors(module)}
    return copy.deepcopy(module, memo)


def _blank_tensor(tensor: torch.Tensor, device: str) -> torch.Tensor:
    empty = torch.zeros_like(tensor, device=device, requires_grad=False)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(empty, requires_grad=tensor.requires_grad)
    return empty


def randomized(module: nn.Module, seed: int) -> nn.Module:
    """Copy the module tree to the CPU with random numbers, that keep a value's magnitude, in its floating tensors.

    Other tensors, which are indices and masks, keep their values where they have any and are zeros else. Leaves
    torch's generators as they were.
    """
    copied = blank(module, "cpu")
    with borrowed(seed), torch.no_grad():
        for old, new in zip(tensors(module), tensors(copied), strict=True):
            if not new.is_floating_point():
                if not old.is_meta:
                    new.copy_(old)
            elif new.ndim > 1:
                new.normal_(0.0, 1 / math.sqrt(max(1, new[0].numel())))
            else:
                new.uniform_(0.5, 1.5)
    return copied
