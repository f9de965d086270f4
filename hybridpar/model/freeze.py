"""Frozen parameters: what is held and used, but not trained."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from hybridpar.errors import ModelError
from hybridpar.model.chain import Chain

_SHOWN = 3
"""Names in an error."""


def freeze(module: nn.Module, patterns: Sequence[str]) -> None:
    """Set ``requires_grad=False`` for all parameters whose full name, or one of them, matches a pattern.

    Patterns are those of a shell, as ``features.*``. Raises ModelError for one that matches nothing.
    """
    named = list(module.named_parameters(remove_duplicate=False))
    for pattern in patterns:
        matched = [parameter for name, parameter in named if fnmatchcase(name, pattern)]
        if not matched:
            raise ModelError(
                f"model.frozen: {pattern} matches no parameter of the model, whose first ones are "
                f"{', '.join(name for name, _ in named[:_SHOWN])}; give a pattern of such names"
            )
        for parameter in matched:
            parameter.requires_grad_(False)


def check_trained(chain: Chain) -> None:
    """Raise ModelError where all parameters are frozen, so that there is nothing to train."""
    if chain.frozen and not any(chain.trained):
        raise ModelError(
            f"all {len(chain.frozen)} parameters of {chain.model} are frozen, so that nothing would be trained; "
            "leave some out of model.frozen, or set requires_grad in the model"
        )
