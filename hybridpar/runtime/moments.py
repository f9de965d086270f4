"""Moments on one rank: what its batch norms tell those of other ranks within a pass."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from hybridpar.model.shared_norm import combined
from hybridpar.planning.program import Operation
from hybridpar.runtime.communicators import Communicators
from hybridpar.runtime.modules import BlockModules
from hybridpar.runtime.step import Started, StepState


class Moments:
    """Starts and ends the operations in which batch norms meet.

    ``rank`` is that of a plan replica; ``blocks`` are its own, by block index; ``dtype`` is that of the plan.
    """

    def __init__(
        self,
        rank: int,
        blocks: Mapping[int, BlockModules],
        communicators: Communicators,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._rank, self._blocks, self._communicators = rank, blocks, communicators
        self._dtype, self._device = dtype, device

    def start(self, state: StepState, operation: Operation) -> Started:
        """Start telling other ranks what the batch norm gave that is waiting; without samples that is zeros."""
        own = state.given
        if own is None:
            if state.program.works(operation.block or 0, operation.micro_batch or 0, self._rank):
                raise RuntimeError(
                    "its batch norm was not called: the layer runs otherwise than when it was traced"
                )
            count = operation.bytes // self._dtype.itemsize
            own = torch.zeros(count, dtype=self._dtype, device=self._device)
        if operation.kind == "all_gather":
            state.gathered = [torch.empty_like(own) for _ in range(state.program.participants(operation))]
            return Started(self._communicators.all_gather(operation, state.gathered, own), own)
        return Started(self._communicators.all_reduce(operation, own), own)

    def end(self, state: StepState, operation: Operation, own: torch.Tensor) -> None:
        """Give the batch norm what it waits for; one without samples takes it into its running statistics."""
        if operation.kind == "all_gather":
            own = combined(torch.stack(state.gathered))
            state.gathered = []
        if state.given is not None:
            state.given = own
        elif not operation.backward:
            self._blocks[operation.block or 0].norms[operation.norm or 0].learn(own)
