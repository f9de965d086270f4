"""Mixup and CutMix: samples of a step mixed with their neighbours, the same under any plan.

As in torchvision's ``transforms.v2.MixUp`` and ``CutMix``, every sample of a global batch is mixed with the one
before it (the first with the last), and one share, and one box, is drawn per step. What is drawn is keyed by
(seed, epoch, step), so that every rank knows it without being told. A rank that reads an interval of samples reads
the one before it, too, augmented by its own key.

Sources: H. Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018; S. Yun et al., "CutMix:
Regularization Strategy to Train Strong Classifiers with Localizable Features", ICCV 2019.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch import Tensor

from hybridpar.data.keys import mix
from hybridpar.errors import DataError

_MIXING = 3  # what a key is for, beside those of the sampler


class Mix(NamedTuple):
    """What happens to one step's samples."""

    share: float
    """Of the sample itself, in the loss; the one before it has the rest."""
    box: tuple[int, int, int, int] | None
    """Of CutMix, where the other image shows: from column, from row, to column, to row."""

    def apply(self, inputs: Tensor, others: Tensor) -> Tensor:
        """Mix inputs (n, ...) with ``others``."""
        if self.box is None:
            return others.mul(1.0 - self.share).add_(inputs.mul(self.share))
        left, top, right, bottom = self.box
        mixed = inputs.clone()
        mixed[..., top:bottom, left:right] = others[..., top:bottom, left:right]
        return mixed


@dataclass(frozen=True)
class Mixing:
    """How the steps of a training mix their samples. Raises DataError where inputs cannot be mixed like that.

    The share is drawn from a Beta(alpha, alpha) distribution. With both, each step does one of them by the toss of
    a coin.
    """

    seed: int
    in_shape: tuple[int, ...]
    """Of one input sample."""
    mixup: float | None = None
    """Its alpha; None: no mixup."""
    cutmix: float | None = None
    """Its alpha; None: no CutMix."""

    def __post_init__(self) -> None:
        if self.cutmix is not None and len(self.in_shape) < 3:
            raise DataError(
                f"data.cutmix: the model's inputs are {list(self.in_shape)}, in which no box can be cut; they "
                "must be images (channels, height, width): use data.mixup"
            )

    def of(self, epoch: int, step: int) -> Mix:
        """Return what is drawn for a step of an epoch."""
        key = int(mix(self.seed, epoch, _MIXING, np.array([step]))[0])
        draw = np.random.Generator(np.random.Philox(key=key))
        cuts = self.cutmix is not None and (self.mixup is None or draw.random() < 0.5)
        alpha = self.cutmix if cuts else self.mixup
        assert alpha is not None
        share = float(draw.beta(alpha, alpha))
        return self._cut(share, draw) if cuts else Mix(share, None)

    def _cut(self, share: float, draw: np.random.Generator) -> Mix:
        """Return a box of about ``1 - share`` of the image, and the share that it leaves."""
        height, width = self.in_shape[-2:]
        x, y = int(draw.integers(width)), int(draw.integers(height))
        half = 0.5 * math.sqrt(1.0 - share)
        across, down = int(half * width), int(half * height)
        left, top = max(x - across, 0), max(y - down, 0)
        right, bottom = min(x + across, width), min(y + down, height)
        return Mix(1.0 - (right - left) * (bottom - top) / (width * height), (left, top, right, bottom))
