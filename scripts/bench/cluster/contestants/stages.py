"""What pipelines have in common: their cuts, their options, and layers whose channels lie last only inside."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn

from scripts.bench.balance import balanced, counted, measured
from scripts.bench.cluster.contestants.contestant import Options, product
from scripts.bench.cluster.setting import Setting
from scripts.bench.work import Work

Balance = Literal["measured", "counted"]
"""What is equal in all stages: seconds, timed on rank 0 when the contestant is made, or operations."""


def cuts(work: Work, stages: int, micro_batch: int, micro_batches: int, balance: Balance) -> list[tuple[int, int]]:
    """Return the layers of every stage, the same on all ranks; collective."""
    made: list[Any] = [None]
    if dist.get_rank() == 0:
        costs = counted(work) if balance == "counted" else measured(work, micro_batch, micro_batches)
        made = [balanced(costs, stages)]
    dist.broadcast_object_list(made)
    bounds: list[tuple[int, int]] = made[0]
    return bounds


def pipeline_grid(setting: Setting, **more: list[Any]) -> list[Options]:
    """Return micro-batches, replicas of the pipeline, balances of the cuts, ways to update, and ``more``."""
    images = setting.images_per_rank
    return product(
        micro_batch=[images // 2, images, images // 4] if images % 4 == 0 else [images],
        replicas=[1, 2] if setting.world % 2 == 0 and setting.world > 2 else [1],
        **more,
        balance=["measured", "counted"],
        update=["fused", "foreach"],
    )


class Stage(nn.Module):
    """Some layers of the model; what enters and leaves is contiguous, as the pipelines of others want it."""

    def __init__(self, layers: nn.Module, *, channels_last: bool) -> None:
        super().__init__()
        self.layers, self._channels_last = layers, channels_last
        if channels_last:
            layers.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the layers on (samples, ...)."""
        if self._channels_last and x.ndim == 4:
            x = _Turned.apply(x)
        y: torch.Tensor = self.layers(x)
        return y.contiguous()


class _Turned(torch.autograd.Function):
    """Images with their channels last in memory; backwards contiguous ones."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        del ctx
        return x.contiguous(memory_format=torch.channels_last)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        del ctx
        return gradients[0].contiguous()
