"""Which parts of a block's flat gradients go to whom, where every rank keeps the sums of its own part only."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import NamedTuple

import torch

Message = tuple[torch.Tensor, list[torch.Tensor]]
"""Of a reduce-scatter: what arrives, and what this rank adds to every participant's sum."""


@dataclass(frozen=True)
class Scatter:
    """A bucket on its way."""

    flat: torch.Tensor
    messages: list[Message]
    """One per group of parameters with options of their own, of which each is partitioned by itself."""
    sums: list[tuple[torch.Tensor, torch.Tensor]]
    """What is to be added when all has arrived: (to this, that)."""

    def add(self) -> None:
        """Add what has arrived to what earlier rounds have left."""
        for total, piece in self.sums:
            total.add_(piece)


class Run(NamedTuple):
    """Neighbouring parameters of a bucket that lie next to each other in a group's flat vector."""

    group: int
    at: int
    """Where in the bucket it begins."""
    start: int
    """Where in the group's vector it begins."""
    numel: int


class Routes:
    """The way of a bucket's gradients to the ranks' parts.

    Args:
        places: of its parameters in their order, (group, begin in the group's vector, elements).
        parts: this rank's parts of the summed gradients, one per group, (elements of a part,).
        sharers: how many ranks have a part of each vector.
        index: which of them this one is.

    """

    def __init__(
        self, places: Iterable[tuple[int, int, int]], parts: Sequence[torch.Tensor], sharers: int, index: int
    ) -> None:
        self._parts, self._sharers, self._index = parts, sharers, index
        self._runs: list[Run] = []
        at = 0
        for group, members in groupby(places, key=lambda place: place[0]):
            own = list(members)
            numel = sum(n for _, _, n in own)
            self._runs.append(Run(group, at, own[0][1], numel))
            at += numel

    def scatter(self, flat: torch.Tensor, *, first: bool) -> Scatter:
        """Return what is to be sent of a bucket; of the ``first`` round of a step sums arrive at their place."""
        messages: list[Message] = []
        sums = []
        for run in self._runs:
            part = self._parts[run.group]
            bounds = [min(max(k * len(part) - run.start, 0), run.numel) for k in range(self._sharers + 1)]
            pieces = [flat[run.at + a : run.at + b] for a, b in pairwise(bounds)]
            begin = run.start + bounds[self._index] - self._index * len(part)
            own = pieces[self._index].numel()
            total = part[begin : begin + own] if own else part[:0]
            arriving = total if first else torch.empty_like(total)
            messages.append((arriving, pieces))
            if not first:
                sums.append((total, arriving))
        return Scatter(flat, messages, sums)
