"""Any of torchvision's classification models, by its name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torchvision.models
from torch import nn

from hybridpar.errors import ModelError
from hybridpar.names import nearest

_WITH_AUXILIARY_OUTPUTS = ("googlenet", "inception_v3")
"""In training they give several outputs; a chain gives one. Both train without the auxiliary classifiers."""


def names() -> list[str]:
    """List the names that ``classifier`` knows."""
    return list(torchvision.models.list_models(module=torchvision.models))


def classifier(
    *, name: str, classes: int = 1000, in_shape: Sequence[int] = (3, 224, 224), **options: Any
) -> nn.Module:
    """Build torchvision's model ``name`` with random weights.

    ``in_shape`` is (3, height, width) of one image; models that are built for one size are built for it.
    ``options`` go to torchvision's builder. Raises ModelError.
    """
    known = names()
    if name not in known:
        hint = nearest(name, known) or f"; it has {', '.join(known)}"
        raise ModelError(f"model.name: torchvision has no classification model {name}{hint}")
    if len(in_shape) != 3 or in_shape[0] != 3:
        raise ModelError(
            f"{name} takes color images, got in_shape {list(in_shape)}; set model.in_shape=[3,height,width], or "
            "write a builder of your own"
        )
    _, height, width = in_shape
    given: dict[str, Any] = {"num_classes": classes}
    if name in _WITH_AUXILIARY_OUTPUTS:
        given |= {"aux_logits": False, "init_weights": True}
    elif name.startswith("vit_"):
        if height != width:
            raise ModelError(f"{name} takes square images, got in_shape {list(in_shape)}; set model.in_shape")
        given["image_size"] = height
    elif name == "maxvit_t":
        given["input_size"] = (height, width)
    model: nn.Module = torchvision.models.get_model(name, **given | options)
    return model
