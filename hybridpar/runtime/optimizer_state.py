"""What a checkpoint holds of an optimizer: its tensors, by the parameters that they belong to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod

import torch

from hybridpar.errors import CheckpointError
from hybridpar.runtime.fragment import Fragment
from hybridpar.runtime.modules import Owned
from hybridpar.runtime.pieces import Piece, Stored
from hybridpar.runtime.update import ShardedEngine

OPTIMIZER = "optimizer/"

Shape = tuple[int, ...]


class WholeState:
    """The state of an optimizer that updates all it has of its parameters, which may be slices.

    ``shapes`` are those of the model's parameters by their full names. What a checkpoint holds may be whole,
    sliced or flat.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, shapes: Mapping[str, Shape]) -> None:
        self._optimizer, self._shapes = optimizer, shapes

    def pieces(self, owned: Sequence[Owned], *, first: bool) -> dict[str, Piece]:
        """Return the state of some parameters; of those who hold slices, the ``first`` one writes what none cuts.

        Raises CheckpointError for state that cannot be cut.
        """
        return {
            _name(key, o): self._piece(o, key, value)
            for o in owned
            for key, value in self._optimizer.state.get(o.tensor, {}).items()
            if value is not None and (first or value.shape == o.tensor.shape)
        }

    def restore(self, stored: Stored, owned: Sequence[Owned]) -> None:
        """Take over the state of some parameters. Raises CheckpointError for what does not fit."""
        data = self._optimizer.state_dict()
        parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        numbers = {id(p): n for n, p in enumerate(parameters)}
        for o in owned:
            keys = _keys(stored, o)
            if keys and id(o.tensor) in numbers:
                data["state"][numbers[id(o.tensor)]] = {key: self._saved(stored, o, key) for key in keys}
        self._optimizer.load_state_dict(data)

    def _piece(self, owned: Owned, key: str, value: object) -> Piece:
        if isinstance(value, torch.Tensor) and value.shape == owned.tensor.shape:
            return Piece.slice(value, self._shapes[owned.name], owned.dim, owned.start)
        if isinstance(value, torch.Tensor) and (value.numel() == 1 or owned.dim is None):
            return Piece.whole(value)
        what = f"of shape {list(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
        raise CheckpointError(
            f"the optimizer's {key} of {owned.name} is {what}, which a checkpoint cannot cut as it cuts the "
            f"parameter {list(owned.tensor.shape)}; set checkpoint.every=null, or use another optimizer"
        )

    def _saved(self, stored: Stored, owned: Owned, key: str) -> torch.Tensor:
        """Return the saved state of a parameter, or of the slice of it that this rank has."""
        name, shape = _name(key, owned), self._shapes[owned.name]
        saved = stored.tensors[name]
        if tuple(saved.size) not in {shape, (prod(shape),)}:
            value = stored.read(name)
            return value.reshape(()) if value.numel() == 1 else value
        value = torch.empty_like(owned.tensor, dtype=saved.properties.dtype, requires_grad=False)
        piece = Piece.slice(value, shape, owned.dim, owned.start)
        if tuple(saved.size) == shape:
            stored.load({name: piece})
        else:
            piece.fill(stored.read(name).view(shape))
        return value


class ShardedState:
    """The state of a sharded optimizer on one of the ranks that share it.

    Every rank writes its own fragments, flat: no rank ever has the state of all. What a checkpoint holds may be
    whole, sliced or flat. ``shapes`` are those of the model's parameters by their full names.
    """

    def __init__(self, engine: ShardedEngine, shapes: Mapping[str, Shape]) -> None:
        self._engine, self._shapes = engine, shapes

    def pieces(self, owned: Sequence[Owned]) -> dict[str, Piece]:
        """Return this rank's part; numbers that are one for all are written with the begin of a parameter.

        Raises CheckpointError for state that cannot be cut.
        """
        fragments, result = self._engine.fragments(), {}
        for o in owned:
            if o.tensor not in fragments:
                continue
            fragment, shape = fragments[o.tensor], (o.tensor.numel(),)
            for key, value in fragment.elements.items():
                result[_name(key, o)] = Piece.slice(value, shape, 0, fragment.start)
            if fragment.start == 0:
                result |= {_name(key, o): Piece.whole(value) for key, value in fragment.scalars.items()}
        return result

    def restore(self, stored: Stored, owned: Sequence[Owned]) -> None:
        """Take over this rank's part, after the parameters. Raises CheckpointError for what does not fit."""
        places, per_element = self._engine.fragments(), _keys_per_element(stored)
        self._engine.load(
            {o.tensor: self._saved(stored, o, places[o.tensor], per_element) for o in owned if o.tensor in places}
        )

    def _saved(self, stored: Stored, owned: Owned, place: Fragment, per_element: set[str]) -> Fragment:
        """Return a fragment with its saved state."""
        elements, scalars = {}, {}
        for key in _keys(stored, owned):
            name = _name(key, owned)
            if key in per_element:
                self._check(stored, name, self._shapes[owned.name])
                elements[key] = stored.run(name, place.start, place.numel)
            else:
                scalars[key] = stored.read(name).reshape(())
        return replace(place, elements=elements, scalars=scalars)

    def _check(self, stored: Stored, name: str, shape: Shape) -> None:
        """Raise CheckpointError unless the saved tensor has a number per element of the parameter."""
        size = tuple(stored.tensors[name].size)
        if size not in {shape, (prod(shape),)}:
            raise CheckpointError(
                f"{stored.folder}: {name} has the shape {list(size)}, which sharded state of a parameter "
                f"{list(shape)} cannot have; set optimizer.sharding=none"
            )


def _name(key: str, owned: Owned) -> str:
    return f"{OPTIMIZER}{key}/{owned.name}"


def _keys(stored: Stored, owned: Owned) -> list[str]:
    """Return what was saved of a parameter's state."""
    keys = {name.split("/")[1] for name in stored.tensors if name.startswith(OPTIMIZER)}
    return [key for key in sorted(keys) if _name(key, owned) in stored.tensors]


def _keys_per_element(stored: Stored) -> set[str]:
    """Return the keys of numbers per element; parameters of a single one do not tell them from scalars."""
    return {
        name.split("/")[1]
        for name, saved in stored.tensors.items()
        if name.startswith(OPTIMIZER) and prod(saved.size) > 1
    }
