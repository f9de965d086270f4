"""AlexNet in its one-column form (Krizhevsky, "One weird trick", 2014)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from .vgg import check_image, classifier


class AlexNet(nn.Module):
    """Five convolutions, a pool to 6x6, and three linear layers; attribute names are those of torchvision."""

    def __init__(self, channels: int, classes: int, classifier_width: int, dropout: float) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(channels, 64, kernel_size=11, stride=4, padding=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(kernel_size=3, stride=2),
            nn.Conv2d(64, 192, kernel_size=5, padding=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(kernel_size=3, stride=2),
            nn.Conv2d(192, 384, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(384, 256, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(256, 256, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(kernel_size=3, stride=2),
        )
        self.avgpool = nn.AdaptiveAvgPool2d((6, 6))
        sizes = (256 * 6 * 6, classifier_width, classifier_width, classes)
        self.classifier = classifier(sizes, dropout, order="before")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images (samples, channels, height, width) to logits (samples, classes)."""
        x = self.avgpool(self.features(x))
        logits: torch.Tensor = self.classifier(torch.flatten(x, 1))
        return logits


def alexnet(
    *,
    classes: int = 1000,
    in_shape: Sequence[int] = (3, 224, 224),
    classifier_width: int = 4096,
    dropout: float = 0.5,
) -> nn.Module:
    """Build AlexNet.

    ``in_shape`` is (channels, height, width) of one image, 63 pixels or more on a side. Raises ModelError.
    """
    channels = check_image("alexnet", in_shape, 63)
    return AlexNet(channels, classes, classifier_width, dropout)
