"""Where a captured graph can be cut: the points where exactly one tensor crosses, with the samples in dim 0."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from hybridpar.errors import ModelError
from hybridpar.generators import borrowed
from hybridpar.model.footprint import BATCHES, META_FAILURES, runnable, set_keys
from hybridpar.model.graph import module_of
from hybridpar.model.keyed import KeyedDropout, KeyedStochasticDepth, Keys
from hybridpar.model.shared_norm import SharedNorm

ELEMENTWISE = (
    nn.ReLU,
    nn.ReLU6,
    nn.GELU,
    nn.SiLU,
    nn.Tanh,
    nn.Sigmoid,
    nn.LeakyReLU,
    nn.ELU,
    nn.Hardswish,
    nn.Identity,
    KeyedDropout,
)
_SHAPE_KEEPING = (
    *ELEMENTWISE,
    KeyedStochasticDepth,
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    SharedNorm,
)
"""Their values need not be computed to know the shape; torch computes a batch norm on meta tensors slowly."""


@dataclass(frozen=True)
class _Value:
    shape: tuple[int, ...]
    dtype: torch.dtype


class _Shapes(fx.Interpreter):
    """Notes shape and dtype of every node's value, and on an error the node where it came up."""

    def __init__(self, captured: fx.GraphModule) -> None:
        super().__init__(captured)
        self.extra_traceback = False
        self.values: dict[str, _Value] = {}
        self.outputs: list[str] = []
        """What the graph returns, in words."""

    def run_node(self, n: fx.Node) -> Any:
        """Run one node and note its value."""
        try:
            value = super().run_node(n)
        except Exception as e:
            e.add_note(str(n.target))
            raise
        if isinstance(value, torch.Tensor):
            self.values[n.name] = _Value(tuple(value.shape), value.dtype)
        if n.op == "output":
            self.outputs = [_in_words(v) for v in (value if isinstance(value, tuple | list) else [value])]
        return value

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a module, unless its output's shape is that of its only input."""
        if type(self.fetch_attr(str(target))) in _SHAPE_KEEPING and len(args) == 1 and not kwargs:
            return torch.empty_like(args[0])
        return super().call_module(target, args, kwargs)


def cut(
    captured: fx.GraphModule, start: fx.Node, in_shape: tuple[int, ...], dtype: torch.dtype, name: str
) -> list[list[fx.Node]]:
    """Cut the nodes in order into runs; after each run its last node's value is the only one still needed.

    A dropout whose operand has other things than samples in dim 0 becomes torch's own again, without keys. Raises
    ModelError where the model fails for samples of ``in_shape``, or gives no single floating tensor with the
    samples in dim 0.
    """
    small, large = _shapes(captured, in_shape, dtype, name)
    valid = {node for node, value in small.values.items() if _samples_first(value, large.values.get(node))}
    nodes = [n for n in captured.graph.nodes if n.op not in {"placeholder", "get_attr", "output"}]
    output = next(n for n in captured.graph.nodes if n.op == "output")
    result = output.args[0]
    if not isinstance(result, fx.Node) or result.name not in valid or result is start:
        few, many = (" and ".join(shapes.outputs) for shapes in (small, large))
        raise ModelError(
            f"the output of {name} is not one floating tensor with the samples in dim 0: for {BATCHES[0]} samples "
            f"it gives {few}, for {BATCHES[1]} {many}; wrap the model so that its forward gives one such tensor "
            "in training mode (no auxiliary outputs)"
        )
    for node in nodes:
        part = module_of(captured, node)
        if type(part) is KeyedDropout and node.all_input_nodes[0].name not in valid:
            captured.set_submodule(str(node.target), nn.Dropout(part.p))
    return _runs(nodes[: nodes.index(result) + 1], start, output, valid)


def _runs(nodes: list[fx.Node], start: fx.Node, output: fx.Node, valid: set[str]) -> list[list[fx.Node]]:
    place = {node: i for i, node in enumerate(nodes)}
    place[output] = len(nodes)
    last_use = {n: max((place.get(u, -1) for u in n.users), default=-1) for n in [start, *nodes]}
    runs: list[list[fx.Node]] = [[]]
    live = {start}
    for i, node in enumerate(nodes):
        runs[-1].append(node)
        live = {n for n in live | {node} if last_use[n] > i}
        if live == {node} and node.name in valid and node is not nodes[-1]:
            runs.append([])
    return runs


def _shapes(
    captured: fx.GraphModule, in_shape: tuple[int, ...], dtype: torch.dtype, name: str
) -> tuple[_Shapes, _Shapes]:
    """Run the graph at two batch sizes, on the CPU where it reads values."""
    try:
        return _run(captured, in_shape, dtype, "meta")
    except META_FAILURES:
        pass
    except Exception as e:
        raise _failure(e, in_shape, name) from e
    try:
        return _run(captured, in_shape, dtype, "cpu")
    except Exception as e:
        raise _failure(e, in_shape, name) from e


def _failure(error: Exception, in_shape: tuple[int, ...], name: str) -> ModelError:
    where = "".join(getattr(error, "__notes__", ["its input"]))
    return ModelError(
        f"{name} fails at {where} for a sample of shape {in_shape}: {error}; set model.in_shape to what the model "
        "takes (and model.input_dtype=int for token ids)"
    )


def _run(
    captured: fx.GraphModule, in_shape: tuple[int, ...], dtype: torch.dtype, device: str
) -> tuple[_Shapes, _Shapes]:
    copy = runnable(captured, device)
    if not isinstance(copy, fx.GraphModule):
        raise TypeError("a copy of a graph is a graph")
    small, large = _Shapes(copy), _Shapes(copy)
    with borrowed(), torch.device(device), torch.no_grad():
        for samples, shapes in zip(BATCHES, (small, large), strict=True):
            set_keys(copy, Keys(0, 0, torch.arange(samples)))
            shapes.run(torch.zeros(samples, *in_shape, dtype=dtype))
    set_keys(copy, None)
    return small, large


def _samples_first(small: _Value, large: _Value | None) -> bool:
    if large is None or not small.dtype.is_floating_point:
        return False
    return small.shape[:1] == BATCHES[:1] and large.shape == (BATCHES[1], *small.shape[1:])


def _in_words(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"
