"""What is timed: runs of layers on the device, and one pass through them with its marks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import nn

from hybridpar.model.chain import Chain, Layer, Parameter
from hybridpar.model.copies import blank
from hybridpar.model.footprint import lowering, set_keys
from hybridpar.model.keyed import Keys
from hybridpar.model.linear import CosineLinear, GatheringLinear, gathering
from hybridpar.model.order import ordered, turn
from hybridpar.profiling.bench import Bench, Mark

Call = Callable[[torch.Tensor], torch.Tensor]
Made = list[tuple["Strand", list[nn.Module]]]
"""Strands with their modules on the device."""


class Clock(Protocol):
    """What gives the marks of a pass."""

    def mark(self) -> Mark:
        """Return now."""
        ...


@dataclass(frozen=True)
class Strand:
    """Layers that run one after the other: the whole chain, or one layer that stands for all that are equal."""

    layers: tuple[Layer, ...]
    integers: bool
    """The input is token ids."""
    first: bool = True
    """They begin the model: their input needs no gradient."""
    share: float = 1.0
    """Of a linear layer's features; below 1 only where the strand is one."""
    cut: Literal["columns", "rows"] = "columns"
    """Which features: its outputs, or its inputs."""
    lowered: bool = False
    """The input is of the chain's autocast dtype."""
    channels_last: bool = False
    """The input lies in memory so."""

    @property
    def in_shape(self) -> tuple[int, ...]:
        """Of one input sample."""
        shape = self.layers[0].in_shape
        if self.share == 1.0 or self.cut == "columns":
            return shape
        return (*shape[:-1], part(shape[-1], self.share))


Job = dict[Strand, list[nn.Module]]
"""Strands that take turns, with modules to copy. Shares and further whole layers use the first strand's copies."""


def part(features: int, share: float) -> int:
    """Return how many of so many features a share has; at least 1."""
    return max(1, round(features * share))


def whole(chain: Chain) -> Strand:
    """Return the chain as a strand."""
    return Strand(chain.layers, chain.input_dtype == "int")


def single(chain: Chain, index: int, fractions: Sequence[float]) -> list[Strand]:
    """One layer alone, once per share and cut; names are left out, so that equal layers have equal strands."""
    layer, first = chain.layers[index], index == 0
    parameters = tuple(Parameter(str(i), p.shape) for i, p in enumerate(layer.parameters))
    described = replace(layer, name="", parameters=parameters)
    lowered = not first and chain.layers[index - 1].lowered
    last = not first and chain.layers[index - 1].channels_last
    full = Strand((described,), first and chain.input_dtype == "int", first, lowered=lowered, channels_last=last)
    narrow = [f for f in fractions if f < 1.0] if layer.linear else []
    cuts: tuple[Literal["columns", "rows"], ...] = ("columns", "rows")
    return [full, *(replace(full, share=f, cut=cut) for cut in cuts for f in narrow)]


def make(job: Job, bench: Bench) -> Made:
    """Copy the first strand's layers to the device in training mode with small random parameters and gradients.

    Tied parameters stay tied. Buffers are zeros: indices that every table has, and statistics that training mode
    does not read. Shares of a layer lie in its parameters' memory and take none of their own.
    """
    main, *others = job
    copied = blank(nn.ModuleList(job[main]), str(bench.device)).to(dtype=bench.dtype).train()
    copied = turn(copied) if bench.channels_last else copied
    with torch.no_grad():
        for parameter in copied.parameters():
            # Values keep their magnitude from layer to layer: numbers next to nothing take a CPU longer.
            bound = math.sqrt(3.0 / max(1, parameter[0].numel() if parameter.ndim else 1))
            parameter.uniform_(-bound, bound)
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    assert isinstance(copied, nn.ModuleList)
    modules = [_as_in_training(*pair) for pair in zip(main.layers, copied, strict=True)]
    known = dict(zip(job[main], modules, strict=True))
    made: Made = [(main, modules)]
    for strand in others:
        own = [known[m] for m in job[strand]]
        made.append((strand, own if strand.share == 1.0 else [_narrow(strand, own[0])]))
    return made


def _as_in_training(layer: Layer, module: nn.Module) -> nn.Module:
    """Return a layer as the executor has it."""
    if layer.linear is None:
        return module
    assert isinstance(module, nn.Linear | CosineLinear)
    return gathering(module, module.weight, module.bias if isinstance(module, nn.Linear) else None)


def _narrow(strand: Strand, full: nn.Module) -> nn.Module:
    """Return a share of a linear layer, in the memory of the whole one."""
    linear = strand.layers[0].linear
    assert linear is not None
    inputs, outputs = linear.in_features, linear.out_features
    if strand.cut == "columns":
        outputs = part(outputs, strand.share)
    else:
        inputs = part(inputs, strand.share)
    bias = _part_of(full.get_parameter("bias"), (outputs,)) if linear.bias else None
    return gathering(full, _part_of(full.get_parameter("weight"), (outputs, inputs)), bias)


def _part_of(parameter: nn.Parameter, shape: tuple[int, ...]) -> nn.Parameter:
    """Return a parameter of ``shape`` at the begin of another's memory, with its gradient likewise."""
    count = math.prod(shape)
    taken = nn.Parameter(parameter.detach().flatten()[:count].view(shape), parameter.requires_grad)
    if parameter.grad is not None:
        taken.grad = parameter.grad.flatten()[:count].view(shape)
    return taken


def calls(bench: Bench, strand: Strand, modules: Sequence[nn.Module], size: int) -> list[Call]:
    """Return the layers of a strand ready to run ``size`` samples."""
    made = [_callable(bench, *pair, size) for pair in zip(strand.layers, modules, strict=True)]
    return made if bench.autocast is None else [_lowered(bench, call) for call in made]


def _lowered(bench: Bench, call: Call) -> Call:
    """Return a layer that runs under autocast."""

    def run(x: torch.Tensor) -> torch.Tensor:
        with lowering(bench.device.type, bench.autocast):
            return call(x)

    return run


def _callable(bench: Bench, layer: Layer, module: nn.Module, size: int) -> Call:
    """Return the layer ready to run. One with batch norm may be unable to take one sample of one position."""
    set_keys(module, Keys(0, 0, torch.arange(size, device=bench.device)))
    if size > 1 or not layer.batch_norm:
        return module
    doubled = False

    def run(x: torch.Tensor) -> torch.Tensor:
        nonlocal doubled
        if not doubled:
            try:
                return module(x)  # type: ignore[no-any-return]
            except ValueError:  # There are no statistics of one value; two samples take about as long.
                doubled = True
                set_keys(module, Keys(0, 0, torch.arange(2, device=bench.device)))
        return module(torch.cat([x, x]))[:1]  # type: ignore[no-any-return]

    return run


def make_input(bench: Bench, strand: Strand, size: int) -> torch.Tensor:
    """Random input (size, *in_shape), no leaf, as a layer may work in place; any vocabulary has ids below 2."""
    shape = (size, *strand.in_shape)
    if strand.integers:
        return torch.randint(0, 2, shape, device=bench.device)
    dtype = bench.autocast if strand.lowered and bench.autocast else bench.dtype
    x = ordered(torch.rand(shape, device=bench.device, dtype=dtype), last=strand.channels_last)
    return x if strand.first else x.requires_grad_().clone()


def timed_pass(clock: Clock, layers: Sequence[Call], x: torch.Tensor) -> list[tuple[Mark, Mark]]:
    """Begin and end of forward and backward of each layer, run as in a stage: in one graph with one backward.

    A hook on each layer's input marks when its gradient is complete; the layer's backward is over by then, as
    autograd runs first what the forward made last. So the time to enter autograd, which a stage does once, is no
    layer's. A layer that changes a view in place loses the hook, and counts the layer before as its own.
    """
    forward, reached = list[tuple[Mark, Mark]](), dict[int, Mark]()

    def watch(index: int, x: torch.Tensor) -> torch.Tensor:
        if x.requires_grad:
            x.register_hook(lambda _: reached.update({index: clock.mark()}))  # type: ignore[no-untyped-call]
        return x

    for i, layer in enumerate(layers):
        watch(i, x)
        begin = clock.mark()
        x = layer(x)
        forward.append((begin, clock.mark()))
    if watch(len(layers), x).requires_grad:
        torch.autograd.backward([x], [torch.rand_like(x)])
    ends = [clock.mark()]
    for i in range(len(layers) + 1):
        ends.append(reached.get(i, ends[-1]))
    backward = [(begin, end) for end, begin in itertools.pairwise(ends[1:])]
    return list(itertools.chain(*zip(forward, backward, strict=True)))


def gather_twice(
    clock: Clock, layer: nn.Module, rows: int, autocast: torch.dtype | None = None
) -> list[tuple[Mark, Mark]] | None:
    """Begin and end of a weight's gradient of so many rows, added to the one there, and then in its place.

    None where the layer does not gather it in place, or has none.
    """
    if not isinstance(layer, GatheringLinear) or layer.weight.grad is None:
        return None
    weight = layer.weight
    dtype = autocast or weight.dtype
    x, gradient = (torch.rand(rows, n, device=weight.device, dtype=dtype) for n in weight.shape[::-1])
    spans = []
    with torch.no_grad():
        for overwriting in (False, True):
            if overwriting:
                layer.home, weight.grad = weight.grad, None
            begin = clock.mark()
            layer.gather(gradient, x)
            spans.append((begin, clock.mark()))
    layer.home = None
    return spans


def accumulation_pass(
    clock: Clock, modules: Sequence[nn.Module], layers: Sequence[Call], x: torch.Tensor
) -> list[list[tuple[Mark, Mark]]]:
    """Begin and end of every addition of a gradient to the one that is there, per layer, in one pass."""
    spans: list[list[tuple[Mark, Mark]]] = [[] for _ in modules]
    begun: dict[int, Mark] = {}
    handles = []
    for own, module in zip(spans, modules, strict=True):
        for p in filter(lambda p: p.requires_grad, module.parameters()):

            def begin(_: torch.Tensor, key: int = id(p)) -> None:
                begun[key] = clock.mark()

            def end(p: torch.Tensor, own: list[tuple[Mark, Mark]] = own) -> None:
                own.append((begun[id(p)], clock.mark()))

            handles += [p.register_hook(begin), p.register_post_accumulate_grad_hook(end)]  # type: ignore[no-untyped-call]
    try:
        timed_pass(clock, layers, x)
    finally:
        for handle in handles:
            handle.remove()
    return spans
