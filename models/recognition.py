"""A ResNet that embeds images, under cosines to a vector per class: face, product or place recognition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

from hybridpar.errors import ModelError
from hybridpar.model.linear import CosineLinear

from .resnet import resnet


class Recognition(nn.Module):
    """A backbone that ends in a normalised embedding, and the head, in which nearly all parameters lie."""

    def __init__(self, backbone: nn.Module, embedding: int, classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = CosineLinear(embedding, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images (samples, channels, height, width) to cosines (samples, classes)."""
        cosines: torch.Tensor = self.head(self.backbone(x))
        return cosines


def recognition(
    *,
    classes: int = 1_000_000,
    in_shape: Sequence[int] = (3, 112, 112),
    depth: int = 50,
    stem: Literal["large", "small"] = "large",
    embedding: int = 512,
    dropout: float = 0.0,
) -> nn.Module:
    """Build a ResNet of ``depth`` with a linear layer to ``embedding`` features, batch norm, and a cosine head.

    For the losses ``loss.margin.name=arcface`` and ``cosface``. ``in_shape`` is (channels, height, width) of one
    image, ``stem`` that of ``resnet``; ``dropout`` comes before the embedding. Raises ModelError.
    """
    if embedding < 1:
        raise ModelError(f"recognition needs an embedding of one feature or more, got embedding={embedding}")
    backbone = resnet(depth=depth, classes=embedding, in_shape=in_shape, stem=stem)
    features = backbone.fc
    assert isinstance(features, nn.Linear)
    norm = nn.BatchNorm1d(embedding)
    backbone.fc = nn.Sequential(nn.Dropout(dropout), features, norm) if dropout else nn.Sequential(features, norm)
    return Recognition(backbone, embedding, classes)
