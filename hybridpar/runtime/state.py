"""What a job would need to go on: its tensors by names that no plan changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from hybridpar.model.copies import named_tensors
from hybridpar.model.trace import Traced
from hybridpar.planning.blocks import Position
from hybridpar.runtime import randomness
from hybridpar.runtime.average import Average
from hybridpar.runtime.compression import Compressor
from hybridpar.runtime.modules import BlockModules, Owned
from hybridpar.runtime.optimizer_state import ShardedState, WholeState
from hybridpar.runtime.pieces import Piece, Stored
from hybridpar.runtime.scaler import Scaler
from hybridpar.runtime.update import ShardedEngine

PARAMETER, AVERAGE, BUFFER, GENERATOR = "parameter/", "average/", "buffer/", "generator/"
SCALER = "scaler"
COMPRESSION = "compression/"


class State:
    """One rank's parameters, buffers, optimizer state, scale of the loss and random generators.

    Names: ``parameter/NAME``; ``average/NAME`` for the moving average of one that is trained;
    ``optimizer/KEY/NAME`` for the optimizer's tensor KEY of a parameter;
    ``buffer/I/NAME`` for the buffer of the I-th of the ranks that hold it (batch norms differ between them), of
    which ``buffer/I.P/NAME`` is that of position P where another one before it has the same buffer, too;
    ``compression/RANK/WHAT/NAME`` for what a rank's compressed sums of a gradient go on from;
    ``generator/RANK/KIND`` of ``runtime.randomness``; ``scaler`` for the scale of the loss, the same on all ranks.
    A parameter that several ranks hold is written by the first of them. Of a tied parameter there is one, by its
    first name. A position has one of ``optimizers``, or of ``engines``.
    """

    def __init__(
        self,
        traced: Traced,
        positions: tuple[Position, ...],
        blocks: Mapping[int, BlockModules],
        optimizers: Mapping[int, torch.optim.Optimizer],
        engines: Mapping[int, ShardedEngine],
        rank: int,
        place: int,
        replica: int,
        device: torch.device,
        average: Average | None = None,
        scaler: Scaler | None = None,
        compressors: Mapping[int, Compressor] | None = None,
    ) -> None:
        self._average, self._scaler, self._compressors = average, scaler, compressors or {}
        self._traced, self._positions, self._blocks = traced, positions, blocks
        self._rank, self._place, self._replica, self._device = rank, place, replica, device
        self._shapes = {
            names[local]: tuple(parameter.shape)
            for module, names in zip(traced.modules, traced.names, strict=True)
            for local, parameter in module.named_parameters()
        }
        self._whole = {index: WholeState(optimizer, self._shapes) for index, optimizer in optimizers.items()}
        self._sharded = {index: ShardedState(engine, self._shapes) for index, engine in engines.items()}

    def names(self, module: nn.Module) -> dict[str, str]:
        """Return where each tensor of the model's state dict is saved, apart from those that no layer uses."""
        first: dict[int, str] = {}
        for name, tensor in named_tensors(module).items():
            first.setdefault(id(tensor), name)
        parameters = {id(parameter) for parameter in module.parameters()}
        used = {name for names in self._traced.names for name in names.values()}
        return {
            name: (PARAMETER if id(tensor) in parameters else BUFFER) + first[id(tensor)]
            for name, tensor in module.state_dict(keep_vars=True).items()
            if isinstance(tensor, torch.Tensor) and first[id(tensor)] in used
        }

    def pieces(self) -> dict[str, Piece]:
        """Return what this rank writes. Raises CheckpointError for optimizer state that cannot be cut."""
        result: dict[str, Piece] = {}
        for position in self._positions:
            owned, index, first = self._owned(position), position.index, position.ranks[0] == self._place
            written = [o for o in owned if self._writes(position, o)]
            result |= {PARAMETER + o.name: self._piece(o) for o in written}
            result |= self._averages(written)
            if index in self._whole:
                result |= self._whole[index].pieces(written, first=first)
            if index in self._sharded:
                result |= self._sharded[index].pieces(owned)
        for position in self._positions:
            for name, (buffer, *_) in self._buffers(position).items():
                if not position.sharded or position.ranks[0] == self._place:  # a tail's shards all hold the same
                    result[self._saved_as(position, name)] = Piece.whole(buffer)
        result |= self._compressed()
        for kind, generator in randomness.states(self._device).items():
            result[f"{GENERATOR}{self._rank}/{kind}"] = Piece.whole(generator)
        if self._scaler is not None and self._rank == 0:
            result[SCALER] = Piece.whole(self._scaler.state())
        return result

    def restore(self, stored: Stored, *, same_plan: bool) -> None:
        """Take over a checkpoint's tensors.

        Under the plan that saved them (``same_plan``) every rank gets its own buffers and generators again, and
        what its compressed sums go on from; under another one the buffers are the mean over those who held them,
        the generators stay as they are, and compression begins anew. Raises CheckpointError for what does not fit.
        An average, and the scale of the loss, begin anew where the checkpoint has none.
        """
        averaged = self._average is not None and any(name.startswith(AVERAGE) for name in stored.tensors)
        for position in self._positions:
            owned, index = self._owned(position), position.index
            stored.load({PARAMETER + o.name: self._piece(o) for o in owned})
            if averaged:
                stored.load(self._averages(owned))
            if index in self._whole:
                self._whole[index].restore(stored, owned)
            if index in self._sharded:
                self._sharded[index].restore(stored, owned)
            self._restore_buffers(position, stored, same_plan=same_plan)
        if self._average is not None and averaged:
            self._average.go_on()
        if self._scaler is not None and SCALER in stored.tensors:
            self._scaler.load(stored.read(SCALER))
        if same_plan:
            stored.load(self._compressed())
            self._restore_generators(stored)

    def _compressed(self) -> dict[str, Piece]:
        kept = (entry for compressor in self._compressors.values() for entry in compressor.kept())
        return {f"{COMPRESSION}{self._rank}/{what}/{o.name}": Piece.whole(tensor) for what, o, tensor in kept}

    def _restore_buffers(self, position: Position, stored: Stored, *, same_plan: bool) -> None:
        for name, buffers in self._buffers(position).items():
            value = stored.read(self._saved_as(position, name)) if same_plan else mean_buffer(stored, name)
            for buffer in buffers:
                buffer.data.copy_(value.view_as(buffer))

    def _owned(self, position: Position) -> list[Owned]:
        return [o for b in self._blocks.values() if b.block.position == position.index for o in b.owned]

    def _writes(self, position: Position, owned: Owned) -> bool:
        """Whether this rank is the first of those who hold a slice."""
        first = position.ranks[0] == self._place
        return self._replica == 0 and (first or (position.sharded and owned.dim is not None))

    def _piece(self, owned: Owned, tensor: torch.Tensor | None = None) -> Piece:
        value = owned.tensor if tensor is None else tensor
        return Piece.slice(value, self._shapes[owned.name], owned.dim, owned.start)

    def _averages(self, owned: Sequence[Owned]) -> dict[str, Piece]:
        """Return the averages of those parameters that are trained."""
        values = {} if self._average is None else self._average.values
        return {AVERAGE + o.name: self._piece(o, values[o.tensor]) for o in owned if o.tensor in values}

    def _buffers(self, position: Position) -> dict[str, list[torch.Tensor]]:
        """Return a position's buffers by their full names; a shared one may have several tensors here."""
        result: dict[str, list[torch.Tensor]] = {}
        for modules in self._blocks.values():
            if modules.block.position == position.index:
                for index, layer in zip(range(*modules.block.layers), modules.layers, strict=False):
                    for local, buffer in layer.named_buffers():
                        result.setdefault(self._traced.names[index][local], []).append(buffer)
        return result

    def _saved_as(self, position: Position, buffer: str) -> str:
        """Return the name of this rank's own: which of those who hold it, and after the first position where."""
        copy = self._replica
        if not position.sharded:
            copy = self._replica * len(position.ranks) + position.ranks.index(self._place)
        first = next(i for i, names in enumerate(self._traced.names) if buffer in names.values())
        start, stop = position.layers
        return f"{BUFFER}{copy}{'' if start <= first < stop else f'.{position.index}'}/{buffer}"

    def _restore_generators(self, stored: Stored) -> None:
        for kind in randomness.states(self._device):
            randomness.restore(kind, stored.read(f"{GENERATOR}{self._rank}/{kind}"), self._device)


def mean_buffer(stored: Stored, name: str) -> torch.Tensor:
    """Return a buffer as the mean over those who held it; one of integers as the first of them has it.

    Raises CheckpointError where the checkpoint has none.
    """
    names = [n for n in stored.tensors if n.startswith(BUFFER) and n.split("/", maxsplit=2)[2] == name]
    first = stored.read(names[0] if names else f"{BUFFER}0/{name}")
    if not first.is_floating_point():
        return first
    others = [stored.read(n) for n in names[1:]]
    total = first.clone()
    for other in others:
        total += other
    return total / (1 + len(others))
