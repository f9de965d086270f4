"""Running statistics of batch norms: before an evaluation their mean over the replicas of a segment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from hybridpar.model.chain import Chain
from hybridpar.planning.blocks import Position
from hybridpar.planning.program import Operation
from hybridpar.runtime.communicators import Communicators
from hybridpar.runtime.modules import BlockModules


class RunningStatistics:
    """The running statistics of the batch norms of one rank.

    ``place`` is the rank's number in its plan replica; ``positions`` and ``blocks`` are its own.
    """

    def __init__(
        self,
        place: int,
        chain: Chain,
        positions: Sequence[Position],
        blocks: Mapping[int, BlockModules],
        communicators: Communicators,
    ) -> None:
        self._place, self._chain, self._communicators = place, chain, communicators
        self._positions, self._blocks = positions, blocks

    def average(self) -> None:
        """Make them the mean over the replicas, unless they are equal as they are synchronised.

        Every rank calls it between two steps, so its operations stand in no program and have no number there.
        """
        for position in self._positions:
            buffers = self._unequal(position) if position.reduced else []
            if not buffers:
                continue
            flat = torch.cat([b.reshape(-1) for b in buffers])
            size = flat.numel() * flat.element_size()
            name, ranks = position.gradients(self._place), position.sharers(self._place)
            across = position.copies > 1
            operation = Operation(0, "all_reduce", "running_statistics", name, ranks, size, across=across)
            self._communicators.all_reduce(operation, flat).wait()
            flat /= len(ranks) * position.copies
            for buffer, mean in zip(buffers, torch.split(flat, [b.numel() for b in buffers]), strict=True):
                buffer.copy_(mean.view_as(buffer))

    def _unequal(self, position: Position) -> list[torch.Tensor]:
        """Return the floating buffers of a position's batch norms that may differ between its replicas."""
        equal = position.synchronised and (position.joint or position.copies == 1)
        return [
            buffer
            for modules in self._blocks.values()
            if modules.block.position == position.index
            for index, layer in zip(range(*modules.block.layers), modules.layers, strict=True)
            if self._chain.layers[index].batch_norm and not (equal and self._chain.layers[index].norms)
            for buffer in layer.buffers()
            if buffer.is_floating_point()
        ]
