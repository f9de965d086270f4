"""Our options: what each changes of the default training, which it then runs beside."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from hybridpar.model.chain import Autocast, MemoryFormat
from hybridpar.planning.compression import Compression
from hybridpar.planning.plan import Plan, Recipe, validate
from hybridpar.runtime.update import OptimizerFactory
from hybridpar.train_section import Compiling, LossScale
from scripts.bench.runtime.models import RATE, work_of
from scripts.bench.runtime.rivals import AGREEMENT, Ours, Rival

LOWERED = 2.0**-5
"""Agreement of a lowered dtype: its roundings, of which batch norm makes more where samples are few."""
REORDERED = 1e-3
"""Agreement of compiled layers, which sum in another order; 5e-4 was seen with batch norms over two samples."""
LOSSY = 0.5
"""Agreement of gradients of low rank, which go another way from the first step on."""
SGD: Callable[..., torch.optim.Optimizer] = partial(torch.optim.SGD, lr=RATE, momentum=0.9)


@dataclass(frozen=True)
class Option:
    """What is other than by default."""

    autocast: Autocast | None = None
    memory_format: MemoryFormat | None = None
    recompute: bool = False
    """In all stages."""
    optimizer: OptimizerFactory | None = None
    """None: the default's."""
    scaling: LossScale | None = None
    compression: Compression | None = None
    compiling: Compiling | None = None
    agreement: float = AGREEMENT
    """By what share the losses of the first steps may differ from the default's."""


OPTIONS = {
    "channels_last": Option(memory_format="channels_last"),
    "bfloat16": Option(autocast="bfloat16", agreement=LOWERED),
    "bfloat16, channels_last": Option("bfloat16", "channels_last", agreement=LOWERED),
    "float16, loss scaled": Option(autocast="float16", scaling=LossScale(1024.0), agreement=LOWERED),
    "recomputation": Option(recompute=True),
    "foreach optimizer": Option(optimizer=partial(SGD, foreach=True)),
    "optimizer that loops": Option(optimizer=partial(SGD, foreach=False)),
    "compiled": Option(compiling=Compiling(), agreement=REORDERED),
    "bfloat16 gradients": Option(compression=Compression("bfloat16"), agreement=LOWERED),
    "PowerSGD": Option(compression=Compression("power_sgd", warmup_steps=0), agreement=LOSSY),
}
"""By name. The default's optimizer is a fused one."""
OF_REPLICAS = ("bfloat16 gradients", "PowerSGD")
"""Those that change nothing on one rank."""


def variants(model: str, plan: Plan, chosen: Sequence[str]) -> list[Rival]:
    """Return our training under ``plan``, with each of the chosen options by itself."""
    return [_variant(model, plan, name, OPTIONS[name]) for name in chosen]


def _variant(model: str, plan: Plan, name: str, option: Option) -> Rival:
    settings: dict[str, Any] = {"autocast": option.autocast, "memory_format": option.memory_format}
    work = work_of(model, plan.global_batch, **settings)
    stages = tuple(replace(stage, recompute=option.recompute) for stage in plan.stages)
    recipe = Recipe(scaling=option.scaling is not None, compression=option.compression)
    own = replace(plan, chain=work.traced.chain.fingerprint, stages=stages, recipe=recipe)
    validate(own, work.traced.chain)
    settings |= {"optimizer": option.optimizer or work.sgd}
    settings |= {"scaling": option.scaling, "compiling": option.compiling}
    return Rival(name, Ours(work, own, **settings), option.agreement)
