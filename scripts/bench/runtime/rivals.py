"""The rivals: one rank's part of a training each, given all samples of a step.

Apart from ours they are what one would write with torch alone, each with its best known options.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B
from torch.nn.parallel import DistributedDataParallel

import hybridpar
from hybridpar.model.trace import trace
from hybridpar.planning.plan import Plan
from scripts.bench.runtime.models import IMAGE, IN_SHAPE, balanced, build, optimizer

AGREEMENT = 1e-4
"""By what share the losses of the first steps may differ, where all compute in one dtype."""


class Rival(Protocol):
    """Whoever can train."""

    name: str
    agreement: float
    """By what share the losses of the first steps may differ from those of the first rival."""

    def step(self, x: torch.Tensor, y: torch.Tensor) -> float:
        """Train on the samples of a step, of which this takes its own; return the mean loss of those it saw."""
        ...


class Ours:
    """hybridpar under a plan, with ``settings`` of ``hybridpar.wrap``."""

    name = "hybridpar"

    def __init__(
        self, model: str, plan: Plan, name: str = name, agreement: float = AGREEMENT, **settings: Any
    ) -> None:
        self.name, self.agreement = name, agreement
        given = {"optimizer": optimizer, "in_shape": IN_SHAPE.get(model, IMAGE), **settings}
        self.job = hybridpar.wrap(build(model), plan, **given)

    def step(self, x: torch.Tensor, y: torch.Tensor) -> float:
        """Train; the loss is that of all ranks."""
        return self.job.step((x, y))


class Loop:
    """A plain loop in one process, over micro-batches that add up their gradients."""

    name, agreement = "plain loop", AGREEMENT

    def __init__(self, model: str, micro_batch: int) -> None:
        self.model, self.micro_batch = build(model), micro_batch
        self.optimizer = optimizer(self.model.parameters())

    def step(self, x: torch.Tensor, y: torch.Tensor) -> float:
        """Train."""
        self.optimizer.zero_grad()
        total = 0.0
        for own_x, own_y in zip(x.split(self.micro_batch), y.split(self.micro_batch), strict=True):
            loss = F.cross_entropy(self.model(own_x), own_y, reduction="sum") / len(y)
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
        self.optimizer.step()
        return total


class DataParallel:
    """DistributedDataParallel, whose buckets are reduced during the backward."""

    name, agreement = "DistributedDataParallel", AGREEMENT

    def __init__(self, model: str) -> None:
        self.model = DistributedDataParallel(build(model), gradient_as_bucket_view=True, static_graph=True)
        self.optimizer = optimizer(self.model.parameters())

    def step(self, x: torch.Tensor, y: torch.Tensor) -> float:
        """Train."""
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.model(_own(x)), _own(y))
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return loss.item()


SCHEDULES: dict[str, tuple[Any, int]] = {
    "GPipe": (ScheduleGPipe, 1),
    "1F1B": (Schedule1F1B, 1),
    "interleaved 1F1B": (ScheduleInterleaved1F1B, 2),
}
"""And the stages of a rank."""


class Pipelining:
    """torch.distributed.pipelining."""

    def __init__(self, model: str, schedule: str, micro_batches: int) -> None:
        self.name, self.agreement = f"pipelining, {schedule}", AGREEMENT
        kind, several = SCHEDULES[schedule]
        world, rank = dist.get_world_size(), dist.get_rank()
        traced = trace(build(model), IMAGE, model)
        bounds = balanced(traced.chain, several * world)
        self.first, self.last = rank == 0, rank == world - 1
        cpu = torch.device("cpu")
        parts = {i: nn.Sequential(*traced.modules[slice(*bounds[i])]) for i in range(rank, len(bounds), world)}
        stages = [PipelineStage(part, i, len(bounds), cpu) for i, part in parts.items()]
        self.schedule = kind(stages if several > 1 else stages[0], micro_batches, loss_fn=F.cross_entropy)
        self.optimizer = optimizer([p for part in parts.values() for p in part.parameters()])

    def step(self, x: torch.Tensor, y: torch.Tensor) -> float:
        """Train; the loss is known on the last rank, 0 elsewhere."""
        self.optimizer.zero_grad()
        losses: list[torch.Tensor] = []
        arguments = (x,) if self.first else ()
        labels = {"target": y, "losses": losses} if self.last else {}
        self.schedule.step(*arguments, **labels)
        self.optimizer.step()
        return torch.stack(losses).mean().item() if losses else 0.0


class HandWritten:
    """A data-parallel front and a tensor-parallel tail, by hand, for VGG: columns, rows, columns."""

    name, agreement = "by hand", AGREEMENT

    def __init__(self, model: str) -> None:
        whole: Any = build(model)
        front = nn.Sequential(whole.features, whole.avgpool, nn.Flatten())
        self.front = DistributedDataParallel(front, gradient_as_bucket_view=True, static_graph=True)
        first, second, third = (m for m in whole.classifier if isinstance(m, nn.Linear))
        self.columns = _cut(first.weight, 0), _cut(first.bias, 0)
        self.rows = _cut(second.weight, 1), nn.Parameter(second.bias.detach().clone())
        self.classes = _cut(third.weight, 0), _cut(third.bias, 0)
        tail = [*self.columns, *self.rows, *self.classes]
        self.optimizer = optimizer([*self.front.parameters(), *tail])

    def step(self, x: torch.Tensor, y: torch.Tensor) -> float:
        """Train."""
        self.optimizer.zero_grad()
        features = _GatherSamples.apply(self.front(_own(x)))
        hidden = F.linear(features, *self.columns).relu()
        hidden = (_Sum.apply(F.linear(hidden, self.rows[0])) + self.rows[1]).relu()
        logits = _GatherFeatures.apply(F.linear(_Copy.apply(hidden), *self.classes))
        loss = F.cross_entropy(logits, y)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return loss.item()


def _own(whole: torch.Tensor) -> torch.Tensor:
    return whole.chunk(dist.get_world_size())[dist.get_rank()]


def _cut(parameter: torch.Tensor, dim: int) -> nn.Parameter:
    return nn.Parameter(parameter.detach().chunk(dist.get_world_size(), dim)[dist.get_rank()].clone())


def _gathered(own: torch.Tensor, dim: int) -> torch.Tensor:
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, own.contiguous())
    return torch.cat(parts, dim)


class _GatherSamples(torch.autograd.Function):
    """Every rank's samples; backwards the sum of the gradients, times the ranks as DDP takes the mean."""

    @staticmethod
    def forward(ctx: Any, own: torch.Tensor) -> torch.Tensor:
        del ctx
        return _gathered(own, 0)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        del ctx
        whole = gradients[0].contiguous()
        dist.all_reduce(whole)
        return _own(whole) * dist.get_world_size()


class _GatherFeatures(torch.autograd.Function):
    """Every rank's features; backwards the own ones, as every rank computes the same loss."""

    @staticmethod
    def forward(ctx: Any, own: torch.Tensor) -> torch.Tensor:
        ctx.width = own.shape[1]
        return _gathered(own, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        start = dist.get_rank() * ctx.width
        return gradients[0][:, start : start + ctx.width].contiguous()


class _Sum(torch.autograd.Function):
    """The sum over the ranks; backwards nothing."""

    @staticmethod
    def forward(ctx: Any, part: torch.Tensor) -> torch.Tensor:
        del ctx
        whole = part.clone()
        dist.all_reduce(whole)
        return whole

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        del ctx
        return gradients[0]


class _Copy(torch.autograd.Function):
    """Nothing; backwards the sum over the ranks."""

    @staticmethod
    def forward(ctx: Any, whole: torch.Tensor) -> torch.Tensor:
        del ctx
        return whole.view_as(whole)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        del ctx
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total)
        return total
