"""Plan and run hybrid-parallel training of PyTorch models.

The package itself imports nothing heavy; the Python API below is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_API = {
    "plan": "hybridpar.api",
    "Job": "hybridpar.api",
    "ArcFace": "hybridpar.runtime.margin",
    "Callback": "hybridpar.runtime.callback",
    "CosFace": "hybridpar.runtime.margin",
    "CosineLinear": "hybridpar.model.linear",
    "CrossEntropy": "hybridpar.api",
    "Compiling": "hybridpar.train_section",
    "LossScale": "hybridpar.train_section",
    "OwnLoss": "hybridpar.api",
    "OwnMetric": "hybridpar.api",
    "ParameterGroup": "hybridpar.optimizer_section",
    "Stream": "hybridpar.data.stream",
    "recording": "hybridpar.api",
    "wrap": "hybridpar.api",
}

__all__ = [
    "ArcFace",
    "Callback",
    "Compiling",
    "CosFace",
    "CosineLinear",
    "CrossEntropy",
    "Job",
    "LossScale",
    "OwnLoss",
    "OwnMetric",
    "ParameterGroup",
    "Stream",
    "__version__",
    "plan",
    "recording",
    "wrap",
]


def __getattr__(name: str) -> Any:
    if name in _API:
        return getattr(importlib.import_module(_API[name]), name)
    raise AttributeError(f"module 'hybridpar' has no attribute {name!r}")
