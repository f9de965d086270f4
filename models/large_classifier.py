"""A small backbone under a classifier of very many classes, as in face recognition or retrieval."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from hybridpar.errors import ModelError

from .vgg import check_image, convolutions


class LargeClassifier(nn.Module):
    """Convolutions, an embedding, and one linear layer over all classes, in which nearly all parameters lie."""

    def __init__(
        self, features: nn.Sequential, channels: int, embedding: int, classes: int, dropout: float
    ) -> None:
        super().__init__()
        self.features = features
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.embedding = nn.Sequential(nn.Linear(channels, embedding), nn.ReLU(inplace=True), nn.Dropout(dropout))
        self.head = nn.Linear(embedding, classes)
        for part in features:
            if isinstance(part, nn.Conv2d):
                nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images (samples, channels, height, width) to logits (samples, classes)."""
        x = torch.flatten(self.avgpool(self.features(x)), 1)
        logits: torch.Tensor = self.head(self.embedding(x))
        return logits


def large_classifier(
    *,
    classes: int = 1_000_000,
    in_shape: Sequence[int] = (3, 112, 112),
    width: int = 32,
    blocks: int = 4,
    embedding: int = 512,
    dropout: float = 0.0,
) -> nn.Module:
    """Build a backbone of ``blocks`` times two convolutions under a linear head of ``classes`` outputs.

    ``in_shape`` is (channels, height, width) of one image; ``width`` the channels of the first block, which double
    from block to block; ``embedding`` the features that the head sees. Raises ModelError.
    """
    if blocks < 1:
        raise ModelError(f"large_classifier needs at least one block, got blocks={blocks}")
    channels = check_image("large_classifier", in_shape, 2**blocks)
    widths = [width << i for i in range(blocks)]
    features = convolutions(channels, widths, [2] * blocks, batch_norm=False)
    return LargeClassifier(features, widths[-1], embedding, classes, dropout)
