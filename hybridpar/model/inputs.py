"""Models that take several tensors: a sample's stand one after the other in a row, which the first layer divides.

So one tensor enters the chain, as one crosses everywhere else in it. The row is floating: floats are in it as they
are, integers exactly (up to ``EXACT``), and truth values as 0 and 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from hybridpar.errors import DataError, ModelError
from hybridpar.model.chain import Input, InputKind

EXACT = 2**24
"""Largest size of an integer: up to it float32 has all of them."""

Shapes = Sequence[int] | Sequence[Sequence[int]]
Kinds = InputKind | Sequence[InputKind]


def several(in_shape: Shapes, kinds: Kinds) -> tuple[Input, ...]:
    """Return the inputs that shapes and kinds describe, yet without names; () for a single tensor.

    Raises ModelError where there are not as many kinds as shapes.
    """
    shapes = _shapes(in_shape)
    if not shapes and isinstance(kinds, str):
        return ()
    given = [kinds] * len(shapes) if isinstance(kinds, str) else list(kinds)
    if len(shapes) != len(in_shape) or len(given) != len(shapes):
        raise ModelError(
            f"model.in_shape {list(in_shape)} and model.input_dtype {kinds} do not go together; give one shape "
            "and one kind per tensor, as in [[3,32,32],[8]] and [float,int]"
        )
    return tuple(Input("", shape, kind) for shape, kind in zip(shapes, given, strict=True))


def all_shapes(in_shape: Shapes) -> tuple[tuple[int, ...], ...]:
    """Return the shapes of all tensors, also where it is a single one."""
    return _shapes(in_shape) or (tuple(n for n in in_shape if isinstance(n, int)),)


def _shapes(in_shape: Shapes) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(shape) for shape in in_shape if not isinstance(shape, int))


def unite(captured: fx.GraphModule, given: Sequence[Input], name: str) -> tuple[fx.Node, tuple[Input, ...]]:
    """Let a graph take its inputs from the rows of one tensor; return that, and the inputs with their names.

    Inputs that nobody uses are dropped. Raises ModelError where the graph uses another number of them.
    """
    graph = captured.graph
    old = [n for n in graph.nodes if n.op == "placeholder"]
    used = [n for n in old if n.users]
    if len(used) != len(given):
        raise ModelError(
            f"{name} uses {len(used)} inputs ({', '.join(str(n.target) for n in used)}), but model.in_shape gives "
            f"{len(given)} shapes; give one per input, in their order"
        )
    named = tuple(replace(g, name=str(n.target)) for g, n in zip(given, used, strict=True))
    with graph.inserting_before(old[0]):
        packed = graph.placeholder("packed")
    begin, last = 0, packed
    for one, node in zip(named, used, strict=True):
        with graph.inserting_after(last):
            last = graph.call_function(unpack, (packed, begin, one.shape, one.kind))
        node.replace_all_uses_with(last)
        begin += one.elements
    for node in old:
        graph.erase_node(node)
    captured.recompile()
    return packed, named


def unpack(packed: Tensor, begin: int, shape: tuple[int, ...], kind: InputKind) -> Tensor:
    """Return one input (samples, *shape) from rows (samples, elements), in which it stands from ``begin`` on."""
    part = packed[:, begin : begin + math.prod(shape)].reshape(packed.shape[0], *shape)
    if kind == "float":
        return part
    return part.to(torch.int64) if kind == "int" else part != 0


def pack(inputs: Sequence[Input], given: Any, dims: int, what: str) -> Tensor:
    """Return several tensors as rows, (elements,) for a sample and (samples, elements) for ``dims`` 1 of samples.

    ``given`` is a sequence in the order of the inputs, or a mapping by their names. Raises DataError for other
    tensors; ``what`` has them.
    """
    tensors = [given.get(i.name) for i in inputs] if isinstance(given, Mapping) else list(given)
    if len(tensors) != len(inputs) or len(given) != len(inputs):
        names = ", ".join(i.name for i in inputs)
        raise DataError(f"{what} has {len(given)} inputs, but the model takes {len(inputs)}: {names}; give these")
    rows = [_row(one, tensor, dims, what) for one, tensor in zip(inputs, tensors, strict=True)]
    dtype = max((r.dtype for r in rows), key=lambda d: d.itemsize)
    return torch.cat([r.to(dtype) for r in rows], dim=dims)


def _row(one: Input, tensor: Any, dims: int, what: str) -> Tensor:
    fits = (
        isinstance(tensor, Tensor) and tensor.shape[dims:] == one.shape and tensor.dim() == dims + len(one.shape)
    )
    floating = fits and tensor.is_floating_point()
    if not fits or floating != (one.kind == "float"):
        found = f"{tuple(tensor.shape)} of {tensor.dtype}" if isinstance(tensor, Tensor) else type(tensor).__name__
        raise DataError(
            f"{what}: input {one.name} is {found}, but the model takes {one.shape} of {one.kind} per sample"
        )
    if not floating and tensor.numel() and int(tensor.abs().max() if one.kind == "int" else 0) > EXACT:
        raise DataError(f"{what}: input {one.name} has an integer above {EXACT}; renumber it")
    row: Tensor = tensor if floating else tensor.to(torch.float32)
    return row.reshape(*row.shape[:dims], one.elements)
