"""The modules of one rank: the layers of its blocks, with only the parameters it owns."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import nn

from hybridpar.model.chain import Chain
from hybridpar.model.deferred import Part, Source
from hybridpar.model.footprint import lowering
from hybridpar.model.keyed import KeyedDropout, Keys, Window
from hybridpar.model.linear import CosineLinear, GatheringLinear, gathering
from hybridpar.model.order import ordered, turned
from hybridpar.model.shared_norm import Peers, SharedNorm
from hybridpar.model.trace import Traced
from hybridpar.planning.blocks import Block, Position, Span
from hybridpar.runtime.sampling import SampledHead

Run = Callable[[torch.Tensor], torch.Tensor]
"""Some layers, one after the other."""


@dataclass(frozen=True)
class Owned:
    """A parameter on this rank and its place in the whole model's parameter."""

    name: str
    """Full name in the model."""
    tensor: nn.Parameter
    dim: int | None = None
    """The dim along which this is a slice; None: the whole parameter."""
    start: int = 0
    layer: GatheringLinear | None = None
    """The layer that gathers this weight's gradient by itself."""


class BlockModules(nn.Module):
    """The layers of one block on one rank, run one after the other.

    ``autocast`` is the dtype in which they compute; None: in that of the parameters. They then give ``leaving``,
    whatever a device's list of operations for autocast says of the last one, and with the channels ``last`` in
    memory where that is said, whatever the last one's kernel does.
    """

    def __init__(
        self,
        block: Block,
        layers: list[nn.Module],
        owned: list[Owned],
        autocast: torch.dtype | None = None,
        leaving: torch.dtype | None = None,
        norms: list[SharedNorm] | None = None,
        *,
        last: bool = False,
    ) -> None:
        super().__init__()
        self.block, self._autocast, self._leaving, self._last = block, autocast, leaving, last
        self.layers = nn.ModuleList(layers)
        self.owned = owned
        self._dropouts = [m for m in self.modules() if isinstance(m, KeyedDropout)]
        self.norms = norms or []
        """Batch norms that meet other ranks', in the order of their calls."""
        self.head = next((layer for layer in layers if isinstance(layer, SampledHead)), None)
        """The last layer, if its classes are sampled."""
        self._runs: Sequence[Run] | None = None

    def use(self, runs: Sequence[Run]) -> None:
        """Run these, which do what the layers do, instead of one layer after the other."""
        self._runs = runs

    @property
    def draws(self) -> bool:
        """Whether a forward in training needs keys."""
        return bool(self._dropouts)

    def forward(self, x: torch.Tensor, keys: Keys | None, peers: Peers | None = None) -> torch.Tensor:
        """Run the layers on (samples, ...); ``keys`` belong to the samples, ``peers`` are the batch norms'."""
        for dropout in self._dropouts:
            dropout.keys = keys
        for norm in self.norms:
            norm.peers = peers
        with lowering(x.device.type, self._autocast):
            for run in self._runs or self.layers:
                x = run(x)
        if self._leaving is not None:
            x = x.to(self._leaving)
        if self._last:
            x = ordered(x, last=True)
        for dropout in self._dropouts:
            dropout.keys = None  # else every block held its sample ids until its next micro-batch
        for norm in self.norms:
            norm.peers = None
        return x

    def again(self, x: torch.Tensor, keys: Keys | None, peers: Peers | None = None) -> torch.Tensor:
        """Run the layers a second time on what they have seen before; running statistics do not count it."""
        before = [(buffer, buffer.clone()) for buffer in self.buffers()]
        y = self(x, keys, peers)
        for buffer, value in before:
            # Not through autograd, for which a batch norm's buffers belong to the graph just made.
            buffer.data.copy_(value)
        return cast("torch.Tensor", y)

    def each(self, x: torch.Tensor, keys: Keys | None, peers: Peers | None = None) -> list[torch.Tensor]:
        """Run the layers as ``again``, one by one, and return the output of every one."""
        outputs: list[torch.Tensor] = []
        runs, self._runs = self._runs, None
        hooks = [layer.register_forward_hook(lambda *call: outputs.append(call[2])) for layer in self.layers]
        self.again(x, keys, peers)
        self._runs = runs
        for hook in hooks:
            hook.remove()
        return outputs


class ModuleFactory:
    """Makes a rank's blocks from a traced model, one parameter at a time: no rank ever holds the whole model."""

    def __init__(
        self, traced: Traced, source: Source, seed: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._traced, self._source = traced, source
        self._seed, self._dtype, self._device = seed, dtype, device
        self._made: dict[str, nn.Parameter] = {}

    def make(self, block: Block, position: Position, rank: int) -> BlockModules:
        """Build a block's modules for one of its ranks."""
        shard = position.ranks.index(rank)
        layers, owned = [], []
        for index in range(*block.layers):
            span = block.spans[shard][index - block.layers[0]] if block.spans else None
            if span is not None and span.mode != "slice":
                layer, parameters = self._sharded(index, span, first=shard == 0)
            else:
                layer, parameters = self._whole(index)
                self._place_dropouts(layer, index, span)
            layers.append(layer)
            owned += parameters
        if block.sampled is not None:
            first = block.spans[shard][-1].outputs[0] if block.spans else 0
            layers[-1] = SampledHead(cast("GatheringLinear", layers[-1]), first)
            own = set(layers[-1].parameters())
            owned = [replace(o, layer=None) if o.tensor in own else o for o in owned]
        chain, lowered, leaving = self._traced.chain, None, None
        norms = [
            cast("SharedNorm", layer.get_submodule(norm.module))
            for index, layer in zip(range(*block.layers), layers, strict=True)
            for norm in chain.layers[index].norms
        ]
        if chain.autocast is not None:
            lowered, leaving = getattr(torch, chain.autocast), crossing_dtype(block, chain, self._dtype)
        return BlockModules(block, layers, owned, lowered, leaving, norms, last=block.out_last(chain))

    def _value(self, name: str, part: Part | None = None) -> torch.Tensor:
        """Return a tensor's value, or a part of it, on the device, in the chain's order in memory."""
        value = self._source.materialize(name, self._seed, self._dtype, part).to(self._device)
        return value if self._traced.chain.memory_format is None else turned(value)

    def _whole(self, index: int) -> tuple[nn.Module, list[Owned]]:
        module, names = self._traced.modules[index], self._traced.names[index]
        memo: dict[int, object] = {}
        owned = []
        for local, parameter in module.named_parameters():
            name = names[local]
            if name not in self._made:
                self._made[name] = nn.Parameter(self._value(name), requires_grad=parameter.requires_grad)
                owned.append(Owned(name, self._made[name]))
            memo[id(parameter)] = self._made[name]
        for local, buffer in module.named_buffers():
            memo[id(buffer)] = self._value(names[local])
        made = copy.deepcopy(module, memo)
        if isinstance(made, nn.Linear | CosineLinear) and self._traced.chain.layers[index].linear:
            made = gathering(made, made.weight, made.bias if isinstance(made, nn.Linear) else None)
            if self._traced.chain.gathered[index]:
                owned[0] = replace(owned[0], layer=made)
        return made, owned

    def _sharded(self, index: int, span: Span, *, first: bool) -> tuple[nn.Module, list[Owned]]:
        names = self._traced.names[index]
        dim, (start, stop) = (0, span.outputs) if span.mode == "column" else (1, span.inputs)
        part = Part(dim, start, stop)
        weight, bias = self._value(names["weight"], part), None
        if "bias" in names and (span.mode == "column" or first):
            bias = self._value(names["bias"], part if span.mode == "column" else None)
        layer = gathering(self._traced.modules[index], weight, bias)
        for local, parameter in layer.named_parameters():
            parameter.requires_grad_(self._traced.modules[index].get_parameter(local).requires_grad)
        gathers = layer if self._traced.chain.gathered[index] else None
        owned = [Owned(names["weight"], layer.weight, dim, start, gathers)]
        if layer.bias is not None:
            owned.append(Owned(names["bias"], layer.bias, *((0, start) if span.mode == "column" else (None, 0))))
        return layer, owned

    def _place_dropouts(self, layer: nn.Module, index: int, span: Span | None) -> None:
        chain = self._traced.chain
        window = None if span is None else Window(chain.axes[index], span.inputs[0], chain.width(index))
        for module in layer.modules():
            if isinstance(module, KeyedDropout):
                module.window = window


def crossing_dtype(block: Block, chain: Chain, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of a block's output and of its gradient, if parameters have ``dtype``."""
    if chain.autocast is None or not chain.layers[block.layers[1] - 1].lowered:
        return dtype
    lowered: torch.dtype = getattr(torch, chain.autocast)
    return lowered


def owned_parameters(blocks: list[BlockModules]) -> Iterator[Owned]:
    """Iterate over all parameters of some blocks, each once."""
    for block in blocks:
        yield from block.owned
