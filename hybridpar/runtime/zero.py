"""Sharded optimizer state of a replicated position, by DeepSpeed's ZeRO.

DeepSpeed is imported only when a job asks for it. It keeps each sharer's part of the parameters in float32 and of
the optimizer's state, on the device or on its host, updates them and gathers the parameters. What it would do
besides, to reduce gradients to parts, is operations of the program; forward and backward stay with the executor.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from hybridpar.errors import ConfigError
from hybridpar.optimizer_section import ParameterGroup
from hybridpar.planning.blocks import Position
from hybridpar.planning.plan import Recipe
from hybridpar.runtime.elementwise import check_elementwise
from hybridpar.runtime.fragment import Fragment, cut, join
from hybridpar.runtime.groups import grouped
from hybridpar.runtime.modules import BlockModules
from hybridpar.runtime.process import Process
from hybridpar.runtime.update import EngineFactory, OptimizerFactory

_STAGES = {"zero1": 1, "zero2": 2}


def require_deepspeed() -> None:
    """Raise ConfigError where DeepSpeed is not installed."""
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            "optimizer.sharding=zero1 and zero2 need DeepSpeed, which is not installed; "
            "pip install 'hybridpar[zero]', or set optimizer.sharding=none"
        )


def make_engines(process: Process, optimizer: OptimizerFactory, recipe: Recipe) -> EngineFactory | None:
    """Return what makes the sharded optimizer of a position; all sharers of the position call it together.

    None where the recipe shards nothing. ``process`` is connected. Raises ConfigError where DeepSpeed is not
    installed, for an optimizer that does not update every element by itself, and for state that is to be offloaded
    from a CPU; what it returns does for an optimizer that would lose its groups.
    """
    if recipe.sharding == "none":
        return None
    require_deepspeed()
    check_elementwise(optimizer)
    if recipe.offload:
        check_offload(process.device.type)
    os.environ.setdefault("LOCAL_RANK", str(process.place.local_rank))
    os.environ.setdefault("DS_ACCELERATOR", process.device.type)
    import_deepspeed()  # before the job begins to measure its memory

    def make(position: Position, blocks: Sequence[BlockModules], groups: Sequence[ParameterGroup]) -> ZeroEngine:
        check_grouped(optimizer, groups)
        module, group = nn.ModuleList(blocks), process.groups[position.gradients(process.rank)]
        named = [(o.name, o.tensor) for b in blocks for o in b.owned if o.tensor.requires_grad]
        return ZeroEngine(module, optimizer(grouped(named, groups)), group, settings(recipe))

    return make


def check_offload(device: str) -> None:
    """Raise ConfigError for a device whose memory is the host's."""
    if device == "cpu":
        raise ConfigError(
            "optimizer.offload=true: moves optimizer state from a GPU's memory to its host's, but the ranks are "
            "on CPUs, where both are one; set optimizer.offload=false"
        )


def keeps_groups(optimizer: OptimizerFactory, groups: Sequence[ParameterGroup]) -> bool:
    """Whether DeepSpeed leaves an optimizer its groups: Adagrad it makes anew, with one set of options."""
    return not (groups and isinstance(optimizer([nn.Parameter(torch.zeros(1, 1))]), torch.optim.Adagrad))


def check_grouped(optimizer: OptimizerFactory, groups: Sequence[ParameterGroup]) -> None:
    """Raise ConfigError for an optimizer that would lose its groups."""
    if not keeps_groups(optimizer, groups):
        raise ConfigError(
            f"optimizer.groups: {', '.join(g.match for g in groups)}, but DeepSpeed makes Adagrad anew with one "
            "set of options for all parameters; drop the groups, or set optimizer.sharding=none"
        )


def settings(recipe: Recipe) -> dict[str, Any]:
    """Return DeepSpeed's configuration for a recipe.

    Its clipping is off, as the program has the norm of all stages; so is its check of the norm, which would be a
    communication of its own, where DeepSpeed lets it be off. Offloaded state is updated by torch's own optimizer:
    DeepSpeed's would have to be compiled first.
    """
    zero: dict[str, Any] = {
        "stage": _STAGES[recipe.sharding],
        "overlap_comm": False,
        "contiguous_gradients": False,
        "compute_grad_norm": recipe.offload,
    }
    if recipe.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,  # DeepSpeed's default would clip to 1
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
        "steps_per_print": None,
    }


class ZeroEngine:
    """A ZeRO optimizer over the process group of those who hold a position's parameters.

    ``optimizer`` is of the trained parameters of ``module``. The caller fills ``parts`` before it calls ``step``.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        group: dist.ProcessGroup,
        config: Mapping[str, Any],
    ) -> None:
        parameters = [list(g["params"]) for g in optimizer.param_groups]
        self._places = {
            parameter: (number, begin)
            for number, own in enumerate(parameters)
            for parameter, begin in zip(own, accumulate((p.numel() for p in own), initial=0), strict=False)
        }
        self._sharded = _make_sharded(module, optimizer, group, config)
        self.optimizer: torch.optim.Optimizer = self._sharded.optimizer
        self.sharers, self.index = dist.get_world_size(group), dist.get_rank(group)
        device = parameters[0][0].device
        self.parts: Sequence[torch.Tensor] = [
            torch.zeros(int(size), device=device) for size in self._sharded.partition_size
        ]

    def place(self, parameter: nn.Parameter) -> tuple[int, int]:
        """Return the group of a parameter, and where it begins in the group's vector."""
        return self._places[parameter]

    def step(self) -> None:
        """Update this rank's parts from those of the gradients, and gather the parameters; collective."""
        for number, part in enumerate(self.parts):
            if self._sharded.cpu_offload:
                self._sharded.single_partition_of_fp32_groups[number].grad.copy_(part)
            else:
                self._sharded.averaged_gradients[number] = [part]
        self._sharded.step()

    def fragments(self) -> dict[nn.Parameter, Fragment]:
        """Return this rank's share of the optimizer state, as views of it, by parameter.

        Raises CheckpointError for state that is neither a number per element nor a single one.
        """
        result = {}
        for parameter in self._places:
            mapping = _mapping(parameter)
            if mapping is None:
                continue
            start, at = mapping.lp_fragment_address.start, mapping.hp_fragment_address.start
            flat = self._sharded.single_partition_of_fp32_groups[mapping.param_group_index]
            place = Fragment(start, mapping.lp_fragment_address.numel, at)
            result[parameter] = cut(place, self.optimizer.state.get(flat, {}), flat.shape)
        return result

    def load(self, fragments: Mapping[nn.Parameter, Fragment]) -> None:
        """Take over the state of all that ``fragments`` returns, and the parameters' values as they now are.

        Raises CheckpointError where the fragments could not have been one state.
        """
        self._sharded.refresh_fp32_params()
        data = self.optimizer.state_dict()
        for group, flat in enumerate(self._sharded.single_partition_of_fp32_groups):
            own = [f for p, f in fragments.items() if _mapping(p).param_group_index == group]
            data["state"][group] = join(own, flat)
        self.optimizer.load_state_dict(data)


class _Replicas:
    """DeepSpeed's model-parallel unit ("mpu"): the replicas of one position are the data-parallel group."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._group

    def get_data_parallel_group_ranks(self) -> list[int]:
        return dist.get_process_group_ranks(self._group)

    def get_data_parallel_rank(self) -> int:
        return dist.get_rank(self._group)

    def get_data_parallel_world_size(self) -> int:
        return dist.get_world_size(self._group)

    def get_model_parallel_group(self) -> None:
        return None

    def get_model_parallel_rank(self) -> int:
        return 0

    def get_model_parallel_world_size(self) -> int:
        return 1


def _mapping(parameter: Any) -> Any:
    """Return where DeepSpeed has put a parameter's float32 copy and state; None: on other replicas alone."""
    return parameter._hp_mapping  # noqa: SLF001 - what its own public functions read


def import_deepspeed() -> Any:
    """Return DeepSpeed, quiet and without what it would compile. Raises ImportError where it is missing."""
    import deepspeed  # noqa: PLC0415 - seconds, and an optional dependency
    from deepspeed.utils import logger  # noqa: PLC0415

    logger.setLevel(logging.WARNING)
    # Without it DeepSpeed compiles a shared-memory library for 20 s where there is no GPU.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _make_sharded(
    module: nn.Module, optimizer: torch.optim.Optimizer, group: dist.ProcessGroup, config: Mapping[str, Any]
) -> Any:
    """Return DeepSpeed's optimizer, which then leaves backwards alone."""
    engine, *_ = import_deepspeed().initialize(
        model=module, optimizer=optimizer, config=dict(config), mpu=_Replicas(group), dist_init_required=False
    )
    for hook in engine.optimizer._grad_acc_hooks:  # noqa: SLF001 - they would reduce gradients by themselves
        hook.remove()
    return engine.optimizer
