"""Layers that ``torch.compile`` compiles: runs of them in which nothing takes keys or gathers gradients."""

from __future__ import annotations

import importlib.util
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn

from hybridpar.errors import ConfigError, PlanError
from hybridpar.model.chain import Chain
from hybridpar.planning.plan import Plan
from hybridpar.runtime.modules import BlockModules, Run
from hybridpar.train_section import Compiling

_COMPILER = "g++"


def check(compiling: Compiling, device_type: str) -> None:
    """Raise ConfigError for a backend that there is not, or that lacks what it needs on a kind of device."""
    known = sorted(torch.compiler.list_backends(exclude_tags=()))
    if compiling.backend not in known:
        raise ConfigError(
            f"train.compile_backend: torch has no {compiling.backend!r}; choose among {', '.join(known)}"
        )
    if compiling.backend != "inductor":
        return
    compiler = os.environ.get("CXX", _COMPILER)
    if device_type == "cpu" and shutil.which(compiler) is None:
        raise ConfigError(
            f"train.compile: inductor needs a C++ compiler on a CPU, but there is no {compiler}; install one (as "
            "apt-get install g++), name yours in the environment variable CXX, or set train.compile=false"
        )
    if device_type == "cuda" and importlib.util.find_spec("triton") is None:
        raise ConfigError(
            "train.compile: inductor needs triton on a GPU, which is not installed; pip install triton, or set "
            "train.compile=false"
        )


def check_stages(compiling: Compiling, plan: Plan) -> None:
    """Raise PlanError where a stage is to be compiled that the plan does not have."""
    missing = [kind for kind in compiling.stages or () if plan.stage(kind) is None]
    if missing:
        there = ", ".join(s.kind for s in plan.stages)
        raise PlanError(
            f"train.compile: the plan has no {' and no '.join(missing)}, only {there}; leave it out, or set "
            "train.compile=true"
        )


def check_for(compiling: Compiling, plan: Plan, device_type: str) -> None:
    """Raise ConfigError or PlanError for layers that cannot be compiled under a plan on a kind of device."""
    check_stages(compiling, plan)
    check(compiling, device_type)


def compile_blocks(blocks: Iterable[BlockModules], chain: Chain, backend: str) -> None:
    """Have the runs of layers of some blocks compiled, each when it runs first, and again for other sizes."""
    # Of torch's own looking at what enters a run behind a linear layer.
    warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf Tensor")
    for modules in blocks:
        (first, last), made = modules.block.layers, list[Run]()
        at = first
        for start, stop in chain.compiled(first, last):
            layers = list(modules.layers[start - first : stop - first])
            made += [*modules.layers[at - first : start - first], _compiled(layers, backend, f"{start}_{stop}")]
            at = stop
        modules.use([*made, *modules.layers[at - first :]])


def _compiled(layers: Sequence[nn.Module], backend: str, name: str) -> Run:
    def run(x: torch.Tensor) -> torch.Tensor:
        for layer in layers:
            x = layer(x)
        return x

    # torch counts how often a code object is compiled anew, and gives up after 8 times: every run needs its own.
    run.__code__ = run.__code__.replace(co_name=f"run_{name}")
    made: Callable[[torch.Tensor], torch.Tensor] = torch.compile(run, backend=backend)
    return made
