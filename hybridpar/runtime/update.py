"""Reduce, then update: gradients in flat buckets, the global norm, and one optimizer per position.

This is the seam behind which other ways to synchronise replicas can live: the executor only asks for a bucket to
reduce and for an update.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from hybridpar.optimizer_section import ParameterGroup
from hybridpar.planning.blocks import Position
from hybridpar.planning.compression import Compression, Sum
from hybridpar.runtime.average import Average
from hybridpar.runtime.bucket import Bucket
from hybridpar.runtime.compression import Compressor, compressor, order
from hybridpar.runtime.fragment import Fragment
from hybridpar.runtime.groups import check_options_of, grouped, relative_rates
from hybridpar.runtime.modules import BlockModules, Owned
from hybridpar.runtime.scaler import Scaler
from hybridpar.runtime.scatter import Routes, Scatter
from hybridpar.runtime.undo import Undo

OptimizerFactory = Callable[[Iterable[nn.Parameter] | Iterable[dict[str, Any]]], torch.optim.Optimizer]
"""Makes an optimizer for parameters, or for groups of them as torch's optimizers take them."""


class ShardedEngine(Protocol):
    """Updates parameters whose optimizer state is shared out over those who hold them.

    The parameters of each group of options are one flat vector, of which every sharer has an equal part.
    """

    optimizer: torch.optim.Optimizer
    """Of this rank's parts."""
    parts: Sequence[torch.Tensor]
    """This rank's parts of the summed gradients, one per group, (elements of a part,); padding is zero."""
    sharers: int
    index: int
    """Which of the sharers this rank is."""

    def place(self, parameter: nn.Parameter) -> tuple[int, int]:
        """Return the group of a parameter, and where it begins in the group's vector."""
        ...

    def step(self) -> None:
        """Update this rank's parts from those of the gradients, and gather the parameters; collective."""
        ...

    def fragments(self) -> Mapping[nn.Parameter, Fragment]:
        """Return what this rank holds of the optimizer state, as views, by the parameters that it holds some of.

        Raises CheckpointError for state that cannot be cut.
        """
        ...

    def load(self, fragments: Mapping[nn.Parameter, Fragment]) -> None:
        """Take over the state of all that ``fragments`` returns, and the parameters' values as they now are.

        Raises CheckpointError for state that does not fit together.
        """
        ...


EngineFactory = Callable[[Position, Sequence[BlockModules], Sequence[ParameterGroup]], ShardedEngine]
"""Makes the sharded optimizer of a replicated position from this rank's blocks of it, and groups of parameters."""


class Updater:
    """Gradients and optimizers of one rank.

    ``rank`` is its number in plan replica ``replica``, ``positions`` are its own. Positions that are reduced keep
    their gradients in one flat bucket per block, others where autograd or the layers put them. A position has an
    optimizer of its own, or one of ``engines``, whose buckets may be ``lasting`` or not. ``max_norm`` clips by the
    global norm as ``torch.nn.utils.clip_grad_norm_`` does. With a ``scaler`` gradients are those of a scaled loss
    until the update, and ``undo`` takes back a step that is skipped. ``compression`` is that of the sums of
    buckets; all ranks begin it alike, with ``seed``.
    """

    def __init__(
        self,
        rank: int,
        positions: tuple[Position, ...],
        blocks: dict[int, BlockModules],
        optimizer: OptimizerFactory,
        max_norm: float | None,
        engines: Mapping[int, ShardedEngine] | None = None,
        replica: int = 0,
        groups: Sequence[ParameterGroup] = (),
        decay: float | None = None,
        scaler: Scaler | None = None,
        compression: Compression | None = None,
        seed: int = 0,
        *,
        lasting: bool = True,
        undo: Undo | None = None,
    ) -> None:
        self._rank, self._positions, self._max_norm, self._replica = rank, positions, max_norm, replica
        self.engines = engines or {}
        self.scaler = scaler
        """Of the loss, if it is scaled."""
        self.undo = undo
        """Of skipped steps, if the loss is scaled."""
        self._buckets: dict[int, Bucket] = {}
        self.compressors: dict[int, Compressor] = {}
        """Of blocks whose gradients are compressed before they are summed."""
        self._routes: dict[int, Routes] = {}
        self._scattered: set[int] = set()
        """Blocks whose gradients were reduced in this step."""
        owned: dict[int, list[Owned]] = {p.index: [] for p in positions}
        by_index = {p.index: p for p in positions}
        for index, modules in sorted(blocks.items()):
            position = by_index[modules.block.position]
            trained = [o for o in modules.owned if o.tensor.requires_grad]
            owned[position.index] += trained
            if position.index in self.engines:
                self._share(index, trained, self.engines[position.index], lasting=lasting)
            elif position.reduced:
                self._sum(index, trained, compression, seed)
            else:
                for o in trained:
                    if o.layer is not None:
                        o.layer.home = torch.empty_like(o.tensor, requires_grad=False)
        self._parameters = {index: [o.tensor for o in own] for index, own in owned.items()}
        self._heads = {m.block.position: m.head for m in blocks.values() if m.head is not None}
        """Those whose classes are sampled, by position."""
        self.average = None if decay is None else Average(decay, self._parameters)
        """Of the weights, if there is a ``decay``."""
        self.optimizers = {
            index: optimizer(grouped(((o.name, o.tensor) for o in own), groups))
            for index, own in owned.items()
            if own and index not in self.engines
        }
        self._rated = self.optimizers | {i: e.optimizer for i, e in self.engines.items() if owned[i]}
        for made in self._rated.values():
            check_options_of(groups, made)
        self._relative: dict[int, list[float]] = {}
        """Once a rate is set: the ratios of the groups' own rates to their optimizer's."""

    def _sum(self, block: int, trained: list[Owned], compression: Compression | None, seed: int) -> None:
        """Let a block's gradients lie in a bucket that is summed, whole or compressed."""
        ordered = order(compression, trained)
        bucket = self._buckets[block] = Bucket(ordered, lasting=True)
        smaller = (
            None
            if compression is None
            else compressor(compression, bucket.open(), ordered, seed, undoing=self.scaler is not None)
        )
        if smaller is not None:
            self.compressors[block] = smaller

    def _share(self, block: int, trained: list[Owned], engine: ShardedEngine, *, lasting: bool) -> None:
        """Let a block's gradients lie as in the engine's vectors, and find out who gets what of them."""
        ordered = sorted(trained, key=lambda o: engine.place(o.tensor))
        places = [(*engine.place(o.tensor), o.tensor.numel()) for o in ordered]
        self._buckets[block] = Bucket(ordered, lasting=lasting)
        self._routes[block] = Routes(places, engine.parts, engine.sharers, engine.index)

    def begin(self) -> None:
        """Begin a step: forget all gradients, and note what is taken back if it is skipped."""
        if self.undo is not None:
            self.undo.keep()
        for parameters in self._parameters.values():
            for parameter in parameters:
                parameter.grad = None
        for head in self._heads.values():
            head.standing = None
        self._scattered.clear()

    def set_rate(self, rate: float) -> None:
        """Set the learning rate of all optimizers; that of groups keeps its ratio to it."""
        for index, optimizer in self._rated.items():
            if index not in self._relative:
                self._relative[index] = relative_rates(optimizer)
            for group, relative in zip(optimizer.param_groups, self._relative[index], strict=True):
                group["lr"] = rate * relative

    def open(self, block: int) -> None:
        """Make room for the gradients of a block whose backward begins, where they have a bucket."""
        if block in self._buckets:
            self._buckets[block].open()

    def bucket(self, block: int) -> torch.Tensor:
        """Return a block's flat gradients after its last backward, to be summed over its replicas in place."""
        return self._buckets[block].complete()

    def scatter(self, block: int) -> Scatter:
        """Return what of a block's flat gradients goes to which sharer of its optimizer's state."""
        first = block not in self._scattered
        self._scattered.add(block)
        return self._routes[block].scatter(self._buckets[block].take(), first=first)

    def runs(self) -> dict[nn.Parameter, tuple[int, torch.Tensor]]:
        """Return this rank's runs of summed gradients that are sharded: (begin in the flat parameter, run)."""
        result = {}
        for index, engine in self.engines.items():
            for parameter in self._parameters[index]:
                group, begin = engine.place(parameter)
                part = engine.parts[group]
                first = engine.index * len(part)
                start, stop = max(begin, first), min(begin + parameter.numel(), first + len(part))
                if start < stop:
                    result[parameter] = start - begin, part[start - first : stop - first]
        return result

    @property
    def _scale(self) -> float:
        """What the loss of this step is multiplied by."""
        return 1.0 if self.scaler is None else self.scaler.scale

    def scaled(self, gradient: torch.Tensor) -> torch.Tensor:
        """Scale the loss's gradient with respect to logits, in place."""
        return gradient if self.scaler is None else gradient.mul_(self.scaler.scale)

    def compress(self, block: int) -> None:
        """Make of a block's gradients, after its last backward, what is summed instead."""
        self.bucket(block)
        self.compressors[block].compress(self._scale)

    def factor(self, block: int) -> None:
        """Make the right factors of a block's gradients, of the summed left ones."""
        self.compressors[block].factor()

    def restore(self, block: int) -> None:
        """Make a block's summed gradients, of the sums of what they were compressed to."""
        self.compressors[block].restore(self._scale)

    def summed(self, block: int, content: Sum) -> torch.Tensor:
        """Return a flat tensor to be summed over a block's replicas in place."""
        return self.bucket(block) if content == "bucket" else self.compressors[block].part(content)

    def squared_norm(self) -> torch.Tensor:
        """Return this rank's share of the squared global norm, float64 scalar: each parameter counts once.

        Of gradients as they are, so scaled if the loss is.
        """
        total: torch.Tensor | None = None
        for position in self._positions:
            for gradient in self._counted(position):
                square = gradient.double().square().sum()
                total = square if total is None else total + square
        if total is not None:
            return total
        some = next((p for group in self._parameters.values() for p in group), torch.zeros(()))
        return torch.zeros((), dtype=torch.float64, device=some.device)

    def _counted(self, position: Position) -> Iterable[torch.Tensor]:
        """Return those gradients of a position that this rank counts for the norm."""
        if position.index in self.engines:
            return self.engines[position.index].parts
        if self._replica or (position.replicated and position.ranks[0] != self._rank):
            return ()
        return self._gradients(position.index)

    def _gradients(self, position: int) -> list[torch.Tensor]:
        """Return the gradients of a position; of a sampled head those of the classes that take part."""
        head = self._heads.get(position)
        rows = () if head is None or head.standing is None else head.standing.parameters()
        return [p.grad for p in (*self._parameters[position], *rows) if p.grad is not None]

    def update(self, position: int, squared_norm: torch.Tensor | None) -> None:
        """Step the optimizer of a position, with gradients that are unscaled and clipped by the global norm.

        With a scaler, gradients that are not all finite leave the parameters as they are.
        """
        optimizer = self.optimizers.get(position)
        if optimizer is None:
            return
        if self.scaler is None or _finite(squared_norm):
            self._make_true(self._gradients(position), squared_norm)
            head = self._heads.get(position)
            if head is None:
                optimizer.step()
            else:
                head.step(optimizer)
        if self.average is not None:
            self.average.update(position)

    def sharded_update(self, position: int, squared_norm: torch.Tensor | None) -> None:
        """Do the same for a position whose optimizer state is sharded; all who hold it do so together."""
        engine = self.engines[position]
        if self.scaler is None or _finite(squared_norm):
            self._make_true(engine.parts, squared_norm)
            engine.step()
        for parameter in self._parameters[position]:
            parameter.grad = None
        if self.average is not None:
            self.average.update(position)

    def _make_true(self, gradients: Iterable[torch.Tensor], squared_norm: torch.Tensor | None) -> None:
        """Undo the scale of gradients and clip them, in one pass over them."""
        if squared_norm is None:
            return
        scale, factor = self._scale, torch.ones_like(squared_norm)
        if self._max_norm is not None:
            factor = (self._max_norm / (squared_norm.sqrt() / scale + 1e-6)).clamp(max=1.0)
        factor = factor / scale
        for gradient in gradients:
            gradient.mul_(factor.to(gradient.dtype))

    def finish(self, squared_norm: torch.Tensor | None) -> None:
        """End a step: choose the scale of the next one, and take back what one that was skipped has left."""
        if self.scaler is None:
            return
        finite = _finite(squared_norm)
        self.scaler.update(finite=finite)
        for compressed in self.compressors.values():
            compressed.end(taken=finite)
        if self.undo is not None and not finite:
            self.undo.restore()


def _finite(squared_norm: torch.Tensor | None) -> bool:
    """Whether all gradients are; waits for the device."""
    assert squared_norm is not None
    return math.isfinite(squared_norm)
