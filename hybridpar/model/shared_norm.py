"""Batch norm over the samples of several ranks, which meet in operations of the program."""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hybridpar.errors import ModelError


class Peers(Protocol):
    """How a norm meets those of other ranks, within one forward or backward."""

    def moments(self, own: torch.Tensor) -> torch.Tensor:
        """Return the moments of all samples: (2 channels + 1,), as :func:`moments_of` has them."""
        ...

    def sums(self, own: torch.Tensor) -> torch.Tensor:
        """Return the sums over all ranks of a backward's figures, (2 channels + 1,)."""
        ...


class _Alone:
    """Peers of a norm that has none."""

    def moments(self, own: torch.Tensor) -> torch.Tensor:
        return own

    def sums(self, own: torch.Tensor) -> torch.Tensor:
        return own


class SharedNorm(_BatchNorm):
    """Batch norm that takes its statistics over the samples of all its peers; stands for ``nn.SyncBatchNorm``.

    In training ``peers`` are set around each forward; without, the norm has its own samples only. In evaluation
    it is what ``nn.BatchNorm2d`` is. Works on any device.
    """

    peers: Peers | None = None

    @staticmethod
    def of(norm: nn.SyncBatchNorm) -> SharedNorm:
        """Make one with the very tensors of ``norm``. Raises ModelError where that has ranks of its own."""
        if norm.process_group is not None:
            raise ModelError(
                "a SyncBatchNorm of the model has a process group of its own, but the plan says which ranks share "
                "statistics; make it without process_group"
            )
        made = SharedNorm(
            norm.num_features, norm.eps, norm.momentum, affine=False, track_running_stats=False, device="meta"
        )
        made.affine, made.track_running_stats = norm.affine, norm.track_running_stats
        made._parameters.update(norm._parameters)  # noqa: SLF001 - the same tensors
        made._buffers.update(norm._buffers)  # noqa: SLF001 - likewise
        return made.train(norm.training)

    def _check_input_dim(self, input: torch.Tensor) -> None:  # noqa: A002 - torch's name
        """Raise ValueError for an input without channels, as torch's do."""
        if input.dim() < 2:
            raise ValueError(f"expected at least 2 dims (got {input.dim()})")

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - torch's name
        """Normalise (samples, channels, ...)."""
        if not self.training:
            normalised: torch.Tensor = super().forward(input)
            return normalised
        self._check_input_dim(input)
        peers = self.peers or _Alone()
        mean, variance = self.learn(peers.moments(moments_of(input.detach(), self._figures_like(input))))
        made: torch.Tensor = _Normalise.apply(input, self.weight, self.bias, mean, variance, self.eps, peers)
        return made

    def _figures_like(self, x: torch.Tensor) -> torch.dtype:
        """Return the dtype of statistics: the weight's, and at least float32."""
        held = x.dtype if self.weight is None else self.weight.dtype
        return torch.promote_types(torch.promote_types(x.dtype, held), torch.float32)

    def learn(self, moments: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Take the moments of a chunk into the running statistics; return its mean and (biased) variance.

        As torch does: by ``momentum``, or as the mean over all chunks, and with the unbiased variance. One value
        alone has none, and counts as 0.
        """
        mean, second, count = split(moments)
        if self.running_mean is not None and self.running_var is not None:
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
            share = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            unbiased = second / (count - 1).clamp(min=1)
            self.running_mean.mul_(1 - share).add_(mean.to(self.running_mean.dtype), alpha=share)
            self.running_var.mul_(1 - share).add_(unbiased.to(self.running_var.dtype), alpha=share)
        return mean.clone(), second / count


def split(figures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Split (2 channels + 1,) into two figures per channel and the count of values."""
    channels = len(figures) // 2
    return figures[:channels], figures[channels:-1], figures[-1]


def moments_of(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return per channel of (samples, channels, ...) the mean and the sum of squares around it, and the count.

    One tensor (2 channels + 1,) of ``dtype``.
    """
    variance, mean = torch.var_mean(x.to(dtype), _others(x), correction=0)
    count = x.numel() // x.shape[1]
    return torch.cat([mean, variance * count, mean.new_full((1,), count)])


def combined(parts: torch.Tensor) -> torch.Tensor:
    """Return the moments of all samples from those of several sets, (sets, 2 channels + 1); empty ones are zeros.

    With counts n_i, means m_i and sums of squares around them s_i: ``m = sum n_i m_i / n``, ``s = sum s_i + n_i
    (m_i - m)^2`` (Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample
    variances", 1979). Nothing large is subtracted from anything large.
    """
    channels = parts.shape[1] // 2
    means, seconds, counts = parts[:, :channels], parts[:, channels:-1], parts[:, -1:]
    count = counts.sum(0)
    mean = (means * counts).sum(0) / count
    second = (seconds + counts * (means - mean).square()).sum(0)
    return torch.cat([mean, second, count])


class _Normalise(torch.autograd.Function):
    """``weight * (x - mean) / sqrt(variance + eps) + bias``, with statistics that depend on the peers' x as well.

    Keeps what torch's own batch norm keeps: the input and two figures per channel.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        mean: torch.Tensor,
        variance: torch.Tensor,
        eps: float,
        peers: Peers,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight, mean, variance)
        ctx.eps, ctx.peers = eps, peers
        return F.batch_norm(x, mean, variance, weight, bias, training=False, momentum=0.0, eps=eps)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """With dy the gradient, h the normalised input and means over all peers' n values of a channel.

        ``dx = weight / sqrt(variance + eps) * (dy - mean(dy) - h mean(dy h))`` (Ioffe and Szegedy, "Batch
        normalization", 2015); the gradients of weight and bias are the own samples' sums.
        """
        (dy,) = grads
        x, weight, mean, variance = ctx.saved_tensors
        _, scaled, total = torch.ops.aten.native_batch_norm_backward(
            dy, x, weight, mean, variance, None, None, False, ctx.eps, [False, True, True]
        )
        own = (scaled if ctx.needs_input_grad[1] else None, total if ctx.needs_input_grad[2] else None)
        if not ctx.needs_input_grad[0]:
            return None, *own, None, None, None, None
        count = total.new_full((1,), x.numel() // x.shape[1])
        all_total, all_scaled, n = split(ctx.peers.sums(torch.cat([total, scaled, count])))
        inverse = (variance + ctx.eps).rsqrt()
        factor = inverse if weight is None else inverse * weight
        shape = (1, -1, *(1,) * (x.dim() - 2))
        dx = (x - mean.view(shape)).mul_((-factor * inverse * all_scaled / n).view(shape))
        dx.addcmul_(dy, factor.view(shape)).sub_((factor * all_total / n).view(shape))
        return dx.to(x.dtype), *own, None, None, None, None


def _others(x: torch.Tensor) -> list[int]:
    return [0, *range(2, x.dim())]


def synchronise(module: nn.Module) -> None:
    """Make every batch norm inside a model one over all replicas. Raises ModelError where there is none."""
    if not any(isinstance(m, _BatchNorm) for child in module.children() for m in child.modules()):
        raise ModelError(
            "model.batch_norm: synchronised, but the model has no batch norm; leave it out (FrozenBatchNorm2d has "
            "nothing to synchronise)"
        )
    nn.SyncBatchNorm.convert_sync_batchnorm(module)  # type: ignore[no-untyped-call]


def share_norms(captured: fx.GraphModule) -> None:
    """Put a :class:`SharedNorm` in the place of every ``nn.SyncBatchNorm``, also where a module stays one node."""
    made: dict[int, SharedNorm] = {}
    for path, part in list(captured.named_modules(remove_duplicate=False)):
        if isinstance(part, nn.SyncBatchNorm):
            captured.set_submodule(path, made.setdefault(id(part), SharedNorm.of(part)))


def check_kinds(part: nn.Module, name: str) -> None:
    """Raise ModelError for a layer with batch norms of both kinds: no single process could be compared with it."""
    kinds = {isinstance(m, SharedNorm) for m in part.modules() if isinstance(m, _BatchNorm)}
    if len(kinds) > 1:
        raise ModelError(
            f"layer {name} has batch norms of both kinds; make all of them SyncBatchNorm, or none "
            "(nn.SyncBatchNorm.convert_sync_batchnorm converts a whole model)"
        )
