"""Fragments: what a rank holds of a parameter's optimizer state where the state is sharded flat.

All trainable parameters are thought flat and one after the other, and every replica keeps the optimizer state of
an equally long part of that; a parameter may begin in one part and end in the next.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from hybridpar.errors import CheckpointError


@dataclass(frozen=True)
class Fragment:
    """A run of a flattened parameter, and its optimizer state, which is empty before the first step."""

    start: int
    """Where in the flattened parameter it begins."""
    numel: int
    at: int
    """Where in the rank's flat state it begins."""
    elements: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """By the optimizer's key: (numel,), a number per element."""
    scalars: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """By the optimizer's key: one number, the same for all fragments of the flat state."""


def cut(fragment: Fragment, state: Mapping[str, object], shape: torch.Size) -> Fragment:
    """Return a fragment with its part of a flat state, whose tensors have ``shape``, (n,); they are views.

    Raises CheckpointError for state that is neither a number per element nor a single one.
    """
    elements, scalars = {}, {}
    for key, value in state.items():
        if isinstance(value, torch.Tensor) and value.shape == shape:
            elements[key] = value.narrow(0, fragment.at, fragment.numel)
        elif isinstance(value, torch.Tensor) and value.numel() == 1:
            scalars[key] = value
        elif value is not None:
            what = f"of shape {list(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
            raise CheckpointError(
                f"the optimizer's {key} is {what}, which a checkpoint cannot cut as it cuts the {shape.numel()} "
                "elements that a rank updates; set checkpoint.every=null, or use another optimizer"
            )
    return replace(fragment, elements=elements, scalars=scalars)


def join(fragments: Sequence[Fragment], like: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the flat state, of tensors like ``like``, (n,), that fragments are cut from; padding is zero.

    Raises CheckpointError where the fragments could not have been one state.
    """
    state: dict[str, torch.Tensor] = {}
    for first in fragments[:1]:
        state |= {key: torch.zeros_like(like, requires_grad=False) for key in first.elements}
        state |= first.scalars
    for fragment in fragments:
        _check_alike(fragments[0], fragment)
        for key, value in fragment.elements.items():
            state[key].narrow(0, fragment.at, fragment.numel).copy_(value)
    return state


def _check_alike(one: Fragment, other: Fragment) -> None:
    said = [
        sorted(f.elements) + [f"{key}={value.item()}" for key, value in sorted(f.scalars.items())]
        for f in (one, other)
    ]
    if said[0] != said[1]:
        raise CheckpointError(
            f"the checkpoint has {', '.join(said[0]) or 'nothing'} as the optimizer's state of one parameter and "
            f"{', '.join(said[1]) or 'nothing'} of another one, but sharded state is one for all; set "
            "optimizer.sharding=none, or give another checkpoint"
        )
