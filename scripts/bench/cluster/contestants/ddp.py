"""torch's DistributedDataParallel, whose buckets are reduced during the backward."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from scripts.bench.cluster.contestants.contestant import Contestant, Options, own_micro_batches, product
from scripts.bench.cluster.setting import Setting
from scripts.bench.work import Work


class DataParallel(Contestant):
    """DistributedDataParallel.

    Args:
        work: what is trained.
        bucket_mb: MiB of gradients that are reduced together; torch's default is 25.
        micro_batch: samples of a forward on a rank; None: all its own ones.
        channels_last: whether images and weights lie so in memory.
        update: how the optimizer goes through the parameters.

    """

    def __init__(
        self,
        work: Work,
        bucket_mb: int = 25,
        micro_batch: int | None = None,
        *,
        channels_last: bool = False,
        update: str = "fused",
    ) -> None:
        model = work.whole()
        if channels_last:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._micro_batch = micro_batch or work.global_batch
        self._model = DistributedDataParallel(
            model,
            bucket_cap_mb=bucket_mb,
            forward_sync_buffers=False,  # running statistics are no part of the step, and those of rank 0 are kept
            gradient_as_bucket_view=True,
            static_graph=micro_batch is None,
        )
        self._optimizer = work.sgd(model.parameters(), update)

    @classmethod
    def grid(cls, setting: Setting) -> list[Options]:
        """Return sizes of buckets and micro-batches, memory formats and ways to update."""
        return product(
            bucket_mb=[25, 8, 100],
            micro_batch=own_micro_batches(setting),
            channels_last=[False, True],
            update=["fused", "foreach"],
        )

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> float:
        """Train; gradients of all micro-batches but the last stay here."""
        self._optimizer.zero_grad()
        own_x, own_y = own(images).split(self._micro_batch), own(labels).split(self._micro_batch)
        share = 0.0
        for number, (x, y) in enumerate(zip(own_x, own_y, strict=True), 1):
            with nullcontext() if number == len(own_x) else self._model.no_sync():
                loss = F.cross_entropy(self._model(x), y, reduction="sum") / len(labels)
                (loss * dist.get_world_size()).backward()  # type: ignore[no-untyped-call] # it takes the mean
            share += loss.item()
        self._optimizer.step()
        return share


class RoundedDataParallel(DataParallel):
    """DistributedDataParallel that sums gradients in bfloat16."""

    lossy: ClassVar[bool] = True

    def __init__(self, work: Work, **options: Any) -> None:
        super().__init__(work, **options)
        self._model.register_comm_hook(None, bf16_compress_hook)


def own(whole: torch.Tensor) -> torch.Tensor:
    """Return this rank's run of a step's samples."""
    return whole.chunk(dist.get_world_size())[dist.get_rank()]
