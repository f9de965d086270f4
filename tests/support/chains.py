"""Small chains: by hand, and traced from a module without weights."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

from hybridpar.model.chain import Chain, Layer, Linear, Parameter
from hybridpar.model.trace import Traced, trace


def linear_chain(features: Sequence[int] = (4096, 4096, 1000), dtype: Literal["float", "int"] = "float") -> Chain:
    """Linear layers without bias."""
    layers = tuple(
        Layer(
            name=f"fc{i}",
            kind="Linear",
            in_shape=(a,),
            out_shape=(b,),
            flops_per_sample=2 * a * b,
            parameters=(Parameter(f"fc{i}.weight", (b, a)),),
            saves_input=True,
            linear=Linear(a, b, False),
        )
        for i, (a, b) in enumerate(itertools.pairwise(features))
    )
    return Chain("mlp", layers, input_dtype=dtype)


def traced(
    module: nn.Module, in_shape: tuple[int, ...] = (1, 8, 8), input_dtype: Literal["float", "int"] = "float"
) -> Traced:
    """Trace a module that is called small."""
    return trace(module, in_shape, "small", input_dtype)


def convolutional() -> nn.Module:
    """Return a small network on meta with equal layers, batch norm, dropout and two linear layers."""
    with torch.device("meta"):
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(4, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(inplace=True),
            nn.Conv2d(4, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64, 32),
            nn.Dropout(),
            nn.Linear(32, 10),
        )
