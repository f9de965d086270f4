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

from hybridpar.planning.blocks import Position
from hybridpar.planning.compression import Compression, Sum
from hybridpar.runtime.average import Average
from hybridpar.runtime.compression import Compressor, compressor, order
from hybridpar.runtime.fragment import Fragment
from hybridpar.runtime.groups import check_options_of, grouped, relative_rates
from hybridpar.runtime.modules import BlockModules, Owned
from hybridpar.runtime.scaler import Scaler
from hybridpar.sections import ParameterGroup

OptimizerFactory = Callable[[Iterable[nn.Parameter] | Iterable[dict[str, Any]]], torch.optim.Optimizer]
"""Makes an optimizer for parameters, or for groups of them as torch's optimizers take them."""


class ShardedEngine(Protocol):
    """Reduces gradients and updates parameters with sharded optimizer state in one collective call."""

    def step(self) -> None:
        """Reduce, update this rank's shard, gather the parameters."""
        ...

    def zero(self) -> None:
        """Forget all gradients."""
        ...

    def set_rate(self, rate: float) -> None:
        """Set the learning rate."""
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


class Updater:
    """Gradients and optimizers of one rank.

    ``rank`` is its number in plan replica ``replica``, ``positions`` are its own. Positions that are reduced keep
    their gradients in one flat bucket per block, as views: what autograd makes is copied there at a step's first
    backward, and later ones add to it. Gradients that a layer gathers by itself have their place from the start,
    in a bucket or not. ``max_norm`` clips by the global norm as ``torch.nn.utils.clip_grad_norm_`` does. With a
    ``scaler`` gradients are those of a scaled loss until the update.
    ``compression`` is that of the sums of buckets; all ranks begin it alike, with ``seed``.
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
    ) -> None:
        self._rank, self._positions, self._max_norm, self._replica = rank, positions, max_norm, replica
        self.engines = engines or {}
        self.scaler = scaler
        """Of the loss, if it is scaled."""
        self._buckets: dict[int, torch.Tensor] = {}
        self._places: dict[int, list[tuple[nn.Parameter, torch.Tensor]]] = {}
        """Where a block's gradients lie in its bucket."""
        self.compressors: dict[int, Compressor] = {}
        """Of blocks whose gradients are compressed before they are summed."""
        owned: dict[int, list[Owned]] = {p.index: [] for p in positions}
        by_index = {p.index: p for p in positions}
        for index, modules in sorted(blocks.items()):
            position = by_index[modules.block.position]
            owned[position.index] += [o for o in modules.owned if o.tensor.requires_grad]
            if position.index in self.engines:
                continue
            if position.reduced:
                trained = order(compression, [o for o in modules.owned if o.tensor.requires_grad])
                bucket = self._buckets[index] = self._flatten(index, modules.owned, trained)
                smaller = None if compression is None else compressor(compression, bucket, trained, seed)
                if smaller is not None:
                    self.compressors[index] = smaller
                continue
            for o in modules.owned:
                if o.layer is not None and o.tensor.requires_grad:
                    o.layer.home = torch.empty_like(o.tensor, requires_grad=False)
        self._parameters = {index: [o.tensor for o in own] for index, own in owned.items()}
        self.average = None if decay is None else Average(decay, self._parameters)
        """Of the weights, if there is a ``decay``."""
        self.optimizers = {
            index: optimizer(grouped(((o.name, o.tensor) for o in own), groups))
            for index, own in owned.items()
            if own and index not in self.engines
        }
        for made in self.optimizers.values():
            check_options_of(groups, made)
        self._relative: dict[int, list[float]] = {}
        """Once a rate is set: the ratios of the groups' own rates to their optimizer's."""

    def _flatten(self, block: int, owned: list[Owned], trained: list[Owned]) -> torch.Tensor:
        total = sum(o.tensor.numel() for o in trained)
        first = next((o.tensor for o in owned), torch.empty(0))
        flat, at = first.new_zeros(total), 0
        places = self._places[block] = []
        for o in trained:
            place = flat[at : at + o.tensor.numel()].view_as(o.tensor)
            at += o.tensor.numel()
            places.append((o.tensor, place))
            if o.layer is None:
                o.tensor.register_post_accumulate_grad_hook(_Move(place))  # type: ignore[no-untyped-call]
            else:
                o.layer.home = place
        return flat

    def zero(self) -> None:
        """Forget all gradients."""
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        for engine in self.engines.values():
            engine.zero()

    def set_rate(self, rate: float) -> None:
        """Set the learning rate of all optimizers; that of groups keeps its ratio to it."""
        for index, optimizer in self.optimizers.items():
            if index not in self._relative:
                self._relative[index] = relative_rates(optimizer)
            for group, relative in zip(optimizer.param_groups, self._relative[index], strict=True):
                group["lr"] = rate * relative
        for engine in self.engines.values():
            engine.set_rate(rate)

    def bucket(self, block: int) -> torch.Tensor:
        """Return a block's flat gradients after its last backward, to be summed over its replicas in place."""
        for parameter, place in self._places[block]:
            if parameter.grad is None:  # the rank had no samples, or the loss does not depend on it
                parameter.grad = place.zero_()
        return self._buckets[block]

    def scaled(self, gradient: torch.Tensor) -> torch.Tensor:
        """Scale the loss's gradient with respect to logits, in place."""
        return gradient if self.scaler is None else gradient.mul_(self.scaler.scale)

    def compress(self, block: int) -> None:
        """Make of a block's gradients, after its last backward, what is summed instead."""
        self.bucket(block)
        self.compressors[block].compress()

    def factor(self, block: int) -> None:
        """Make the right factors of a block's gradients, of the summed left ones."""
        self.compressors[block].factor()

    def restore(self, block: int) -> None:
        """Make a block's summed gradients, of the sums of what they were compressed to."""
        self.compressors[block].restore()

    def summed(self, block: int, content: Sum) -> torch.Tensor:
        """Return a flat tensor to be summed over a block's replicas in place."""
        return self.bucket(block) if content == "bucket" else self.compressors[block].part(content)

    def squared_norm(self) -> torch.Tensor:
        """Return this rank's share of the squared global norm, float64 scalar: each parameter counts once.

        Of gradients as they are, so scaled if the loss is.
        """
        total: torch.Tensor | None = None
        for position in self._positions:
            if self._replica or (position.replicated and position.ranks[0] != self._rank):
                continue
            for parameter in self._parameters[position.index]:
                if parameter.grad is not None:
                    square = parameter.grad.double().square().sum()
                    total = square if total is None else total + square
        if total is not None:
            return total
        some = next((p for group in self._parameters.values() for p in group), torch.zeros(()))
        return torch.zeros((), dtype=torch.float64, device=some.device)

    def update(self, position: int, squared_norm: torch.Tensor | None) -> None:
        """Step the optimizer of a position, with gradients that are unscaled and clipped by the global norm.

        With a scaler, gradients that are not all finite leave the parameters as they are.
        """
        optimizer = self.optimizers.get(position)
        if optimizer is None:
            return
        if self.scaler is None or _finite(squared_norm):
            self._make_true(position, squared_norm)
            optimizer.step()
        if self.average is not None:
            self.average.update(position)

    def _make_true(self, position: int, squared_norm: torch.Tensor | None) -> None:
        """Undo the scale of a position's gradients and clip them, in one pass over them."""
        if squared_norm is None:
            return
        scale, factor = 1.0 if self.scaler is None else self.scaler.scale, torch.ones_like(squared_norm)
        if self._max_norm is not None:
            factor = (self._max_norm / (squared_norm.sqrt() / scale + 1e-6)).clamp(max=1.0)
        factor = factor / scale
        for parameter in self._parameters[position]:
            if parameter.grad is not None:
                parameter.grad.mul_(factor.to(parameter.grad.dtype))

    def finish(self, squared_norm: torch.Tensor | None) -> None:
        """End a step: choose the scale of the next one."""
        if self.scaler is not None:
            self.scaler.update(finite=_finite(squared_norm))

    def sharded_update(self, position: int) -> None:
        """Reduce and update a position whose optimizer state is sharded."""
        self.engines[position].step()
        if self.average is not None:
            self.average.update(position)


def _finite(squared_norm: torch.Tensor | None) -> bool:
    """Whether all gradients are; waits for the device."""
    assert squared_norm is not None
    return math.isfinite(squared_norm)


class _Move:
    """Moves the gradient that autograd made of a parameter to its place, unless it lies there already."""

    def __init__(self, place: torch.Tensor) -> None:
        self.place = place

    def __call__(self, parameter: torch.Tensor) -> None:
        if parameter.grad is not self.place:
            assert parameter.grad is not None
            parameter.grad = self.place.copy_(parameter.grad)
