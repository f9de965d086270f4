"""Workspace: what a computation needs while it runs, beyond what is alive before it.

On a CPU, resident memory is more than the tensors alive. The C library maps large blocks apart and gives them back
at once; small ones come from a heap, which keeps what is freed (:func:`hybridpar.host.keep_freed_memory`), so that
both reach their own peaks and stay there: small ones forever. So bytes are counted in two classes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from hybridpar.model.chain import DRAWN_ELEMENTS, MADE_ELEMENTS, Chain
from hybridpar.planning.blocks import Block, Span
from hybridpar.planning.heap import Heap
from hybridpar.planning.kept import Use, extra_bytes, kept
from hybridpar.planning.layout import Interval
from hybridpar.profiling.record import Profile, interpolate

MAPPED_BYTES = 32 * 2**20
"""From here on a block is mapped apart; as ``hybridpar.host`` sets it."""


class Bytes(NamedTuple):
    """In blocks below and from ``MAPPED_BYTES`` on; of devices that do not tell them apart, all are small."""

    small: float
    large: float


class Workspaces:
    """Workspace of computations under one profile, each computed once.

    Args:
        profile: its workspace bytes per layer count where they are known. A backward takes one gradient of the
            layer's largest parameter besides, which it makes before adding it to what is there; not of weights
            whose gradients gather in place.
        host: whether the device's memory is the host's.

    """

    def __init__(self, profile: Profile, *, host: bool) -> None:
        self.profile = profile
        self.host = host
        self.heap: Heap | None = None
        """Of a host; :mod:`hybridpar.planning.resident` makes it once."""
        self.mapped_bytes = float(MAPPED_BYTES) if host else float("inf")
        self._passes: dict[tuple[object, ...], Bytes] = {}
        self._parameters: dict[tuple[Interval, tuple[Span, ...], int], tuple[Bytes, int]] = {}

    def split(self, *sizes: float) -> Bytes:
        """Return the sum of some blocks' bytes in their classes."""
        large = sum(s for s in sizes if s >= self.mapped_bytes)
        return Bytes(sum(sizes) - large, large)

    def parameters(self, chain: Chain, block: Block, shard: int, itemsize: int) -> tuple[Bytes, int]:
        """Return the bytes of a block's parameters on one of its ranks, and of the largest one."""
        key = (block.layers, block.spans[shard] if block.spans else (), itemsize)
        if key not in self._parameters:
            sizes = [count * itemsize for count in kept(block, shard, chain).parameters]
            self._parameters[key] = self.split(*sizes), max(sizes, default=0)
        return self._parameters[key]

    def building(self, chain: Chain, block: Block, shard: int, itemsize: int) -> float:
        """Return the most bytes there are while a block's parameters are made.

        A parameter is made some rows after the other, unless it is small: a slice of one is cut out of the whole.
        """
        made = most = 0
        for layer, use in zip(chain.layers[slice(*block.layers)], kept(block, shard, chain).uses, strict=True):
            for parameter, count in zip(layer.parameters, use.parameters, strict=True):
                made += count * itemsize
                beside = count != parameter.count or parameter.count > DRAWN_ELEMENTS
                most = max(most, made + min(parameter.count, MADE_ELEMENTS) * itemsize * beside)
        return most

    def within(
        self, chain: Chain, block: Block, shard: int, samples: int, itemsize: int, kind: str, *, fresh: bool
    ) -> Bytes:
        """Return the peaks of what a ``forward``, a ``backward`` or a forward without a graph (``plain``) adds.

        ``fresh``: the backward finds no gradients of its parameters and leaves them.
        """
        spans = block.spans[shard] if block.spans else ()
        flags = block.recompute, block.answers, block.sampled
        key = (block.layers, spans, samples * itemsize, kind, fresh, flags)
        if key not in self._passes:
            walk = _Passes(self, chain, block, shard, samples, itemsize)
            if kind == "backward":
                if block.recompute:
                    walk.forward(graph=True)
                walk.backward(fresh=fresh)
            else:
                walk.forward(graph=kind == "forward" and not block.recompute)
            self._passes[key] = Bytes(*walk.peak)
        return self._passes[key]


class _Passes:
    """Runs through the layers of a block and keeps the peaks of both classes."""

    def __init__(
        self, workspaces: Workspaces, chain: Chain, block: Block, shard: int, samples: int, itemsize: int
    ) -> None:
        self.workspaces, self.chain, self.block, self.shard = workspaces, chain, block, shard
        self.samples, self.itemsize = samples, itemsize
        self.kept = kept(block, shard, chain)
        self.sizes = [self.kept.bytes(s, itemsize) * samples for s in range(len(self.kept.sizes))]
        if block.sampled is not None:
            self.sizes[self.kept.output] = round(self.sizes[self.kept.output] * block.sampled)
        self.now, self.peak = [0.0, 0.0], [0.0, 0.0]

    def forward(self, *, graph: bool) -> None:
        """Run the layers forward; ``graph``: what they save stays."""
        last = len(self.kept.uses) - 1
        for i, use in enumerate(self.kept.uses):
            made = use.result != use.source
            if made:
                self._add(self.sizes[use.result])
            if graph:
                self._add(extra_bytes(use, self.samples, self.itemsize))
            self._see(self._beyond(i, "forward"), 0.0)
            if made and use.source and not (graph and use.source in self.kept.saved):
                self._add(self.sizes[use.source], -1)
        if graph and last >= 0 and not self.kept.output_kept:
            self._add(self.sizes[self.kept.output], -1)  # only its place in the graph is held

    def backward(self, *, fresh: bool) -> None:
        """Run the layers backward, from an output gradient that is there before and stays meanwhile."""
        gradient: float | None = None
        for i in reversed(range(len(self.kept.uses))):
            use, layer = self.kept.uses[i], self.block.layers[0] + i
            if layer < self.chain.first_trained:
                break
            made = use.result != use.source and layer > self.chain.first_trained
            if made:
                self._add(self.sizes[use.source])
            sizes = [count * self.itemsize for count in use.made]
            workspace = self._beyond(i, "backward")
            if fresh:
                for size in sizes:
                    self._add(size)
                self._see(workspace, 0.0)
            else:
                self._see(workspace, max(sizes, default=0))
            if made:
                if gradient is not None:
                    self._add(gradient, -1)
                gradient = self.sizes[use.source]
            self._release(i, use)

    def _release(self, i: int, use: Use) -> None:
        for storage in use.saved:
            if storage and self.kept.first_saver[storage] == i:
                self._free(self.sizes[storage])
        self._free(extra_bytes(use, self.samples, self.itemsize))

    def _free(self, size: float) -> None:
        """Give back what the forward kept; the holes in a heap are too small for the earlier layers' gradients."""
        if not self.workspaces.host or size >= self.workspaces.mapped_bytes:
            self._add(size, -1)

    def _beyond(self, i: int, kind: str) -> float:
        """Return the workspace of a layer beyond its parameters' gradients; of a shard in proportion."""
        layer = self.block.layers[0] + i
        profile, gradients = self.workspaces.profile, 0
        table = profile.layers[layer].forward_workspace_bytes
        if kind == "backward":
            table = profile.layers[layer].backward_workspace_bytes
            gradients = (self.chain.trained[layer] - self.chain.gathered[layer]) * self.itemsize
        if not table or not self.samples:
            return 0.0
        whole = tuple(max(0.0, size - gradients) for size in table[0])
        sizes, described = profile.micro_batches[: len(whole)], self.chain.layers[layer]
        # It grows by copies of input and output in the library's order; more is another algorithm at another size.
        copies = (math.prod(described.in_shape) + math.prod(described.out_shape)) * self.itemsize
        most = whole[-1] + max(0, self.samples - sizes[-1]) * copies
        of_samples = min(interpolate(sizes, whole, self.samples), most)
        return of_samples * self.block.computed(self.chain, self.shard, layer)

    def _add(self, size: float, sign: int = 1) -> None:
        self.now[size >= self.workspaces.mapped_bytes] += sign * size

    def _see(self, workspace: float, temporary: float) -> None:
        extra = self.workspaces.split(workspace, temporary)
        self.peak = [max(p, n + e) for p, n, e in zip(self.peak, self.now, extra, strict=True)]
