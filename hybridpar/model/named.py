"""Layers that a user names by hand, where tracing fails or cuts elsewhere than wished.

::

    class Model(nn.Module):
        def hybridpar_layers(self):
            return [("stem", self.stem), *self.blocks.named_children(), ("head", self.head)]

The layers run one after the other, each on the output of the one before, and have to give what the model gives.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import nn

from hybridpar.errors import HybridparError, ModelError
from hybridpar.generators import borrowed
from hybridpar.model.copies import named_tensors, randomized

METHOD = "hybridpar_layers"
LARGEST_PARAMETERS = 2**29
"""Layers of a larger model are taken as they are: it would take more than 2 GiB to run it."""
_TOLERANCE = 1e-4
"""Of the largest output, in float32."""

Named = list[tuple[str, nn.Module]]
Naming = Callable[[nn.Module], Sequence[tuple[str, nn.Module]]]


def named_layers(model: nn.Module, layers: Naming | None) -> Named | None:
    """Return the layers that ``layers`` names in ``model``, else its method ``hybridpar_layers``, else None.

    Raises ModelError where they are not pairs of different names and modules, hold a tensor that is not the
    model's, or leave out one of its parameters.
    """
    method = getattr(model, METHOD, None)
    if layers is None and method is None:
        return None
    given: object = layers(model) if layers is not None else method()  # type: ignore[misc]
    if isinstance(given, nn.Module | str) or not isinstance(given, Sequence) or not given:
        raise ModelError(f"{METHOD} gave {_kind(given)}; it must give a list of (name, module)")
    for pair in given:
        fits = isinstance(pair, tuple | list) and len(pair) == 2
        if not (fits and isinstance(pair[0], str) and pair[0] and isinstance(pair[1], nn.Module)):
            raise ModelError(f"{METHOD} gave {_kind(pair)} as a layer; each must be a pair (name, module)")
    chosen = [(name, part) for name, part in given]
    (name, count), *_ = Counter(name for name, _ in chosen).most_common(1)
    if count > 1:
        raise ModelError(f"{METHOD} gave the name {name} to {count} layers; give each its own")
    _check_tensors(model, chosen)
    return chosen


def _check_tensors(model: nn.Module, chosen: Named) -> None:
    full = {id(tensor) for tensor in named_tensors(model).values()}
    for name, part in chosen:
        for local, tensor in named_tensors(part).items():
            if id(tensor) not in full:
                raise ModelError(
                    f"{METHOD}: {local} of layer {name} is no parameter or buffer of the model; make layers "
                    "of the model's own submodules and parameters"
                )
    held = {id(tensor) for _, part in chosen for tensor in part.parameters()}
    left = [name for name, tensor in model.named_parameters() if id(tensor) not in held]
    if left:
        names = f"{', '.join(left[:3])}{', ...' if len(left) > 3 else ''}"
        raise ModelError(
            f"{METHOD}: no layer holds {names}, so that it would not be trained "
            "name a layer with it, or remove it from the model"
        )


def compare(model: nn.Module, chosen: Named, in_shape: tuple[int, ...], dtype: torch.dtype, name: str) -> None:
    """Run model and layers with the same random weights on two random samples, in evaluation mode, on the CPU.

    Raises ModelError where the layers fail, or do not give what the model gives.
    """
    if sum(p.numel() for p in model.parameters()) > LARGEST_PARAMETERS:
        return
    # One copy of both, so that a layer's tensors stay the model's.
    whole, *parts = randomized(nn.ModuleList([model, *(part for _, part in chosen)]), 0).float().eval().children()
    with borrowed(1), torch.no_grad():
        shape = (2, *in_shape)
        x = torch.randn(shape) if dtype.is_floating_point else torch.randint(0, 2, shape)
        expected = _checked(whole, x.clone(), f"model {name}")
        for (layer, _), part in zip(chosen, parts, strict=True):
            x = _checked(part, x.clone(), f"{METHOD}: layer {layer}")
    if x.shape != expected.shape:
        raise ModelError(
            f"{METHOD}: the layers give {tuple(x.shape)} for two samples but the model {tuple(expected.shape)}; "
            f"the layers must give what {name} gives"
        )
    difference = float((x - expected).abs().max())
    largest = float(expected.abs().max())
    if not difference <= _TOLERANCE * largest:
        raise ModelError(
            f"{METHOD}: the layers' output differs from the model's by {difference:.3g} where the largest output "
            f"is {largest:.3g}; the layers, one after the other, must compute what {name}.forward does"
        )


def _checked(module: nn.Module, x: torch.Tensor, what: str) -> torch.Tensor:
    try:
        out = module(x)
    except HybridparError:
        raise
    except Exception as e:
        raise ModelError(f"{what} fails for an input of shape {tuple(x.shape)}: {type(e).__name__}: {e}") from e
    if not isinstance(out, torch.Tensor) or not out.is_floating_point():
        raise ModelError(f"{what} gives {_kind(out)}; it must give one floating tensor")
    return out


def _kind(thing: object) -> str:
    if isinstance(thing, torch.Tensor):
        return f"a tensor of {thing.dtype}"
    return f"a {type(thing).__name__}"
