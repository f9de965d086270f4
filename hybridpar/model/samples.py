"""That a layer works on each sample by itself.

A plan cuts a batch anywhere between two samples, so what a layer gives for one must not depend on the others.
Batch normalisation is the known exception and runs with its running statistics here.
"""

from __future__ import annotations

import re

import torch
from torch import fx, nn
from torch.utils._pytree import tree_leaves, tree_map

from hybridpar.errors import ModelError
from hybridpar.generators import borrowed
from hybridpar.model.chain import Layer
from hybridpar.model.copies import blank
from hybridpar.model.cut import ELEMENTWISE
from hybridpar.model.footprint import META_FAILURES, remedy, runnable
from hybridpar.model.keyed import KeyedStochasticDepth
from hybridpar.model.linear import CosineLinear
from hybridpar.model.shared_norm import SharedNorm

LARGEST_FLOPS = 5e9
"""Of one sample's forward. A layer that needs more is not run: all of them together would take long."""

_BY_SAMPLE_MODULES = (
    *ELEMENTWISE,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    SharedNorm,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.Linear,
    CosineLinear,
    nn.Embedding,
    nn.Hardsigmoid,
    nn.Dropout,
    KeyedStochasticDepth,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d,
)
_BY_SAMPLE_FUNCTIONS = (
    *("add", "iadd", "mul", "imul", "sub", "relu", "relu6", "gelu", "silu", "sigmoid", "tanh", "hardswish"),
    *("linear", "layer_norm", "group_norm", "adaptive_avg_pool2d", "avg_pool2d", "max_pool2d"),
)
_BY_SAMPLE_OVER_DIMS = ("flatten", "cat", "mean", "transpose", "chunk")
"""Where their dims are all above 0."""


def check_samples(
    part: nn.Module, nodes: list[fx.Node], layer: Layer, in_dtype: torch.dtype, checked: set[str]
) -> None:
    """Run a layer that may mix samples on two, one of which is not a number, and see whether the other one stays.

    Layers of whose operations it is known are not run, nor those that take integers, that need more than
    ``LARGEST_FLOPS``, or that a CPU cannot run. ``checked`` gathers layers that were run; one that is made of the
    same operations is not run again. Influence of a later sample on an earlier one alone is not seen. Raises
    ModelError where an output depends on the other sample, or one sample alone gives another shape.
    """
    if not in_dtype.is_floating_point or all(_is_by_sample(part, node) for node in nodes):
        return
    recipe = _recipe(part, nodes, layer)
    if recipe in checked:
        return
    checked.add(recipe)
    _check_single(part, layer, in_dtype)
    if layer.flops_per_sample > LARGEST_FLOPS:
        return
    copied = blank(part, "cpu").eval()
    with borrowed(), torch.no_grad():
        x = torch.ones(2, *layer.in_shape, dtype=in_dtype)
        x[0] = torch.nan
        spoiled = _second(copied, x)
        if spoiled is None or not spoiled.isnan().any():
            return
        clean = _second(copied, torch.ones_like(x))
    if clean is not None and not clean.isnan().any():
        raise ModelError(
            f"layer {layer.name} mixes samples: what it gives for one depends on the others in the batch; "
            f"{remedy(part)}"
        )


def _second(module: nn.Module, x: torch.Tensor) -> torch.Tensor | None:
    """Give the output for the second sample, or None where a CPU cannot run the module, or not on such values."""
    try:
        out = module(x.clone())
    except Exception:  # noqa: BLE001 - it ran on the meta device, and the CPU's word on it is not needed
        return None
    return out[1] if isinstance(out, torch.Tensor) else None


def _check_single(part: nn.Module, layer: Layer, in_dtype: torch.dtype) -> None:
    """Refuse a layer that loses dim 0 for one sample, as squeeze does; plans have such micro-batches."""
    copied = runnable(part, "meta").eval()
    with torch.no_grad(), torch.device("meta"):
        try:
            out = copied(torch.empty(1, *layer.in_shape, dtype=in_dtype))
        except META_FAILURES:
            return
        finally:
            copied.train()
    if out.shape != (1, *layer.out_shape):
        raise ModelError(
            f"layer {layer.name} turns a batch of one sample into {tuple(out.shape)} instead of "
            f"{(1, *layer.out_shape)}; tell squeeze, view and the like which dims they work on"
        )


def _is_by_sample(part: nn.Module, node: fx.Node) -> bool:
    if node.op == "call_module":
        module = part.get_submodule(str(node.target)) if isinstance(part, fx.GraphModule) else part
        return type(module) in _BY_SAMPLE_MODULES
    function = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    numbers = [n for n in tree_leaves((node.args[1:], node.kwargs)) if type(n) is int]
    if function == "permute":
        return numbers[:1] == [0]
    if function in _BY_SAMPLE_OVER_DIMS:
        return bool(numbers) and min(numbers) > 0
    return node.op == "call_function" and function in _BY_SAMPLE_FUNCTIONS


def _recipe(part: nn.Module, nodes: list[fx.Node], layer: Layer) -> str:
    """Say which operations a layer consists of, without the names of its tensors."""
    places = {node: f"%{i}" for i, node in enumerate(nodes)}
    lines = [str(layer.in_shape), str(layer.out_shape), *(str(p.shape) for p in layer.parameters)]
    for node in nodes:
        if node.target is torch._assert:  # noqa: SLF001 - its message has names of values in it
            continue
        called = str(node.target)
        if node.op == "call_module":
            called = str(part.get_submodule(called) if isinstance(part, fx.GraphModule) else part)
        arguments = tree_map(
            lambda v: places.get(v, "%x") if isinstance(v, fx.Node) else v, (node.args, node.kwargs)
        )
        lines.append(f"{called} {arguments}")
    # The number of a dropout is not what it does.
    return re.sub(r", layer=\d+\)", ")", "\n".join(lines))
