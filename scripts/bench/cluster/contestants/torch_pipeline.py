"""torch.distributed.pipelining: GPipe, 1F1B and interleaved 1F1B, also with several pipelines side by side."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B

from scripts.bench.cluster.contestants.contestant import Contestant, Options
from scripts.bench.cluster.contestants.stages import Balance, Stage, cuts, pipeline_grid
from scripts.bench.cluster.setting import Setting
from scripts.bench.work import Work


class TorchPipeline(Contestant):
    """A pipeline over all ranks, or ``replicas`` of it that sum their gradients after their last backward.

    Args:
        work: what is trained.
        micro_batch: samples of a forward.
        replicas: pipelines side by side.
        channels_last: whether images and weights lie so in memory, within a stage.
        balance: what the cuts make equal.
        update: how the optimizer goes through the parameters.

    """

    schedule: ClassVar[Any]
    per_rank: ClassVar[int] = 1
    """Stages of a rank."""

    def __init__(
        self,
        work: Work,
        micro_batch: int,
        replicas: int = 1,
        *,
        channels_last: bool = False,
        balance: Balance = "measured",
        update: str = "fused",
    ) -> None:
        ranks = dist.get_world_size() // replicas
        self._replica, place = divmod(dist.get_rank(), ranks)
        self._replicas, self._first, self._last = replicas, place == 0, place == ranks - 1
        pipelines = [dist.new_group(list(range(r * ranks, (r + 1) * ranks))) for r in range(replicas)]
        peers = [dist.new_group(list(range(p, ranks * replicas, ranks))) for p in range(ranks)]
        self._peers = peers[place]
        count, samples = work.global_batch // replicas // micro_batch, work.global_batch
        bounds = cuts(work, self.per_rank * ranks, micro_batch, count, balance)
        parts = {i: work.part(*bounds[i]) for i in range(place, len(bounds), ranks)}
        self._parameters = [p for part in parts.values() for p in part.parameters()]
        self._optimizer = work.sgd(self._parameters, update)

        def criterion(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return F.cross_entropy(logits, labels, reduction="sum") / samples

        stages = [
            PipelineStage(
                Stage(part, channels_last=channels_last),
                number,
                len(bounds),
                torch.device("cpu"),
                group=pipelines[self._replica],
            )
            for number, part in parts.items()
        ]
        own = stages if self.per_rank > 1 else stages[0]
        self._schedule = self.schedule(own, count, loss_fn=criterion, scale_grads=False)

    @classmethod
    def grid(cls, setting: Setting) -> list[Options]:
        """Return micro-batches, replicas, memory formats and balances."""
        return pipeline_grid(setting, channels_last=[False, True])

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> float:
        """Train; the last rank of a pipeline knows its loss."""
        self._optimizer.zero_grad()
        losses: list[torch.Tensor] = []
        inputs = (images.chunk(self._replicas)[self._replica],) if self._first else ()
        told: dict[str, Any] = {}
        if self._last:
            told = {"target": labels.chunk(self._replicas)[self._replica], "losses": losses}
        self._schedule.step(*inputs, **told, return_outputs=False)
        if self._replicas > 1:
            _sum_gradients(self._parameters, self._peers)
        self._optimizer.step()
        return torch.stack(losses).sum().item() if losses else 0.0


class GPipe(TorchPipeline):
    """All forwards, then all backwards."""

    schedule = ScheduleGPipe


class OneForwardOneBackward(TorchPipeline):
    """1F1B: each backward as early as it can be."""

    schedule = Schedule1F1B


class Interleaved(TorchPipeline):
    """1F1B with two stages per rank, so that a pipeline fills in half the time."""

    schedule = ScheduleInterleaved1F1B
    per_rank = 2


def _sum_gradients(parameters: list[nn.Parameter], group: Any) -> None:
    """Sum gradients over the pipelines; all reductions are under way together."""
    own = [p.grad for p in parameters if p.grad is not None]
    works = [dist.all_reduce(gradient, group=group, async_op=True) for gradient in own]
    for work in works:
        work.wait()
