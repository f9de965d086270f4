"""From a module to an fx graph that can be cut: traced, free of in-place operations, with keyed dropout."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from hybridpar.errors import ModelError
from hybridpar.model.copies import share
from hybridpar.model.expand import expansion
from hybridpar.model.keyed import KeyedDropout, KeyedStochasticDepth
from hybridpar.model.linear import CosineLinear
from hybridpar.model.shared_norm import share_norms


class _Tracer(fx.Tracer):
    """Traces into everything but torch's own modules, our linear layers and what turned out to be untraceable."""

    proxy_buffer_attributes = True
    """What is computed from a buffer is part of the graph, not a constant of the time of tracing."""

    def __init__(self, opaque: set[str]) -> None:
        super().__init__()
        self._opaque = opaque
        self.failed: str | None = None
        """The innermost module in which tracing failed."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Tell whether a call of ``m`` stays one node."""
        if module_qualified_name in self._opaque or isinstance(m, CosineLinear):
            return True
        return expansion(m) is None and super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Trace one call and note where it fails."""
        expanded = expansion(m)
        if expanded is not None and self.path_of_module(m) not in self._opaque:
            forward = functools.partial(expanded, m)
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            if self.failed is None:
                self.failed = self.path_of_module(m)
            raise


def capture(module: nn.Module, name: str, first_dropout: int = 0) -> fx.GraphModule:
    """Trace ``module`` in training mode into a graph whose values are all out of place.

    The result holds the very tensors of ``module``, which itself is not changed. Dropout and stochastic depth are
    replaced by keyed ones, numbered in the order of the calls from ``first_dropout`` on, and batch norms over
    several ranks by ``SharedNorm``. A submodule that fx cannot trace stays one node. Control flow over
    ``self.training`` in the model's own code is fixed as in training. Raises ModelError.
    """
    root = share(module).train()
    graph = _trace(root, name)
    captured = fx.GraphModule(root, graph)
    for node in list(graph.nodes):
        _to_out_of_place(captured, node)
    _key_dropout(captured, first_dropout)
    share_norms(captured)
    for part in captured.modules():
        if getattr(part, "inplace", False) is True:
            vars(part)["inplace"] = False
    graph.lint()
    captured.recompile()
    return captured


def input_node(captured: fx.GraphModule, name: str) -> fx.Node:
    """Find the one input that a chain takes, and drop those that nobody uses.

    Raises ModelError where the model uses another number of inputs.
    """
    inputs = [n for n in captured.graph.nodes if n.op == "placeholder"]
    used: list[fx.Node] = [n for n in inputs if n.users]
    if len(used) != 1:
        names = ", ".join(n.name for n in used) or "none"
        raise ModelError(
            f"{name} uses {len(used)} inputs ({names}), but model.in_shape gives the shape of one tensor; "
            "give one shape per input, as in [[3,32,32],[8]]"
        )
    for unused in set(inputs) - set(used):
        captured.graph.erase_node(unused)
    captured.recompile()
    return used[0]


def module_of(captured: nn.Module, node: fx.Node) -> nn.Module | None:
    """Give the submodule that ``node`` calls, if it calls one."""
    return captured.get_submodule(str(node.target)) if node.op == "call_module" else None


def _trace(root: nn.Module, name: str) -> fx.Graph:
    opaque: set[str] = set()
    while True:
        tracer = _Tracer(opaque)
        try:
            return tracer.trace(root)
        except Exception as e:
            if tracer.failed is None or tracer.failed in opaque:
                where = f"{name} ({type(root).__name__}.forward)"
                raise ModelError(
                    f"cannot trace {where}: {type(e).__name__}: {e}; move the control flow that depends on a "
                    "tensor's values into a submodule of its own, wrap the function with torch.fx.wrap, write the "
                    "model as nn.Sequential, or name its layers in a method hybridpar_layers (docs/models.md)"
                ) from e
            opaque |= set(_alike(root, tracer.failed))


def _alike(root: nn.Module, path: str) -> Iterator[str]:
    """Paths of the modules that will fail as the one at ``path`` did: those of its own class."""
    kind = type(root.get_submodule(path))
    yield path
    if kind.__module__.startswith("torch.nn"):
        return
    for other, part in root.named_modules():
        if type(part) is kind and other:
            yield other


def _to_out_of_place(captured: fx.GraphModule, node: fx.Node) -> None:
    """Turn an in-place operation into one that gives a new value; later uses of the old value take the new one.

    A cut may lie before the operation, and then its operand belongs to somebody else.
    """
    if not _drop_in_place(captured, node):
        return
    operand = node.args[0] if node.args else next(iter(node.kwargs.values()))
    if isinstance(operand, fx.Node):
        operand.replace_all_uses_with(node, delete_user_cb=lambda user: user is not node and node < user)


def _drop_in_place(captured: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        return getattr(module_of(captured, node), "inplace", False) is True
    if node.op == "call_method":
        method = str(node.target)
        if method.endswith("_") and not method.endswith("__") and hasattr(torch.Tensor, method[:-1]):
            node.target = method[:-1]
            return True
        return False
    if node.op != "call_function" or not callable(node.target):
        return False
    function = getattr(node.target, "__name__", "")
    for home in (torch, F):
        if function.endswith("_") and getattr(home, function, None) is node.target:
            node.target = getattr(home, function[:-1])
            return True
    if node.kwargs.get("inplace"):
        node.kwargs = {**node.kwargs, "inplace": False}
        return True
    return False


def _key_dropout(captured: fx.GraphModule, count: int) -> None:
    """Put a keyed module of its own in the place of every dropout call, also inside modules that stay one node."""
    for node in list(captured.graph.nodes):
        found = _dropout_of(captured, node)
        if found is not None:
            kind, p, operand = found
            path = _free_path(captured, node, count)
            captured.add_submodule(path, kind(p, count))
            node.op, node.target, node.args, node.kwargs = "call_module", path, (operand,), {}
            count += 1
            continue
        part = module_of(captured, node)
        for path, child in list(part.named_modules()) if part is not None else ():
            inner = _keyed_kind(child)
            if inner is not None and part is not None and path:
                part.set_submodule(path, inner(child.p, count))
                count += 1


def _free_path(captured: fx.GraphModule, node: fx.Node, count: int) -> str:
    """Choose where the dropout of ``node`` goes: its own module's place, unless other calls share that."""
    path = str(node.target) if node.op == "call_module" else node.name
    calls = sum(n.op == "call_module" and n.target == path for n in captured.graph.nodes)
    free = calls == 1 if node.op == "call_module" else not hasattr(captured, path)
    return path if free else f"{path}_call{count}"


def _dropout_of(captured: fx.GraphModule, node: fx.Node) -> tuple[type[KeyedDropout], float, Any] | None:
    """Give what replaces ``node``, the probability and the operand, where it is dropout that acts in training."""
    part: Any = module_of(captured, node)
    if part is not None:
        kind = _keyed_kind(part)
        return None if kind is None else (kind, part.p, (*node.args, *node.kwargs.values())[0])
    if node.op != "call_function" or not (node.target in {F.dropout, torch.dropout} or _is_depth(node.target)):
        return None
    if _is_depth(node.target):
        kind, names = KeyedStochasticDepth, ("input", "p", "mode", "training")
    else:
        kind = KeyedDropout
        names = ("input", "p", "train" if node.target is torch.dropout else "training", "inplace")
    values: dict[str, Any] = {
        "p": 0.5,
        "train": True,
        "training": True,
        **dict(zip(names, node.args, strict=False)),
        **node.kwargs,
    }
    acts = values["training"] is True and values["train"] is True and values.get("mode", "row") == "row"
    if not acts or not isinstance(values["p"], int | float):
        return None
    return kind, float(values["p"]), values["input"]


def _keyed_kind(part: Any) -> type[KeyedDropout] | None:
    """Give the keyed module that takes the place of a module; a draw for the whole batch has none."""
    if type(part) is nn.Dropout:
        return KeyedDropout
    if type(part).__name__ == "StochasticDepth" and _is_torchvision(type(part)) and part.mode == "row":
        return KeyedStochasticDepth
    return None


def _is_depth(target: Any) -> bool:
    return getattr(target, "__name__", "") == "stochastic_depth" and _is_torchvision(target)


def _is_torchvision(thing: Any) -> bool:
    # By name: a model that has it has imported torchvision, and others need not wait for that.
    return str(getattr(thing, "__module__", "")).startswith("torchvision.ops")
