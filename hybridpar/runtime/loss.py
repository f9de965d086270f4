"""Softmax cross-entropy over logits whose classes may be sharded; the classes are never gathered."""

from __future__ import annotations

from dataclasses import dataclass

import torch

TOP = 5
"""Evaluation counts hits among this many largest logits."""


_INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}
"""Class numbers travel among floating figures as the bits of integers; float32 would round those above 2^24."""


@dataclass(frozen=True)
class Outcome:
    """What the loss of one micro-batch gives."""

    loss_sum: torch.Tensor
    """Sum over the samples, float64 scalar."""
    top1: torch.Tensor
    """Samples whose target has the largest logit; float64 scalar, 0 in training."""
    top5: torch.Tensor
    """Samples whose target is among the five largest logits; likewise."""
    gradient: torch.Tensor | None
    """Of (loss sum / weight) with respect to this shard's logits; None when evaluating."""


class CrossEntropy:
    """The loss of one shard, which holds ``logits[:, first : first + width]`` of all classes.

    With m_i the largest logit of shard i, s_i the sum of its exponentials relative to m_i and t the target's
    logit, M = max m_i and S = sum s_i exp(m_i - M): the loss of a sample is log S + M - t, and the gradient of a
    logit l is exp(l - M - log S), minus 1 for the target. So shards exchange three figures per
    sample (as in Shoeybi et al., Megatron-LM, 2019, section 3, with one collective instead of three).
    """

    def __init__(self, first: int) -> None:
        self.first = first

    def score(self, logits: torch.Tensor, labels: torch.Tensor, *, train: bool) -> torch.Tensor:
        """Return this shard's figures, shape (samples, 3) in training, (samples, 3 + 2 * 5) in evaluation.

        ``logits`` (samples, width), ``labels`` (samples,) int64 over all classes.
        """
        largest = logits.max(dim=1).values
        exponentials = (logits - largest[:, None]).exp_().sum(dim=1)
        own, index = self._own(logits, labels)
        target = logits.gather(1, index[:, None])[:, 0] * own
        figures = [largest, exponentials, target]
        if train:
            return torch.stack(figures, dim=1)
        count = min(TOP, logits.shape[1])
        values, classes = logits.topk(count, dim=1)
        padding = logits.new_full((len(logits), TOP - count), float("-inf"))
        ids = (classes + self.first).to(_INTEGERS[logits.dtype]).view(logits.dtype)
        return torch.cat([torch.stack(figures, dim=1), values, padding, ids, padding], dim=1)

    def combine(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        figures: list[torch.Tensor],
        weight: float,
        *,
        train: bool,
    ) -> Outcome:
        """Combine all shards' ``figures`` (in order) into the loss; ``weight`` divides the gradient."""
        stacked = torch.stack(figures)
        largest = stacked[:, :, 0].max(dim=0).values
        total = (stacked[:, :, 1] * (stacked[:, :, 0] - largest).exp()).sum(dim=0)
        normaliser = largest + total.log()
        loss_sum = (normaliser - stacked[:, :, 2].sum(dim=0)).sum(dtype=torch.float64)
        zero = loss_sum.new_zeros(())
        if not train:
            return Outcome(loss_sum, *_hits(stacked, labels), None)
        gradient = (logits - normaliser[:, None]).exp_()
        own, index = self._own(logits, labels)
        gradient.scatter_add_(1, index[:, None], -own[:, None].to(gradient.dtype))
        return Outcome(loss_sum, zero, zero, gradient.div_(weight))

    def _own(self, logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return whether each target lies in this shard, and its column (0 where it does not)."""
        index = labels - self.first
        own = (index >= 0) & (index < logits.shape[1])
        return own, torch.where(own, index, 0)


def _hits(stacked: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Count targets that are first, and among the first five, of all shards' candidates."""
    values = torch.cat(tuple(stacked[:, :, 3 : 3 + TOP]), dim=1)
    classes = torch.cat(tuple(stacked[:, :, 3 + TOP :]), dim=1).view(_INTEGERS[stacked.dtype])
    best = values.topk(TOP, dim=1).indices
    hit = classes.gather(1, best) == labels[:, None]
    return hit[:, 0].sum(dtype=torch.float64), hit.any(dim=1).sum(dtype=torch.float64)
