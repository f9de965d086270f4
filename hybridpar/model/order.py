"""The order of a tensor's elements in memory: that of its dims, or with the channels last.

A tensor of images (samples, channels, height, width) with its channels last lies in memory as
(samples, height, width, channels) does. Its shape is the same, but it is not contiguous: what sends it, or runs
through bare memory, has to see its dims in their order there.
"""

from __future__ import annotations

import math

import torch
from torch import nn

_IMAGES = 4
"""Dims of what may have its channels last."""


def channels_last(tensor: torch.Tensor) -> bool:
    """Whether a tensor lies with its channels last; one of a single channel or position lies both ways."""
    apart = tensor.dim() == _IMAGES and not tensor.is_contiguous()
    return apart and tensor.is_contiguous(memory_format=torch.channels_last)


def ordered(tensor: torch.Tensor, *, last: bool) -> torch.Tensor:
    """Return a tensor whose elements lie densely in the order of its dims, or with the channels ``last``.

    It is the given one where that lies so already.
    """
    return tensor.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def in_memory(tensor: torch.Tensor, *, last: bool) -> torch.Tensor:
    """Return a view with the dims in the order in which the elements lie, if the channels lie ``last`` or not."""
    return tensor.permute(0, 2, 3, 1) if last else tensor


def stays_last(module: nn.Module, out_shape: tuple[int, ...], *, entered: bool) -> bool:
    """Whether a layer's output, of ``out_shape`` per sample, has its channels last and does not lie both ways.

    It has where its input ``entered`` so, or where it has weights that are turned: torch's kernels for images keep
    the order of what they are given, weights included. What a stage hands on is brought into the order said here,
    so that a layer with an order of its own costs a copy there.
    """
    image = len(out_shape) == _IMAGES - 1 and out_shape[0] > 1 and math.prod(out_shape[1:]) > 1
    return image and (entered or any(p.dim() == _IMAGES for p in module.parameters()))


def turned(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor with its channels last if it has any, else as it is.

    Also one of a single position, which lies both ways, is told by its strides to have them last.
    """
    if tensor.dim() != _IMAGES:
        return tensor
    return torch.empty_like(tensor, memory_format=torch.channels_last).copy_(tensor)


def turn(module: nn.Module) -> nn.Module:
    """Give the parameters and buffers of a module their channels last, where they have any; returns the module."""
    with torch.no_grad():
        module._apply(turned)  # type: ignore[no-untyped-call]  # noqa: SLF001 - Module.to() fails on other dims
    return module
