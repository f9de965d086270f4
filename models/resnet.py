"""ResNet (He et al., CVPR 2016), as torchvision builds it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torchvision.models
from torch import nn

from hybridpar.errors import ModelError

from .vgg import check_image

_BUILDERS = {
    18: torchvision.models.resnet18,
    34: torchvision.models.resnet34,
    50: torchvision.models.resnet50,
    101: torchvision.models.resnet101,
    152: torchvision.models.resnet152,
}


def resnet(
    *,
    depth: int = 50,
    classes: int = 1000,
    in_shape: Sequence[int] = (3, 224, 224),
    stem: Literal["large", "small"] = "large",
) -> nn.Module:
    """Build ResNet-18, 34, 50, 101 or 152.

    ``in_shape`` is (channels, height, width) of one image. The ``large`` stem is torchvision's, which divides the
    side by 4; the ``small`` one, for images of about 32 pixels, is one 3x3 convolution that keeps it. Raises
    ModelError.
    """
    if depth not in _BUILDERS:
        raise ModelError(f"there is no ResNet of depth {depth}; choose one of {', '.join(map(str, _BUILDERS))}")
    if stem not in {"large", "small"}:
        raise ModelError(f"stem {stem!r} is neither large nor small")
    channels = check_image(f"resnet{depth}", in_shape, 32 if stem == "large" else 8)
    model: nn.Module = _BUILDERS[depth](num_classes=classes)
    if stem == "small":
        model.conv1 = nn.Conv2d(channels, 64, kernel_size=3, padding=1, bias=False)
        model.maxpool = nn.Identity()
    elif channels != 3:
        model.conv1 = nn.Conv2d(channels, 64, kernel_size=7, stride=2, padding=3, bias=False)
    if isinstance(model.conv1, nn.Conv2d):
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    return model
