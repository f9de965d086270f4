"""The scale of the loss: large gradients that float16 holds, for small ones that it would round to zero."""

from __future__ import annotations

import torch

from hybridpar.train_section import LossScale

_LARGEST = torch.finfo(torch.float32).max


class Scaler:
    """Chooses the scale of every step as ``torch.amp.GradScaler`` does.

    A step whose gradients are not all finite is skipped, and the scale shrinks by ``backoff_factor``; after
    ``growth_interval`` others in a row it grows by ``growth_factor``, unless float32 could not hold it. All ranks
    hold one and come to the same scale, as they see the same global norm.
    """

    def __init__(self, settings: LossScale) -> None:
        self._settings = settings
        self.scale = settings.init
        """What the loss of the next step is multiplied by, for its gradient."""
        self.used = settings.init
        """The scale of the last step."""
        self.skipped = 0
        """Steps that were skipped, of all."""
        self.in_a_row = 0
        """Steps that were skipped since the last one that was taken."""
        self._grown = 0
        """Steps that were taken since the scale changed."""

    def update(self, *, finite: bool) -> None:
        """Choose the next scale after a step whose gradients were all ``finite``, or not."""
        settings, self.used = self._settings, self.scale
        if not finite:
            self.scale *= settings.backoff_factor
            self.skipped, self.in_a_row, self._grown = self.skipped + 1, self.in_a_row + 1, 0
            return
        self.in_a_row, self._grown = 0, self._grown + 1
        if self._grown == settings.growth_interval:
            self._grown = 0
            if self.scale * settings.growth_factor <= _LARGEST:
                self.scale *= settings.growth_factor

    def state(self) -> torch.Tensor:
        """Return what a checkpoint needs, float64: scale, steps since it changed, skipped, skipped in a row."""
        return torch.tensor([self.scale, self._grown, self.skipped, self.in_a_row], dtype=torch.float64)

    def load(self, state: torch.Tensor) -> None:
        """Take over what ``state`` gave."""
        self.scale, grown, skipped, in_a_row = state.tolist()
        self._grown, self.skipped, self.in_a_row = int(grown), int(skipped), int(in_a_row)
