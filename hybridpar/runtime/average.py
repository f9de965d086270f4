"""The exponential moving average of the weights, on one rank: of the parameters that it trains itself."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class Average:
    """Averages as ``torch.optim.swa_utils.AveragedModel`` with ``get_ema_multi_avg_fn(decay)`` does.

    After the first step the average is the parameters; after each later one it is
    ``decay * average + (1 - decay) * parameter``. Buffers are not averaged: those of the model are used.
    ``parameters`` are the trained ones by position; the average needs as much memory as they.
    """

    def __init__(self, decay: float, parameters: Mapping[int, Sequence[nn.Parameter]]) -> None:
        self._parameters = {index: list(own) for index, own in parameters.items()}
        self._blend = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        self._begun: set[int] = set()
        self._values = {p: p.detach().clone() for own in self._parameters.values() for p in own}

    @property
    def values(self) -> Mapping[nn.Parameter, torch.Tensor]:
        """The averages by their parameters."""
        return self._values

    def update(self, position: int) -> None:
        """Take in the parameters of a position, which its optimizer has just changed."""
        own = self._parameters[position]
        if not own:
            return
        averages, current = [self._values[p] for p in own], [p.detach() for p in own]
        if position in self._begun:
            self._blend(averages, current, 0)
        else:
            torch._foreach_copy_(averages, current)
        self._begun.add(position)

    def go_on(self) -> None:
        """Take the values, which have been restored, for averages of earlier steps."""
        self._begun = set(self._parameters)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the model have the averages for its parameters, and then its own again."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        for parameter, average in self._values.items():
            self._values[parameter] = parameter.data
            parameter.data = average
