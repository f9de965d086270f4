"""The line from the batch norms of a block to the operations of the program."""

from __future__ import annotations

from collections.abc import Callable

import torch


class Line:
    """Peers of a block's batch norms in one forward and its backward; see ``model.shared_norm.Peers``.

    ``meet`` runs the operation that is next in the program. In a forward that runs again the norms ask nobody:
    they are ``told`` what they were told in the first one.
    """

    def __init__(
        self, meet: Callable[[torch.Tensor], torch.Tensor], told: list[torch.Tensor] | None = None
    ) -> None:
        self._meet, self._told = meet, None if told is None else iter(told)
        self._met: list[torch.Tensor] = []

    def moments(self, own: torch.Tensor) -> torch.Tensor:
        """Return the moments of all samples."""
        if self._told is not None:
            return next(self._told)
        self._met.append(self._meet(own))
        return self._met[-1]

    def sums(self, own: torch.Tensor) -> torch.Tensor:
        """Return the sums over all ranks."""
        return self._meet(own)

    def take(self) -> list[torch.Tensor]:
        """Return what the norms were told in the forward; a graph that holds the line holds it no longer."""
        met, self._met = self._met, []
        return met
