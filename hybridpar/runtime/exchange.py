"""The exchange on one rank: which parts of its values go over a boundary between blocks, and where they arrive."""

from __future__ import annotations

import torch

from hybridpar.model.order import in_memory
from hybridpar.planning.layout import Interval, Transfer
from hybridpar.runtime.lookup import Key
from hybridpar.runtime.modules import crossing_dtype
from hybridpar.runtime.step import StepState


class Exchange:
    """Finds and places what one rank has of activations and gradients at the boundaries.

    ``rank`` is its number in a plan replica; ``dtype`` is that of the plan.
    """

    def __init__(self, rank: int, dtype: torch.dtype, device: torch.device) -> None:
        self._rank, self._dtype, self._device = rank, dtype, device

    def copy(self, state: StepState, content: str, boundary: int, transfer: Transfer) -> None:
        """Carry out a transfer from this rank to itself; of a whole value nothing moves."""
        if transfer.whole:
            if content == "activation":
                source, target = state.outputs, (boundary + 1, transfer.target_micro_batch)
                state.inputs[target] = source[boundary, transfer.source_micro_batch]
            else:
                target = (boundary, transfer.target_micro_batch)
                state.gradients[target] = state.input_gradients[boundary + 1, transfer.source_micro_batch]
            return
        self.place(state, content, boundary, transfer, self.source(state, content, boundary, transfer))

    def place(self, state: StepState, content: str, boundary: int, transfer: Transfer, part: torch.Tensor) -> None:
        """Put what a transfer moved where it is needed."""
        target = self.target(state, content, boundary, transfer)
        if transfer.add:
            target += part
        else:
            target.copy_(part)

    def source(self, state: StepState, content: str, boundary: int, transfer: Transfer) -> torch.Tensor:
        """Return the part of an output or input gradient that a transfer moves, as it lies in memory."""
        if content == "activation":
            key, values = (boundary, transfer.source_micro_batch), state.outputs
            features = self.features(state, boundary, "out")
        else:
            key, values = (boundary + 1, transfer.source_micro_batch), state.input_gradients
            features = self.features(state, boundary + 1, "in")
        part = self._part(state, values[key], key, (_axis(state, boundary), features), transfer)
        return in_memory(part, last=lies_last(state, boundary))

    def target(self, state: StepState, content: str, boundary: int, transfer: Transfer) -> torch.Tensor:
        """Return the part of an input or output gradient that a transfer fills, as it lies in memory.

        Makes the buffer if need be.
        """
        if content == "activation":
            key, values = (boundary + 1, transfer.target_micro_batch), state.inputs
            features = self.features(state, boundary + 1, "in")
        else:
            key, values = (boundary, transfer.target_micro_batch), state.gradients
            features = self.features(state, boundary, "out")
        if key not in values:
            start, stop = state.program.interval(*key, self._rank)
            before, chain = state.program.blocks[boundary], state.program.chain
            shape = [stop - start, *chain.shape(before.point("out"))]
            shape[_axis(state, boundary)] = features[1] - features[0]
            dtype, last = crossing_dtype(before, chain, self._dtype), before.out_last(chain)
            order = torch.channels_last if last else torch.contiguous_format
            values[key] = torch.empty(shape, dtype=dtype, device=self._device, memory_format=order)
        part = self._part(state, values[key], key, (_axis(state, boundary), features), transfer)
        return in_memory(part, last=lies_last(state, boundary))

    def features(self, state: StepState, block: int, side: str) -> Interval:
        """Return which features of a block's input (``side`` "in") or output ("out") this rank has."""
        described = state.program.blocks[block]
        shard = state.program.positions[described.position].ranks.index(self._rank)
        return described.features(state.program.chain, shard, "in" if side == "in" else "out")

    def _part(
        self, state: StepState, value: torch.Tensor, key: Key, along: tuple[int, Interval], t: Transfer
    ) -> torch.Tensor:
        """Return a transfer's part of a value that has the features of an interval along a dim."""
        dim, features = along
        start = state.program.interval(*key, self._rank)[0]
        rows = value[t.samples[0] - start : t.samples[1] - start]
        if t.features == features:
            return rows
        return rows.narrow(dim, t.features[0] - features[0], t.features[1] - t.features[0])


def lies_last(state: StepState, boundary: int) -> bool:
    """Whether what crosses behind a block lies in memory with its channels last."""
    return state.program.blocks[boundary].out_last(state.program.chain)


def _axis(state: StepState, boundary: int) -> int:
    """Return the dim of the features in what crosses a boundary."""
    return 1 + state.program.chain.axes[state.program.blocks[boundary].point("out")]
