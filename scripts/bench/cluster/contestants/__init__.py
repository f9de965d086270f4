"""The contestants by name. A family is imported only by who needs it: some libraries take seconds."""

from __future__ import annotations

import importlib
from typing import cast

from scripts.bench.cluster.contestants.contestant import Contestant

CONTESTANTS = {
    "hybridpar": "ours.Hybridpar",
    "ddp": "ddp.DataParallel",
    "ddp_bf16": "ddp.RoundedDataParallel",
    "fsdp2": "fsdp.FullySharded",
    "deepspeed_zero1": "deep_speed.ZeroOne",
    "deepspeed_zero2": "deep_speed.ZeroTwo",
    "deepspeed_pipeline": "deep_speed.Pipeline",
    "torch_gpipe": "torch_pipeline.GPipe",
    "torch_1f1b": "torch_pipeline.OneForwardOneBackward",
    "torch_interleaved": "torch_pipeline.Interleaved",
    "ddp_tensor_head": "tensor_head.TensorHead",
    "floor": "floor.Floor",
}
"""Where each of them is: module and class."""


def find(name: str) -> type[Contestant]:
    """Return a contestant's class; raises KeyError for an unknown name, ImportError where a library is missing."""
    module, kind = CONTESTANTS[name].split(".")
    return cast("type[Contestant]", getattr(importlib.import_module(f"{__name__}.{module}"), kind))
