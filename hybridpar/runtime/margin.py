"""Margins of recognition losses: a softmax over cosines in which the target's own is made harder to reach."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from hybridpar.errors import ConfigError
from hybridpar.runtime.loss import Logits, own_columns
from hybridpar.sections import MarginConfig


class Margin(Protocol):
    """What becomes of the target's cosine. All are multiplied by ``scale`` before the softmax."""

    @property
    def scale(self) -> float:
        """Multiplies all cosines."""
        ...

    def target(self, cosine: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what stands for the target's cosine, and its derivative by that; all (samples,)."""
        ...


def _check(kind: str, scale: float, margin: float, most: float) -> None:
    if not (0 < scale < math.inf and 0 <= margin < most):
        raise ConfigError(
            f"loss.margin: {kind} with scale {scale} and margin {margin}; the scale must be above 0 and the "
            f"margin from 0 to below {most:.4g}"
        )


@dataclass(frozen=True)
class ArcFace:
    """Additive angular margin (Deng et al., CVPR 2019): cos(a + m) for the target's angle a.

    Where a + m is above pi, it is ``cos a - m sin m``, which goes on falling (as in the authors' code). The
    derivative of the former, ``cos m + cos a sin m / sin a``, has its sin a kept above the square root of the
    dtype's epsilon. Raises ConfigError for values out of range.
    """

    scale: float = 64.0
    margin: float = 0.5
    """In radians."""

    def __post_init__(self) -> None:
        _check("arcface", self.scale, self.margin, math.pi)

    def target(self, cosine: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See ``Margin``."""
        along, across = math.cos(self.margin), math.sin(self.margin)
        sine = (1 - cosine.square()).clamp_min(torch.finfo(cosine.dtype).eps).sqrt()
        inside = cosine > -along
        value = torch.where(inside, cosine * along - sine * across, cosine - self.margin * across)
        return value, torch.where(inside, along + cosine / sine * across, 1.0)


@dataclass(frozen=True)
class CosFace:
    """Additive cosine margin (Wang et al., CVPR 2018): ``cos a - m`` for the target's angle a.

    With a margin of 0 it is the softmax over scaled cosines. Raises ConfigError for values out of range.
    """

    scale: float = 64.0
    margin: float = 0.35

    def __post_init__(self) -> None:
        _check("cosface", self.scale, self.margin, 2.0)

    def target(self, cosine: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See ``Margin``."""
        return cosine - self.margin, torch.ones_like(cosine)


def entering(margin: Margin, logits: Logits) -> Logits:
    """Return the logits of the softmax from a shard's cosines: new ones, which may be overwritten.

    The target's is in one shard only, so that no other one has to know of the margin.
    """
    values = logits.values * margin.scale
    own, index = own_columns(logits, logits.labels)
    cosines = logits.values.gather(1, index[:, None])[:, 0]
    changed = torch.where(own, margin.target(cosines)[0], cosines) * margin.scale
    return logits._replace(values=values.scatter_(1, index[:, None], changed[:, None]), spare=True)


def leaving(margin: Margin, logits: Logits, gradient: torch.Tensor) -> torch.Tensor:
    """Turn the gradient of what ``entering`` gave, in place, into that of the cosines."""
    own, index = own_columns(logits, logits.labels)
    cosines = logits.values.gather(1, index[:, None])[:, 0]
    slope = torch.where(own, margin.target(cosines)[1], 1.0)
    gradient.mul_(margin.scale)
    return gradient.scatter_(1, index[:, None], gradient.gather(1, index[:, None]) * slope[:, None])


def make_margin(config: MarginConfig) -> Margin | None:
    """Return the configured margin, if there is one. Raises ConfigError for values out of range."""
    if config.name == "none":
        return None
    kind = ArcFace if config.name == "arcface" else CosFace
    return kind(config.scale) if config.size is None else kind(config.scale, config.size)


class MarginCriterion(nn.Module):
    """The same in a single process, from torch's own functions: ``criterion`` of the changed cosines."""

    def __init__(self, margin: Margin, criterion: nn.Module) -> None:
        super().__init__()
        self.margin, self.criterion = margin, criterion

    def forward(self, cosines: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the mean loss of cosines (samples, classes)."""
        counted = (labels >= 0) & (labels < cosines.shape[1])
        index = torch.where(counted, labels, 0)[:, None]
        own = cosines.gather(1, index)[:, 0]
        changed = torch.where(counted, self._target(own), own)
        loss: torch.Tensor = self.criterion(
            cosines.scatter(1, index, changed[:, None]) * self.margin.scale, labels
        )
        return loss

    def _target(self, cosine: torch.Tensor) -> torch.Tensor:
        if not isinstance(self.margin, ArcFace):
            return self.margin.target(cosine)[0]
        m = self.margin.margin
        angle = cosine.clamp(-1 + 1e-7, 1 - 1e-7).acos()
        return torch.where(angle + m < math.pi, (angle + m).cos(), cosine - m * math.sin(m))
