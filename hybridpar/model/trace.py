"""From a module to a chain: single-tensor cut points, one executable module per layer, and what each one needs."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeGuard, cast

import torch
from torch import fx, nn

from hybridpar.errors import ModelError
from hybridpar.model.chain import Autocast, Chain, Input, Layer, Linear, MemoryFormat, Parameter
from hybridpar.model.copies import named_tensors
from hybridpar.model.cut import ELEMENTWISE, cut
from hybridpar.model.footprint import Entering, Footprint, measure
from hybridpar.model.graph import capture, input_node, module_of
from hybridpar.model.inputs import Kinds, Shapes, several, unite
from hybridpar.model.keyed import KeyedDropout, KeyedStochasticDepth
from hybridpar.model.linear import CosineLinear, gathering
from hybridpar.model.named import METHOD, Named, Naming, compare, named_layers
from hybridpar.model.order import stays_last
from hybridpar.model.samples import check_samples
from hybridpar.model.shared_norm import check_kinds

_POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
_ELEMENTWISE_FUNCTIONS = {"relu", "relu6", "gelu", "silu", "tanh", "sigmoid", "leaky_relu", "elu", "hardswish"}
_POOL_FUNCTIONS = {"max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d"}
_KEYED_KINDS: dict[type[nn.Module], str] = {KeyedDropout: "Dropout", KeyedStochasticDepth: "StochasticDepth"}
_SHAPE_READS = {"size", "getattr", "getitem"}


@dataclass(frozen=True)
class Traced:
    """A chain with one executable module per layer."""

    chain: Chain
    modules: tuple[nn.Module, ...]
    """Each takes one tensor (samples, *in_shape) and gives one (samples, *out_shape); in training mode."""
    names: tuple[dict[str, str], ...]
    """For each layer: local name of a parameter or buffer -> its full name in the model. A tied parameter goes by
    its first name everywhere. Buffers that a state dict leaves out are named too."""

    @property
    def frozen(self) -> tuple[str, ...]:
        """Parameters that are not to be trained, as the modules are now; ``chain`` has those of the tracing."""
        return _frozen(self.modules, self.names)


def trace(
    module: nn.Module,
    in_shape: Shapes,
    name: str,
    input_dtype: Kinds = "float",
    layers: Naming | None = None,
    autocast: Autocast | None = None,
    memory_format: MemoryFormat | None = None,
) -> Traced:
    """Cut ``module`` into a chain of layers wherever exactly one tensor crosses, and measure each layer.

    ``in_shape`` is the shape of one input sample; or several, one per tensor that the model takes, with one
    ``input_dtype`` for all or one each (``model/inputs.py``). The module may be on any device, also on meta: its
    weights are neither changed nor copied, and the layers hold the very same parameters. Dropout becomes keyed,
    in-place activations become out of place. Layers are measured in training mode.

    Where ``layers`` is given, or the module has a method ``hybridpar_layers``, its layers are taken instead of
    those found by tracing; see ``model/named.py``. With ``autocast`` the layers are described as they compute
    under ``torch.autocast`` in that dtype on a CPU; the last one's output stays as the parameters are. With
    ``memory_format`` they are described with their weights in that order; the model's input keeps its own.

    A ``nn.SyncBatchNorm`` takes its statistics over all replicas; see ``model/shared_norm.py``.

    Raises ModelError where the model cannot be traced, takes other inputs, gives no single tensor, or loses the
    samples of dim 0 or mixes them, and where only some batch norms of a layer are synchronised.
    """
    inputs = several(in_shape, input_dtype)
    if inputs:
        in_shape, input_dtype = (sum(i.elements for i in inputs),), "float"
    shape_in = cast("tuple[int, ...]", tuple(in_shape))
    floating = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.get_default_dtype())
    dtype = floating if input_dtype == "float" else torch.int64
    chosen = named_layers(module, layers)
    if chosen is None:
        pieces, inputs = _traced_pieces(module, shape_in, dtype, name, inputs)
    else:
        if inputs:
            raise ModelError(f"{METHOD}: layers that are named by hand take one tensor; let {name} take one")
        compare(module, chosen, shape_in, dtype, name)
        pieces = _named_pieces(chosen)
    parts = [_layer_module(piece) for piece in pieces]
    names = _full_names(module, parts, [piece.name for piece in pieces])
    described: list[Layer] = []
    checked: set[str] = set()
    lowered = None if autocast is None else getattr(torch, autocast)
    entering, last = Entering(shape_in, dtype), memory_format is not None
    for part, piece, full_names in zip(parts, pieces, names, strict=True):
        in_dtype = floating if described else dtype
        ends = autocast is not None and piece is pieces[-1]
        stands = autocast is not None or isinstance(part, CosineLinear)
        run = _as_run(part) if stands else part
        found = measure(run, entering, floating, piece.name, lowered, last=last, ends=ends)
        check_kinds(part, piece.name)
        layer = _describe(part, piece.nodes, piece.name, entering.shape, found, full_names)
        turns = last and stays_last(part, found.out_shape, entered=entering.channels_last)
        lowers = lowered is not None and found.dtype == lowered
        described.append(replace(layer, lowered=lowers, channels_last=turns))
        entering = Entering(found.out_shape, found.dtype, found.differentiable, turns)
        check_samples(part, piece.nodes, described[-1], in_dtype, checked)
    integers: Literal["float", "int"] = "int" if input_dtype == "int" else "float"
    chain = Chain(
        name,
        tuple(described),
        _tied(described),
        integers,
        _frozen(parts, names),
        autocast,
        inputs,
        memory_format,
    )
    return Traced(chain, tuple(parts), tuple(names))


def _as_run(part: nn.Module) -> nn.Module:
    """Return what stands for a layer in a run; it keeps less under autocast."""
    if not _is_linear(part):
        return part
    return gathering(part, part.weight, part.bias if isinstance(part, nn.Linear) else None)


def _is_linear(part: nn.Module) -> TypeGuard[nn.Linear | CosineLinear]:
    """Whether a layer is a single linear map over the last dim, normalised or not."""
    return type(part) in {nn.Linear, CosineLinear}


def _linear(part: nn.Module) -> Linear | None:
    if not _is_linear(part):
        return None
    normalized = isinstance(part, CosineLinear)
    return Linear(part.in_features, part.out_features, not normalized and part.bias is not None, normalized)


@dataclass(frozen=True)
class _Piece:
    """The nodes of one layer: what they compute from the value of ``start``."""

    name: str
    captured: fx.GraphModule
    start: fx.Node
    nodes: list[fx.Node]


def _traced_pieces(
    module: nn.Module, in_shape: tuple[int, ...], dtype: torch.dtype, name: str, inputs: tuple[Input, ...]
) -> tuple[list[_Piece], tuple[Input, ...]]:
    captured = capture(module, name)
    start, inputs = unite(captured, inputs, name) if inputs else (input_node(captured, name), ())
    runs = cut(captured, start, in_shape, dtype, name)
    starts = [start, *(nodes[-1] for nodes in runs)]
    names = _layer_names(captured, runs)
    pieces = [_Piece(*given) for given in zip(names, [captured] * len(runs), starts, runs, strict=False)]
    return pieces, inputs


def _named_pieces(chosen: Named) -> list[_Piece]:
    """Trace each layer by itself; one that cannot be traced stays a single node."""
    pieces: list[_Piece] = []
    dropouts = 0
    for name, part in chosen:
        captured = capture(nn.Sequential(part), name, dropouts)
        dropouts += sum(isinstance(m, KeyedDropout) for m in captured.modules())
        start = input_node(captured, name)
        nodes = [n for n in captured.graph.nodes if n.op not in {"placeholder", "get_attr", "output"}]
        pieces.append(_Piece(name, captured, start, nodes))
    return pieces


def _layer_module(piece: _Piece) -> nn.Module:
    """Make the module that runs a piece's nodes on the value of its start."""
    captured, nodes, previous = piece.captured, piece.nodes, piece.start
    only = module_of(captured, nodes[0]) if len(nodes) == 1 else None
    if only is not None and nodes[0].args == (previous,) and not nodes[0].kwargs:
        return only
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {previous: graph.placeholder("x")}

    def copied(node: fx.Node) -> fx.Node:
        if node not in copies:
            if node.op != "get_attr":
                raise ModelError(
                    f"layer {piece.name} needs {node.name} from outside of it; this is a fault of hybridpar"
                )
            copies[node] = graph.node_copy(node)
        return copies[node]

    for node in nodes:
        for needed in node.all_input_nodes:
            copied(needed)
        copies[node] = graph.node_copy(node, copied)
    graph.output(copies[nodes[-1]])
    return fx.GraphModule(captured, graph, class_name=re.sub(r"\W+", "_", f"Layer_{piece.name}"))


def _layer_names(captured: fx.GraphModule, runs: list[list[fx.Node]]) -> list[str]:
    """Name each layer after its module.

    A layer of several nodes goes by the module of which it is the greater part, else by its first and last node.
    """
    everywhere = Counter(prefix for node in captured.graph.nodes for prefix in _prefixes(_scope(node)))
    names = []
    for nodes in runs:
        ends = [str(n.target) if n.op == "call_module" else n.name for n in (nodes[0], nodes[-1])]
        if len(nodes) == 1:
            names.append(ends[0])
            continue
        scopes = [_scope(n) for n in nodes]
        low, high = min(scopes), max(scopes)
        equal = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(low, high, strict=False))
        prefix = tuple(a for a, _ in equal)
        own = sum(scope[: len(prefix)] == prefix for scope in scopes)
        names.append(".".join(prefix) if prefix and own > everywhere[prefix] / 2 else "..".join(ends))
    seen: Counter[str] = Counter()
    for index, name in enumerate(names):
        seen[name] += 1
        if seen[name] > 1:
            names[index] = f"{name}#{seen[name]}"
    return names


def _scope(node: fx.Node) -> tuple[str, ...]:
    """Path of the module that a node calls, or in whose forward it stands."""
    if node.op == "call_module":
        return tuple(str(node.target).split("."))
    if node.op in {"placeholder", "get_attr", "output"}:
        return ()
    stack = node.meta.get("nn_module_stack") or {}
    path = str(list(stack.values())[-1][0]) if stack else ""
    return tuple(path.split(".")) if path else ()


def _prefixes(scope: tuple[str, ...]) -> list[tuple[str, ...]]:
    return [scope[:n] for n in range(1, len(scope) + 1)]


def _full_names(model: nn.Module, parts: list[nn.Module], layer_names: list[str]) -> list[dict[str, str]]:
    """For each layer: the local name of a tensor -> the first name that it has in the model."""
    full: dict[int, str] = {}
    for name, tensor in named_tensors(model).items():
        full.setdefault(id(tensor), name)
    result = []
    for part, layer_name in zip(parts, layer_names, strict=True):
        local = named_tensors(part)
        lost = [name for name, tensor in local.items() if id(tensor) not in full and tensor.is_meta]
        if lost:
            raise ModelError(
                f"layer {layer_name} uses the tensor {lost[0]}, which is neither a parameter nor a buffer of the "
                "model and has no values; register it with register_buffer"
            )
        result.append({name: full[id(tensor)] for name, tensor in local.items() if id(tensor) in full})
    return result


def _describe(
    part: nn.Module,
    nodes: list[fx.Node],
    name: str,
    in_shape: tuple[int, ...],
    footprint: Footprint,
    full_names: dict[str, str],
) -> Layer:
    local = dict(part.named_parameters())
    keyed = any(isinstance(m, KeyedDropout) and m.p > 0 for m in part.modules())
    functions = {_function_name(n) for n in nodes}
    return Layer(
        name=name,
        kind=_kind(part, nodes),
        in_shape=in_shape,
        out_shape=footprint.out_shape,
        flops_per_sample=footprint.flops_per_sample,
        parameters=tuple(Parameter(full_names[n], tuple(p.shape)) for n, p in local.items()),
        buffer_bytes=sum(b.numel() * b.element_size() for b in part.buffers()),
        saved=footprint.saved,
        saves_input=footprint.saves_input,
        saves_output=footprint.saves_output,
        aliases_input=footprint.aliases_input,
        linear=_linear(part),
        channelwise=_is_channelwise(part, nodes, in_shape, footprint.out_shape),
        pointwise=_is_pointwise(part, nodes),
        random="unkeyed" if footprint.draws else "keyed" if keyed else "none",
        batch_norm="batch_norm" in functions
        or any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in part.modules()),  # noqa: SLF001 - its base
        norms=footprint.norms,
    )


def _kind(part: nn.Module, nodes: list[fx.Node]) -> str:
    if len(nodes) > 1:
        return "Block"
    if nodes[0].op == "call_module":
        return _KEYED_KINDS.get(type(part), type(part).__name__)
    return _function_name(nodes[0])


def _function_name(node: fx.Node) -> str:
    """Name of the torch function or method that a node calls; empty for a module or somebody else's function."""
    if node.op == "call_method":
        return str(node.target)
    if node.op != "call_function":
        return ""
    name = str(getattr(node.target, "__name__", node.target))
    home = str(getattr(node.target, "__module__", None) or "torch")
    return name if home.split(".", maxsplit=1)[0] in {"torch", "_operator", "builtins"} else f"{home}.{name}"


def _is_channelwise(
    part: nn.Module, nodes: list[fx.Node], in_shape: tuple[int, ...], out_shape: tuple[int, ...]
) -> bool:
    """Whether each feature of dim 1 is worked on by itself, and a flattened output keeps them in order."""
    if len(nodes) > 1:
        return _is_flattening(nodes) and out_shape == (math.prod(in_shape),)
    images = len(in_shape) == 3
    if nodes[0].op == "call_module":
        if isinstance(part, nn.Flatten):
            return bool(part.start_dim == 1)
        return _is_pointwise(part, nodes) or (type(part) in _POOLS and images)
    function = _function_name(nodes[0])
    if function == "flatten":
        start_dim: Any = (*nodes[0].args[1:2], nodes[0].kwargs.get("start_dim"))[0]
        return bool(start_dim == 1)
    return _is_pointwise(part, nodes) or (function in _POOL_FUNCTIONS and images)


def _is_pointwise(part: nn.Module, nodes: list[fx.Node]) -> bool:
    """Whether each element is worked on by itself."""
    if len(nodes) > 1:
        return False
    if nodes[0].op == "call_module":
        return type(part) in ELEMENTWISE
    return _function_name(nodes[0]) in _ELEMENTWISE_FUNCTIONS


def _is_flattening(nodes: list[fx.Node]) -> bool:
    """Whether the nodes are ``x.view(x.size(0), -1)`` or its like, which takes any number of features."""
    *reads, last = nodes
    sizes: Any = last.args[1] if len(last.args) == 2 else last.args[1:]
    if last.op != "call_method" or last.target not in {"view", "reshape"} or not isinstance(sizes, tuple | list):
        return False
    to_rows = len(sizes) == 2 and isinstance(sizes[0], fx.Node) and isinstance(sizes[1], int) and sizes[1] == -1
    return to_rows and all(_function_name(n) in _SHAPE_READS for n in reads)


def _frozen(parts: Sequence[nn.Module], names: Sequence[dict[str, str]]) -> tuple[str, ...]:
    """Return the parameters that are not to be trained, in the order of the layers."""
    found = {
        full[local]: None
        for part, full in zip(parts, names, strict=True)
        for local, parameter in part.named_parameters()
        if not parameter.requires_grad
    }
    return tuple(found)


def _tied(layers: list[Layer]) -> tuple[tuple[str, tuple[int, ...]], ...]:
    users: dict[str, list[int]] = {}
    for index, layer in enumerate(layers):
        for parameter in layer.parameters:
            users.setdefault(parameter.name, []).append(index)
    return tuple((name, tuple(indices)) for name, indices in users.items() if len(indices) > 1)
