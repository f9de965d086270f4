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
            key, values, side = (boundary, transfer.source_micro_batch), state.outputs, "out"
        else:
            key, values, side = (boundary + 1, transfer.source_micro_batch), state.input_gradients, "in"
        part = values[key]
        if not transfer.whole:
            part = self._part(state, part, key, (boundary, side), transfer)
        return in_memory(part, last=lies_last(state, boundary))

    def target(self, state: StepState, content: str, boundary: int, transfer: Transfer) -> torch.Tensor:
        """Return the part of an input or output gradient that a transfer fills, as it lies in memory.

        Makes the buffer if need be.
        """
        if content == "activation":
            key, values, side = (boundary + 1, transfer.target_micro_batch), state.inputs, "in"
        else:
            key, values, side = (boundary, transfer.target_micro_batch), state.gradients, "out"
        if transfer.whole:
            part = values[key] = self._buffer(state, boundary, transfer.samples, transfer.features)
            return in_memory(part, last=lies_last(state, boundary))
        if key not in values:
            samples, features = state.program.interval(*key, self._rank), self.features(state, key[0], side)
            values[key] = self._buffer(state, boundary, samples, features)
        part = self._part(state, values[key], key, (boundary, side), transfer)
        return in_memory(part, last=lies_last(state, boundary))

    def _buffer(self, state: StepState, boundary: int, samples: Interval, features: Interval) -> torch.Tensor:
        """Make room for some samples and features of what crosses a boundary."""
        before, chain = state.program.blocks[boundary], state.program.chain
        shape = [samples[1] - samples[0], *chain.shape(before.point("out"))]
        shape[_axis(state, boundary)] = features[1] - features[0]
        dtype, last = crossing_dtype(before, chain, self._dtype), before.out_last(chain)
        order = torch.channels_last if last else torch.contiguous_format
        return torch.empty(shape, dtype=dtype, device=self._device, memory_format=order)

    def features(self, state: StepState, block: int, side: str) -> Interval:
        """Return which features of a block's input (``side`` "in") or output ("out") this rank has."""
        described = state.program.blocks[block]
        shard = state.program.positions[described.position].ranks.index(self._rank)
        return described.features(state.program.chain, shard, "in" if side == "in" else "out")

    def _part(
        self, state: StepState, value: torch.Tensor, key: Key, place: tuple[int, str], t: Transfer
    ) -> torch.Tensor:
        """Return a transfer's part of the value on a side of a boundary."""
        boundary, side = place
        features = self.features(state, key[0], side)
        start = state.program.interval(*key, self._rank)[0]
        rows = value[t.samples[0] - start : t.samples[1] - start]
        if t.features == features:
            return rows
        dim = _axis(state, boundary)
        return rows.narrow(dim, t.features[0] - features[0], t.features[1] - t.features[0])


def lies_last(state: StepState, boundary: int) -> bool:
    """Whether what crosses behind a block lies in memory with its channels last."""
    return state.program.blocks[boundary].out_last(state.program.chain)


def _axis(state: StepState, boundary: int) -> int:
    """Return the dim of the features in what crosses a boundary."""
    return 1 + state.program.chain.axes[state.program.blocks[boundary].point("out")]
