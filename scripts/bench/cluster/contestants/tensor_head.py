"""A data-parallel front and a tensor-parallel head, written by hand with torch alone, as one would for one model.

The front is DistributedDataParallel's. Every rank then gathers all samples' features, and has columns of one
linear layer, rows of the next, and so on; of the last one, columns: no rank has all logits (Shoeybi et al.,
"Megatron-LM", 2019). The whole batch goes through the head at once.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hybridpar.model.deferred import Part
from hybridpar.model.keyed import KeyedDropout
from scripts.bench.cluster.contestants.contestant import Contestant, Options, product
from scripts.bench.cluster.contestants.ddp import own
from scripts.bench.cluster.setting import Setting
from scripts.bench.work import Work


class TensorHead(Contestant):
    """DistributedDataParallel in front of a tensor-parallel head.

    Args:
        work: what is trained.
        bucket_mb: MiB of the front's gradients that are reduced together.
        channels_last: whether images and the front's weights lie so in memory.
        update: how the optimizer goes through the parameters.

    """

    def __init__(
        self, work: Work, bucket_mb: int = 25, *, channels_last: bool = False, update: str = "fused"
    ) -> None:
        start = _head_start(work)
        front: nn.Module = work.part(0, start)
        if channels_last:
            front.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._front = DistributedDataParallel(
            front,
            bucket_cap_mb=bucket_mb,
            forward_sync_buffers=False,
            gradient_as_bucket_view=True,
            static_graph=True,
        )
        self._head, self._first_class = _head(work, start)
        self._optimizer = work.sgd([*self._front.parameters(), *self._head.parameters()], update)

    @classmethod
    def grid(cls, setting: Setting) -> list[Options]:
        """Return sizes of buckets, memory formats and ways to update."""
        del setting
        return product(bucket_mb=[25, 8], channels_last=[False, True], update=["fused", "foreach"])

    @classmethod
    def norm_samples(cls, setting: Setting, options: Options) -> int | None:
        """Return a rank's samples: batch norms are in the front."""
        del options
        return setting.images_per_rank

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> float:
        """Train; all ranks know the whole loss."""
        self._optimizer.zero_grad()
        features = _GatherSamples.apply(self._front(own(images)))
        loss = _ShardedCrossEntropy.apply(self._head(features), labels, self._first_class)
        loss.backward()
        self._optimizer.step()
        return float(loss.detach()) / dist.get_world_size()


def _head_start(work: Work) -> int:
    """Return where the head begins: with an odd number of linear layers, so that the last has columns."""
    chain = work.traced.chain
    linears = [i for i in range(chain.tail_start, len(chain.layers)) if chain.layers[i].linear]
    if not linears:
        raise ValueError(f"{chain.model} has no linear layers at its end that could be shared out")
    return chain.tail_start if len(linears) % 2 else linears[0] + 1


def _head(work: Work, start: int) -> tuple[nn.Sequential, int]:
    """Return this rank's share of the layers from ``start`` on, and the first of its classes."""
    make, layers = work.source.materialize, list[nn.Module]()
    columns, shared, first = False, torch.Generator().manual_seed(work.seed), 0
    for index in range(start, len(work.traced.modules)):
        module, names = work.traced.modules[index], work.traced.names[index]
        if isinstance(module, nn.Linear):
            columns = not columns
            first, last = _share(module.out_features if columns else module.in_features)
            weight = make(names["weight"], work.seed, work.dtype, Part(int(not columns), first, last))
            bias = make(names["bias"], work.seed, work.dtype, Part(0, first, last) if columns else None)
            if columns:
                layers.append(_Columns(weight, bias, copies=any(isinstance(layer, _Rows) for layer in layers)))
            else:
                layers.append(_Rows(weight, bias))
        elif isinstance(module, KeyedDropout):
            layers.append(_Dropout(module.p if work.dropout else 0.0, None if columns else shared))
        else:
            layers.append(work.part(index, index + 1))
    return nn.Sequential(*layers), first


def _share(features: int) -> tuple[int, int]:
    rank, world = dist.get_rank(), dist.get_world_size()
    return features * rank // world, features * (rank + 1) // world


class _Columns(nn.Module):
    """Some outputs of a linear layer, for all samples; ``copies``: the input's gradient is summed by itself."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, *, copies: bool) -> None:
        super().__init__()
        self.weight, self.bias, self._copies = nn.Parameter(weight), nn.Parameter(bias), copies

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(_Copy.apply(x) if self._copies else x, self.weight, self.bias)


class _Rows(nn.Module):
    """A linear layer, summed over the ranks, of which each has some inputs."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = _Sum.apply(F.linear(x, self.weight)) + self.bias
        return y


class _Dropout(nn.Module):
    """Dropout; with a generator that all ranks seed alike their masks are the same, without each has its own."""

    def __init__(self, p: float, generator: torch.Generator | None) -> None:
        super().__init__()
        self._p, self._generator = p, generator

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self._p == 0.0 or self._generator is None:
            return F.dropout(x, self._p)
        kept = 1 - self._p
        return x * torch.empty_like(x).bernoulli_(kept, generator=self._generator).div_(kept)


class _GatherSamples(torch.autograd.Function):
    """Every rank's samples; backwards the sum of the gradients, times the ranks as DDP takes the mean."""

    @staticmethod
    def forward(ctx: Any, part: torch.Tensor) -> torch.Tensor:
        del ctx
        whole = part.new_empty(dist.get_world_size() * len(part), *part.shape[1:])
        dist.all_gather(list(whole.chunk(dist.get_world_size())), part.contiguous())
        return whole

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        del ctx
        parts = list(gradients[0].contiguous().chunk(dist.get_world_size()))
        total = torch.empty_like(parts[0])
        dist.reduce_scatter(total, parts)
        return total.mul_(dist.get_world_size())


class _Sum(torch.autograd.Function):
    """The sum over the ranks; backwards nothing."""

    @staticmethod
    def forward(ctx: Any, part: torch.Tensor) -> torch.Tensor:
        ctx.mark_dirty(part)
        dist.all_reduce(part)
        return part

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
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total


class _ShardedCrossEntropy(torch.autograd.Function):
    """The mean cross-entropy of all samples, of which each rank has some classes' logits (samples, classes)."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor, first: int) -> torch.Tensor:
        rows = torch.arange(len(labels))
        inside = (labels >= first) & (labels < first + logits.shape[1])
        highest = logits.amax(1)
        dist.all_reduce(highest, dist.ReduceOp.MAX)
        weights = (logits - highest[:, None]).exp_()
        parts = torch.stack([weights.sum(1), torch.zeros_like(highest)])
        parts[1, inside] = logits[rows[inside], labels[inside] - first]
        dist.all_reduce(parts)
        ctx.save_for_backward(weights.div_(parts[0][:, None]), rows[inside], labels[inside] - first)
        return (parts[0].log() + highest - parts[1]).mean()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        shares, rows, columns = ctx.saved_tensors
        shares[rows, columns] -= 1.0
        return shares.mul_(gradients[0] / len(shares)), None, None
