"""Parameter groups: which parameters of a rank the optimizer treats in a way of their own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from hybridpar.errors import ConfigError
from hybridpar.model.chain import Chain
from hybridpar.names import nearest
from hybridpar.optimizer_section import ParameterGroup


def check_groups(groups: Sequence[ParameterGroup], chain: Chain) -> None:
    """Raise ConfigError for a group that no parameter of the model belongs to."""
    frozen = set(chain.frozen)
    everywhere = dict.fromkeys(p.name for layer in chain.layers for p in layer.parameters)
    names = [name for name in everywhere if name not in frozen]
    left = set(names)
    for group in groups:
        matched = {name for name in names if group.has(name)}
        if not matched:
            raise ConfigError(
                f"optimizer.groups: {group.match} matches no parameter of {chain.model}, whose first ones are "
                f"{', '.join(names[:5])} (frozen ones have no group); give a pattern of such names"
            )
        if not matched & left:
            raise ConfigError(
                f"optimizer.groups: all that {group.match} matches belongs to earlier groups; put it before them"
            )
        left -= matched


def grouped(
    named: Iterable[tuple[str, nn.Parameter]], groups: Sequence[ParameterGroup]
) -> list[nn.Parameter] | list[dict[str, Any]]:
    """Return parameters as an optimizer takes them: those without a group of theirs first, then group by group.

    A parameter belongs to the first group that has its name. Groups without parameters here are left out.
    """
    if not groups:
        return [parameter for _, parameter in named]
    parts: list[dict[str, Any]] = [{"params": []}, *({"params": [], **g.options} for g in groups)]
    for name, parameter in named:
        index = next((i for i, g in enumerate(groups, 1) if g.has(name)), 0)
        parts[index]["params"].append(parameter)
    return [part for part in parts if part["params"]]


def check_options_of(groups: Sequence[ParameterGroup], optimizer: torch.optim.Optimizer) -> None:
    """Raise ConfigError for an option that the optimizer does not have; torch would take no notice of it."""
    for group in groups:
        for option in group.options:
            if option not in optimizer.defaults:
                raise ConfigError(
                    f"optimizer.groups: {group.match} sets {option}, which {type(optimizer).__name__} lacks"
                    f"{nearest(option, sorted(optimizer.defaults))}"
                )


def relative_rates(optimizer: torch.optim.Optimizer) -> list[float]:
    """Return every group's learning rate as a multiple of the optimizer's own.

    Raises ConfigError where that is 0 and a group's is not.
    """
    own = float(optimizer.defaults["lr"])
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    if own == 0 and any(rates):
        raise ConfigError(
            f"optimizer.groups: lr={max(rates)} is no multiple of the optimizer's lr=0, as schedules need it; "
            "set that above 0"
        )
    return [rate / own if own else 1.0 for rate in rates]
