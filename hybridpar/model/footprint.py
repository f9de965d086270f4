"""What a layer's forward makes, keeps and computes, measured on tensors without memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from hybridpar.errors import ModelError
from hybridpar.generators import borrowed
from hybridpar.model.chain import Norm, Saved
from hybridpar.model.copies import blank, tensors
from hybridpar.model.keyed import KeyedDropout, Keys
from hybridpar.model.order import ordered, turn
from hybridpar.model.shared_norm import SharedNorm

BATCHES = (2, 3)
"""Two sample counts that tell the samples' dimension and everything affine."""
META_FAILURES = (RuntimeError, NotImplementedError, TypeError)
"""What code that reads values raises on the meta device."""


_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # noqa: SLF001 - its only name
"""What attention without dropout is on a CPU; on meta it is spelled out, and keeps more."""
_BATCH_NORM = torch.ops.aten.native_batch_norm.default
_NORMS = {_BATCH_NORM, torch.ops.aten.native_layer_norm.default, torch.ops.aten.native_group_norm.default}
"""They give statistics beside their output."""


@dataclass(frozen=True)
class Footprint:
    """What one layer needs; see the fields of the same name in ``chain.Layer``."""

    out_shape: tuple[int, ...]
    flops_per_sample: int
    saved: Saved
    saves_input: bool
    saves_output: bool
    aliases_input: bool
    draws: bool
    """Random numbers were drawn that depend on no key."""
    differentiable: bool
    """The output has a gradient."""
    dtype: torch.dtype
    """Of the output."""
    norms: tuple[Norm, ...]


@dataclass(frozen=True)
class Entering:
    """What a layer is given."""

    shape: tuple[int, ...]
    """Of one sample."""
    dtype: torch.dtype
    requires_grad: bool = False
    channels_last: bool = False
    """It lies in memory so."""

    def zeros(self, samples: int) -> torch.Tensor:
        """Return so many samples."""
        x = torch.zeros(samples, *self.shape, dtype=self.dtype)
        return ordered(x, last=self.channels_last).requires_grad_(self.requires_grad)


@dataclass(frozen=True)
class _Run:
    out: torch.Tensor
    flops: int
    draws: bool
    elements: int
    own_bytes: int
    saves_input: bool
    saves_output: bool
    aliases_input: bool
    norms: tuple[Norm, ...]


class _Meter(TorchDispatchMode):
    """Counts floating point operations and notices random draws."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0
        self.draws = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        out = _batch_norm(*args) if func is _BATCH_NORM and args[0].is_meta else func(*args, **(kwargs or {}))
        if func in _NORMS and _mixed(args):
            out = (out[0], *(t.float() for t in out[1:]))
        attends = func.overloadpacket is _ATTENTION
        self.draws |= torch.Tag.nondeterministic_seeded in func.tags and not attends
        formula = flop_registry.get(func.overloadpacket)
        if attends:
            self.flops += int(sdpa_flop_count(*(t.shape for t in args[:3])))  # type: ignore[no-untyped-call]
        elif formula is not None:
            self.flops += int(formula(*args, **(kwargs or {}), out_val=out))
        elif not _is_view(func):
            results = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
            self.flops += sum(t.numel() for t in results if t.is_floating_point())
        return out


def measure(
    module: nn.Module,
    entering: Entering,
    training_dtype: torch.dtype,
    name: str,
    autocast: torch.dtype | None = None,
    *,
    last: bool = False,
    ends: bool = False,
) -> Footprint:
    """Run a layer forward at two batch sizes, in training mode, and see what it keeps for its backward.

    Works on a copy on the meta device, or on zeros on the CPU where the layer reads values. Storages are counted
    once; those of parameters and buffers are left out. With ``autocast`` it runs under ``torch.autocast`` of a CPU
    in that dtype; a layer that ``ends`` the model then gives ``training_dtype``, as the loss takes it. With
    ``last`` its weights have their channels last. Raises ModelError where the layer fails, mixes up dim 0, or
    keeps an amount that is not affine in the samples.
    """

    def attempt(device: str) -> list[_Run]:
        if device == "meta" and (
            last or autocast is not None or _attends(module)
        ):  # to which meta tensors are blind
            with FakeTensorMode(allow_non_fake_inputs=True):
                return on("cpu")
        return on(device)

    def on(device: str) -> list[_Run]:
        copy = turn(runnable(module, device)) if last else runnable(module, device)
        runs = []
        with borrowed(), torch.device(device), torch.enable_grad(), lowering("cpu", autocast):
            for samples in BATCHES:
                set_keys(copy, Keys(0, 0, torch.arange(samples)))
                runs.append(_run(copy, entering.zeros(samples), training_dtype, ends=ends))
        set_keys(copy, None)
        return runs

    first, second = _on_any_device(attempt, name)
    small, large = BATCHES
    if first.out.shape[0] != small or second.out.shape[0] != large or first.out.shape[1:] != second.out.shape[1:]:
        raise ModelError(
            f"layer {name} turns {small} and {large} samples into {tuple(first.out.shape)} and "
            f"{tuple(second.out.shape)}; dim 0 of its output must be the samples"
        )
    slope_elements, slope_bytes = second.elements - first.elements, second.own_bytes - first.own_bytes
    saved = Saved(
        elements_per_sample=slope_elements,
        bytes_per_sample=slope_bytes,
        elements=first.elements - small * slope_elements,
        bytes=first.own_bytes - small * slope_bytes,
    )
    if min(saved.elements_per_sample, saved.bytes_per_sample, saved.elements, saved.bytes) < 0:
        raise ModelError(
            f"layer {name} keeps {first.elements} and {second.elements} elements for {small} and {large} samples, "
            f"which is not a constant plus an amount per sample, so it mixes samples; {remedy(module)}"
        )
    return Footprint(
        out_shape=tuple(first.out.shape[1:]),
        flops_per_sample=second.flops - first.flops,
        saved=saved,
        saves_input=first.saves_input,
        saves_output=first.saves_output,
        aliases_input=first.aliases_input,
        draws=first.draws,
        differentiable=first.out.requires_grad,
        dtype=first.out.dtype,
        norms=first.norms,
    )


def _attends(module: nn.Module) -> bool:
    """Whether a layer's graph calls torch's attention."""
    graphs = (part.graph for part in module.modules() if isinstance(part, fx.GraphModule))
    return any(node.target is F.scaled_dot_product_attention for graph in graphs for node in graph.nodes)


@contextmanager
def lowering(device: str, dtype: torch.dtype | None) -> Iterator[None]:
    """Run layers under autocast in ``dtype`` on a type of device; None: as they are."""
    with nullcontext() if dtype is None else torch.autocast(device, dtype):
        yield


def remedy(part: nn.Module) -> str:
    """Say what keeps the samples of a layer apart."""
    for name, module in part.named_modules():
        if getattr(module, "batch_first", True) is False:
            path = f" {name}" if name else ""
            return f"its {type(module).__name__}{path} takes samples in dim 1; make it with batch_first=True"
    return "keep dim 0 for the samples in every view, transpose and reduction (nn.BatchNorm may reduce over it)"


def runnable(module: nn.Module, device: str) -> nn.Module:
    """Give a module in training mode that runs on ``device``: a copy with zeros, unless nothing has values."""
    if device == "meta" and all(t.is_meta for t in tensors(module)):
        return module.train()
    return blank(module, device).train()


def set_keys(module: nn.Module, keys: Keys | None) -> None:
    """Give ``keys``, or none, to every keyed dropout in ``module``, for its next forward."""
    for part in module.modules():
        if isinstance(part, KeyedDropout):
            part.keys = keys


def _on_any_device(attempt: Callable[[str], list[_Run]], name: str) -> list[_Run]:
    try:
        return attempt("meta")
    except META_FAILURES:
        pass
    try:
        return attempt("cpu")
    except Exception as e:
        raise ModelError(f"layer {name} fails in a forward call: {type(e).__name__}: {e}") from e


def _run(module: nn.Module, x: torch.Tensor, training_dtype: torch.dtype, *, ends: bool) -> _Run:
    kept: dict[int, torch.Tensor] = {}
    meter = _Meter()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.setdefault(storage_id(tensor), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), meter, _called(module) as norms:
        out = module(x)
        out = out.to(training_dtype) if ends and isinstance(out, torch.Tensor) else out
    if not isinstance(out, torch.Tensor):
        raise TypeError(f"the output is a {type(out).__name__}, not a tensor")
    apart = {storage_id(x), storage_id(out)} | {storage_id(t) for t in tensors(module)}
    inside = [t for key, t in kept.items() if key not in apart]
    return _Run(
        out=out,
        flops=meter.flops,
        draws=meter.draws,
        elements=sum(_elements(t) for t in inside if t.dtype == training_dtype),
        own_bytes=sum(t.untyped_storage().nbytes() for t in inside if t.dtype != training_dtype),
        saves_input=storage_id(x) in kept,
        saves_output=storage_id(out) in kept,
        aliases_input=storage_id(out) == storage_id(x),
        norms=tuple(norms),
    )


@contextmanager
def _called(module: nn.Module) -> Iterator[list[Norm]]:
    """Note the calls of synchronised batch norms."""
    norms: list[Norm] = []

    def hook(path: str) -> Callable[[nn.Module, tuple[torch.Tensor]], None]:
        return lambda _, inputs: norms.append(Norm(path, inputs[0].shape[1], inputs[0].requires_grad))

    parts = [(path, part) for path, part in module.named_modules() if isinstance(part, SharedNorm)]
    handles = [part.register_forward_pre_hook(hook(path)) for path, part in parts]
    try:
        yield norms
    finally:
        for handle in handles:
            handle.remove()


def _batch_norm(x: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Give output, mean and inverse deviation of a batch norm in training, which torch takes long over on meta."""
    del rest
    return torch.empty_like(x), x.new_empty(x.shape[1]), x.new_empty(x.shape[1])


def _mixed(args: tuple[Any, ...]) -> bool:
    """Whether a norm has float32 parameters and an input of less: its statistics are float32, but not on fakes."""
    x, *rest = args
    return x.itemsize < 4 and any(isinstance(t, torch.Tensor) and t.dtype == torch.float32 for t in rest)


def storage_id(tensor: torch.Tensor) -> int:
    """Identity of the tensor's storage among those that are alive."""
    return int(tensor.untyped_storage()._cdata)  # noqa: SLF001 - meta storages have no address to tell them apart


def _elements(tensor: torch.Tensor) -> int:
    return math.ceil(tensor.untyped_storage().nbytes() / tensor.element_size())


def _is_view(func: torch._ops.OpOverload) -> bool:
    """Whether an operation computes nothing: a view or an empty tensor."""
    returns = func._schema.returns  # noqa: SLF001 - the only description of an operation
    if any(r.alias_info is not None and not r.alias_info.is_write for r in returns):
        return True
    return func.overloadpacket in {torch.ops.aten.empty, torch.ops.aten.empty_like, torch.ops.aten.new_empty}
