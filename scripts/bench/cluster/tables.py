"""The tables: which settings each has. `core` is what takes at most an hour."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import product

from scripts.bench.cluster.setting import Setting

VGG16 = Setting("vgg16", gbit_per_s=3.3)
MODELS = (
    replace(VGG16, model="alexnet"),
    replace(VGG16, model="vgg16_bn"),
    replace(VGG16, model="resnet50"),
    replace(VGG16, model="large_classifier", classes=100_000),
)
EIGHT = replace(VGG16, images_per_rank=8, cores=0.225)
"""Eight ranks share the cores of four."""
TABLES: dict[str, tuple[Setting, ...]] = {
    "core": tuple(replace(VGG16, gbit_per_s=g) for g in (1.0, 3.3, 10.0)),
    "batches": tuple(
        replace(VGG16, images_per_rank=n, gbit_per_s=g) for n, g in product((8, 16, 32), (0.3, 1.0, 3.3, 10.0))
    ),
    "models": tuple(replace(setting, gbit_per_s=g) for setting, g in product(MODELS, (1.0, 3.3, 10.0))),
    "ranks": (replace(EIGHT, hosts=2, ranks_per_host=4), replace(EIGHT, hosts=4, ranks_per_host=2)),
    "memory": (replace(VGG16, memory_mb=1500),),
    "small": (Setting("small_vgg", images_per_rank=4, gbit_per_s=1.0, image=32, classes=10, hosts=2),),
}


def tuned_at(setting: Setting, settings: Sequence[Setting]) -> Setting:
    """Return the setting of a table at which the options of ``setting`` are tuned.

    Among those that differ in nothing but the links between hosts it is the one in the middle: so each contestant
    is tuned once for all of them, for longer.
    """
    alike = [s for s in settings if replace(s, gbit_per_s=None) == replace(setting, gbit_per_s=None)]
    ordered = sorted({*alike, setting}, key=lambda s: math.inf if s.gbit_per_s is None else s.gbit_per_s)
    return ordered[len(ordered) // 2]
