"""Sharded optimizer state of a replicated position, by DeepSpeed's ZeRO stage 1.

DeepSpeed is imported only when a job asks for it. It does the reduction of the gradients, the update of each
replica's shard, and the gathering of the parameters; forward and backward stay with the executor.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch import nn

from hybridpar.errors import ConfigError
from hybridpar.planning.blocks import Position
from hybridpar.runtime.fragment import Fragment, cut, join
from hybridpar.runtime.job import EngineFactory
from hybridpar.runtime.modules import BlockModules
from hybridpar.runtime.process import Process
from hybridpar.runtime.update import OptimizerFactory

_SETTINGS = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 1,
    "gradient_clipping": 0.0,  # DeepSpeed's default would clip to 1
    "zero_allow_untested_optimizer": True,
    "zero_optimization": {"stage": 1, "overlap_comm": False},
    "steps_per_print": None,
}


def require_deepspeed() -> None:
    """Raise ConfigError where DeepSpeed is not installed."""
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            "optimizer.sharding=zero1 needs DeepSpeed, which is not installed; "
            "pip install 'hybridpar[zero]', or set optimizer.sharding=none"
        )


def make_engines(process: Process, optimizer: OptimizerFactory) -> EngineFactory:
    """Return what makes the sharded optimizer of a position; all replicas of the position call it together.

    ``process`` is connected. Raises ConfigError where DeepSpeed is not installed.
    """
    require_deepspeed()
    os.environ.setdefault("LOCAL_RANK", str(process.place.local_rank))
    os.environ.setdefault("DS_ACCELERATOR", process.device.type)
    _import_deepspeed()  # before the job begins to measure its memory

    def make(position: Position, blocks: Sequence[BlockModules]) -> ZeroEngine:
        return ZeroEngine(nn.ModuleList(blocks), optimizer, process.groups[position.gradients(process.rank)])

    return make


class ZeroEngine:
    """A ZeRO-1 optimizer over the process group of a position's replicas.

    Between ``zero`` and ``step`` any number of backwards may run on ``module``; the gradients are then summed over
    the replicas, as those of the torch path are.
    """

    def __init__(self, module: nn.Module, optimizer: OptimizerFactory, group: dist.ProcessGroup) -> None:
        self._parameters = [p for p in module.parameters() if p.requires_grad]
        self._replicas = dist.get_world_size(group)
        self._step = contextlib.ExitStack()
        self._engine = _make_engine(module, optimizer(self._parameters), group) if self._parameters else None

    def zero(self) -> None:
        """Forget all gradients and begin to accumulate new ones."""
        self._step.pop_all()
        if self._engine is not None:
            self._engine.optimizer.zero_grad()
            self._step.enter_context(self._engine.coalesce_grad_reduction())

    def step(self) -> None:
        """Reduce the gradients, update this replica's shard and gather the parameters; collective."""
        if self._engine is None:
            return
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = parameter.new_zeros(parameter.shape)
            parameter.grad.mul_(self._replicas)  # DeepSpeed takes the mean over the replicas
        self._step.close()
        self._engine.step()

    def set_rate(self, rate: float) -> None:
        """Set the learning rate."""
        if self._engine is not None:
            for group in self._engine.optimizer.param_groups:
                group["lr"] = rate

    def fragments(self) -> dict[nn.Parameter, Fragment]:
        """Return this replica's share of the optimizer state, as views of it, by parameter.

        Raises CheckpointError for state that is neither a number per element nor a single one.
        """
        if self._engine is None:
            return {}
        sharded, result = self._engine.optimizer, {}
        for parameter in self._parameters:
            mapping = _mapping(parameter)
            if mapping is None:
                continue
            start, at = mapping.lp_fragment_address.start, mapping.hp_fragment_address.start
            flat = sharded.single_partition_of_fp32_groups[mapping.param_group_index]
            place = Fragment(start, mapping.lp_fragment_address.numel, at)
            result[parameter] = cut(place, sharded.optimizer.state.get(flat, {}), flat.shape)
        return result

    def load(self, fragments: Mapping[nn.Parameter, Fragment]) -> None:
        """Take over the state of all that ``fragments`` returns, and the parameters' values as they now are.

        Raises CheckpointError where the fragments could not have been one state.
        """
        if self._engine is None:
            return
        sharded = self._engine.optimizer
        sharded.refresh_fp32_params()
        data = sharded.optimizer.state_dict()
        for group, flat in enumerate(sharded.single_partition_of_fp32_groups):
            own = [f for p, f in fragments.items() if _mapping(p).param_group_index == group]
            data["state"][group] = join(own, flat)
        sharded.optimizer.load_state_dict(data)


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


def _import_deepspeed() -> Any:
    import deepspeed  # noqa: PLC0415 - seconds, and an optional dependency
    from deepspeed.utils import logger  # noqa: PLC0415

    logger.setLevel(logging.WARNING)
    # Without it DeepSpeed compiles a shared-memory library for 20 s where there is no GPU.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _make_engine(module: nn.Module, optimizer: Any, group: dist.ProcessGroup) -> Any:
    engine, *_ = _import_deepspeed().initialize(
        model=module, optimizer=optimizer, config=dict(_SETTINGS), mpu=_Replicas(group), dist_init_required=False
    )
    return engine
