"""VGG (Simonyan, Zisserman, ICLR 2015), full-size and small."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

from hybridpar.errors import ModelError

_PLANS: dict[int, tuple[int, ...]] = {
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}
"""Convolutions before each of the max pools, by depth."""
_WIDTHS = (64, 128, 256, 512, 512)


class VGG(nn.Module):
    """Convolutions, a pool to a fixed size, and a classifier of three linear layers.

    Attribute names and initial values are those of torchvision's VGG, so that its state dicts fit.
    """

    def __init__(self, features: nn.Sequential, pool: int, classifier: nn.Sequential) -> None:
        super().__init__()
        self.features = features
        self.avgpool = nn.AdaptiveAvgPool2d((pool, pool))
        self.classifier = classifier
        for part in self.modules():
            if isinstance(part, nn.Conv2d):
                nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
                if part.bias is not None:
                    nn.init.zeros_(part.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images (samples, channels, height, width) to logits (samples, classes)."""
        x = self.avgpool(self.features(x))
        logits: torch.Tensor = self.classifier(torch.flatten(x, 1))
        return logits


def vgg(
    *,
    depth: int = 16,
    batch_norm: bool = False,
    classes: int = 1000,
    in_shape: Sequence[int] = (3, 224, 224),
    classifier_width: int = 4096,
    dropout: float = 0.5,
    pool: int = 7,
) -> nn.Module:
    """Build VGG-11, 13, 16 or 19.

    ``in_shape`` is (channels, height, width) of one image, 32 pixels or more on a side. ``pool`` is the side of
    the feature map that the classifier sees: torchvision's 7 keeps all parameters at any image size, 1 suits
    32x32 images with a small ``classifier_width``. Raises ModelError.
    """
    if depth not in _PLANS:
        raise ModelError(f"there is no VGG of depth {depth}; choose one of {', '.join(map(str, _PLANS))}")
    channels = check_image(f"vgg{depth}", in_shape, 32)
    features = convolutions(channels, _WIDTHS, _PLANS[depth], batch_norm)
    sizes = (_WIDTHS[-1] * pool * pool, classifier_width, classifier_width, classes)
    model = VGG(features, pool, classifier(sizes, dropout))
    for part in model.classifier:
        if isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, 0.0, 0.01)
            nn.init.zeros_(part.bias)
    return model


def small_vgg(
    *,
    classes: int = 10,
    in_shape: Sequence[int] = (1, 16, 16),
    width: int = 16,
    batch_norm: bool = False,
    classifier_width: int = 128,
    dropout: float = 0.25,
    pool: int = 2,
) -> nn.Module:
    """Build a VGG of six narrow convolutions for small images, with the same kind of classifier as the large ones.

    ``in_shape`` is (channels, height, width) of one image, 8 pixels or more on a side; ``width`` the channels of
    the first two convolutions, which double after each of three max pools. Raises ModelError.
    """
    channels = check_image("small_vgg", in_shape, 8)
    widths = (width, 2 * width, 4 * width)
    features = convolutions(channels, widths, (2, 2, 2), batch_norm)
    sizes = (widths[-1] * pool * pool, classifier_width, classifier_width, classes)
    model = VGG(features, pool, classifier(sizes, dropout))
    for part in model.classifier:
        if isinstance(part, nn.Linear):
            nn.init.kaiming_normal_(part.weight, nonlinearity="relu")
            nn.init.zeros_(part.bias)
    return model


def convolutions(channels: int, widths: Sequence[int], counts: Sequence[int], batch_norm: bool) -> nn.Sequential:
    """Stack 3x3 convolutions, ``counts[i]`` of ``widths[i]`` channels before the i-th max pool."""
    layers: list[nn.Module] = []
    for width, count in zip(widths, counts, strict=True):
        for _ in range(count):
            layers.append(nn.Conv2d(channels, width, kernel_size=3, padding=1))
            if batch_norm:
                layers.append(nn.BatchNorm2d(width))
            layers.append(nn.ReLU(inplace=True))
            channels = width
        layers.append(nn.MaxPool2d(kernel_size=2, stride=2))
    return nn.Sequential(*layers)


def classifier(
    sizes: tuple[int, int, int, int], dropout: float, order: Literal["after", "before"] = "after"
) -> nn.Sequential:
    """Stack three linear layers of the given sizes, with dropout after (VGG) or before (AlexNet) the first two."""
    first, second, third = (nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
    parts: list[nn.Module] = []
    for linear in (first, second):
        block: list[nn.Module] = [linear, nn.ReLU(inplace=True)]
        drop = nn.Dropout(dropout)
        parts += [*block, drop] if order == "after" else [drop, *block]
    return nn.Sequential(*parts, third)


def check_image(model: str, in_shape: Sequence[int], least: int) -> int:
    """Give the channels of ``in_shape``; raises ModelError where a side has fewer than ``least`` pixels."""
    if len(in_shape) != 3 or min(in_shape) < 1 or min(in_shape[1:]) < least:
        raise ModelError(
            f"{model} takes images of (channels, height, width) with at least {least} pixels on a side, "
            f"got in_shape {tuple(in_shape)}; set model.in_shape"
        )
    return in_shape[0]
