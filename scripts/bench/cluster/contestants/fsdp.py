"""torch's second FullyShardedDataParallel: parameters, gradients and optimizer state are divided among ranks."""

from __future__ import annotations

from typing import cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from scripts.bench.cluster.contestants.contestant import Contestant, Options, product
from scripts.bench.cluster.contestants.ddp import own
from scripts.bench.cluster.setting import Setting
from scripts.bench.work import Work


class FullySharded(Contestant):
    """``fully_shard`` of runs of layers.

    Args:
        work: what is trained.
        unit_mb: MiB of neighbouring layers' parameters from which on they are gathered together.
        reshard: whether a forward gives its gathered parameters back, so that its backward gathers them again.
        update: how the optimizer goes through the parameters.

    """

    def __init__(self, work: Work, unit_mb: int = 8, *, reshard: bool = False, update: str = "fused") -> None:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        self._model = nn.Sequential(*(work.part(*bounds) for bounds in _units(work, unit_mb * 2**20)))
        for unit in self._model:
            fully_shard(unit, mesh=mesh, reshard_after_forward=reshard)
        fully_shard(self._model, mesh=mesh, reshard_after_forward=reshard)
        # The optimizer sees a rank's shards as plain tensors: a fused one knows no others, and all are faster so.
        self._shards = [(p, nn.Parameter(_local(p).detach())) for p in self._model.parameters()]
        self._optimizer = work.sgd([shard for _, shard in self._shards], update)

    @classmethod
    def grid(cls, setting: Setting) -> list[Options]:
        """Return sizes of units, and whether parameters are given back between forward and backward."""
        del setting
        return product(reshard=[False, True], unit_mb=[8, 32, 1], update=["fused", "foreach"])

    @classmethod
    def norm_samples(cls, setting: Setting, options: Options) -> int | None:
        """Return a rank's samples."""
        del options
        return setting.images_per_rank

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> float:
        """Train."""
        self._model.zero_grad()
        loss = F.cross_entropy(self._model(own(images)), own(labels), reduction="sum") / len(labels)
        (loss * dist.get_world_size()).backward()  # type: ignore[no-untyped-call] # it takes the mean
        for parameter, shard in self._shards:
            shard.grad = None if parameter.grad is None else _local(parameter.grad)
        self._optimizer.step()
        return loss.item()


def _local(sharded: torch.Tensor) -> torch.Tensor:
    """Return this rank's own part."""
    return cast("DTensor", sharded).to_local()


def _units(work: Work, least_bytes: int) -> list[tuple[int, int]]:
    """Return runs of layers of which each but the last has so many bytes of parameters."""
    bounds, start, held_bytes = [], 0, 0
    for index, layer in enumerate(work.traced.modules):
        held_bytes += sum(p.numel() * p.itemsize for p in layer.parameters())
        if held_bytes >= least_bytes or index + 1 == len(work.traced.modules):
            bounds.append((start, index + 1))
            start, held_bytes = index + 1, 0
    return bounds
