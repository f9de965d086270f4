"""The loss of a step is a sum over its samples, divided by a weight that the whole step has in common.

So micro-batches of any sizes, and samples that do not count, leave it as a single process would have it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from hybridpar.errors import ConfigError
from hybridpar.model.chain import Chain
from hybridpar.planning.plan import Plan

TOP = 5
"""Evaluation counts hits among this many largest logits."""

Figures = list[torch.Tensor]
"""What every shard's ``score`` gave, in the order of the shards."""


@dataclass(frozen=True)
class Outcome:
    """What the loss of one micro-batch gives; all sums are float64 scalars."""

    loss_sum: torch.Tensor
    weight: torch.Tensor
    """What the micro-batch adds to the weight that the sum of all losses is divided by."""
    samples: torch.Tensor
    """Labels that count: one per sample, or per token."""
    top1: torch.Tensor
    """Of these, how many have their target's logit as the largest; 0 in training."""
    top5: torch.Tensor
    """Of these, how many have it among the five largest; likewise."""
    gradient: torch.Tensor | None
    """Of (loss sum / weight of the step) with respect to this shard's logits, or to their rows; None when
    evaluating."""


class Logits(NamedTuple):
    """A shard's logits of one micro-batch, and the labels of its samples."""

    values: torch.Tensor
    """(samples, width), of the classes from ``first`` on. (samples, tokens, width) where every token has a label.
    """
    labels: torch.Tensor
    """(samples,) int64, over all classes; or (samples, tokens)."""
    first: int
    classes: int
    """Of the whole model."""
    whole: bool = False
    """Whether there are no other shards, so that nothing is exchanged."""
    others: torch.Tensor | None = None
    """Likewise, labels of what the samples are mixed with; None: they are not mixed."""
    share: float = 1.0
    """Of the loss of ``labels`` in a mixed sample's; that of ``others`` has the rest."""
    spare: bool = False
    """Whether ``values`` are nobody else's and may be overwritten."""
    sampled: torch.Tensor | None = None
    """(width,) int64, ascending: which classes the values are of; None: all from ``first`` on."""

    @property
    def rows(self) -> Logits:
        """The same with one row of logits per label: of (samples, tokens, width) every token is one."""
        if self.labels.dim() == 1:
            return self
        others = None if self.others is None else self.others.flatten()
        return self._replace(values=self.values.flatten(0, 1), labels=self.labels.flatten(), others=others)

    @property
    def empty(self) -> bool:
        """Whether no class of the shard takes part."""
        return not self.values.shape[-1]

    @property
    def targets(self) -> tuple[tuple[torch.Tensor, float], ...]:
        """Labels with their shares of the loss."""
        if self.others is None:
            return ((self.labels, 1.0),)
        return (self.labels, self.share), (self.others, 1.0 - self.share)


class Loss(Protocol):
    """A loss as the executor calls it: per micro-batch ``score``, then ``combine``."""

    @property
    def sampled(self) -> float | None:
        """The share of classes besides those of labels that it is to have in training; None: all."""
        ...

    ignored: int
    """Label of samples that do not count."""

    @property
    def mixes(self) -> bool:
        """Whether the loss of a mixed sample can be taken from two labels."""
        ...

    def check_plan(self, plan: Plan, chain: Chain) -> None:
        """Raise HybridparError where the loss cannot be computed under a plan, or on the model's outputs."""
        ...

    def check(self, labels: torch.Tensor, classes: int) -> None:
        """Raise DataError for labels that the loss has no use for."""
        ...

    def weight(self, labels: torch.Tensor) -> torch.Tensor:
        """Return what the losses of the whole step are divided by: from all its labels, float64 scalar."""
        ...

    def score(self, logits: Logits, *, train: bool) -> torch.Tensor:
        """Return the figures that shards exchange, (labels, figures)."""
        ...

    def combine(self, logits: Logits, figures: Figures, weight: torch.Tensor, *, train: bool) -> Outcome:
        """Return the loss of all shards; ``weight`` is that of the step.

        The values of ``logits`` are not used again afterwards.
        """
        ...


def check_mixes(loss: Loss) -> None:
    """Raise ConfigError for a loss that mixed samples do not have."""
    if not loss.mixes:
        raise ConfigError(
            "data.mixup and data.cutmix give samples two labels, but a margin and sampled classes go by one; drop "
            "them, or set loss.margin.name=none and loss.sampled=null"
        )


def share_of(weight: torch.Tensor) -> torch.Tensor:
    """Return 1 / weight, float64 scalar; 0 where nothing counts in the whole step: torch has no gradient there."""
    return torch.where(weight > 0, 1 / weight, 0)


_INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}
"""Class numbers travel among floating figures as the bits of integers; float32 would round those above 2^24."""


def as_figures(classes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return class numbers in the guise of figures of ``dtype``."""
    return classes.to(_INTEGERS[dtype]).view(dtype)


def own_columns(logits: Logits, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return whether each target lies in this shard, and its column (0 where it does not)."""
    if logits.sampled is not None:
        index = torch.searchsorted(logits.sampled, labels).clamp_(max=len(logits.sampled) - 1)
        return logits.sampled[index] == labels, index
    index = labels - logits.first
    own = (index >= 0) & (index < logits.values.shape[1])
    return own, torch.where(own, index, 0)


def best_figures(logits: Logits, wanted: int = TOP) -> torch.Tensor:
    """Return a shard's largest logits and their classes, (labels, 2 * wanted); of fewer classes, -inf besides.

    None, (labels, 0), where there are no other shards.
    """
    values = logits.values
    if logits.whole:
        return values.new_empty((len(values), 0))
    count = min(wanted, values.shape[1])
    best, classes = values.topk(count, dim=1)
    padding = values.new_full((len(values), wanted - count), float("-inf"))
    ids = as_figures(classes + logits.first, values.dtype)
    return torch.cat([best, padding, ids, padding], dim=1)


def best_classes(logits: Logits, figures: Figures) -> torch.Tensor:
    """Return the classes of the largest logits, (samples, up to 5), the largest first."""
    return best_of(logits, figures)[1]


def best_of(logits: Logits, figures: Figures, wanted: int = TOP) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the largest logits of all shards and their classes, (labels, up to ``wanted``), the largest first.

    Of shards from the last figures that they exchange, which are those of ``best_figures``.
    """
    if logits.whole:
        best = logits.values.topk(min(wanted, logits.values.shape[1]), dim=1)
        return best.values, best.indices
    stacked = torch.stack(figures)
    values = torch.cat(tuple(stacked[:, :, -2 * wanted : -wanted]), dim=1)
    classes = torch.cat(tuple(stacked[:, :, -wanted:]), dim=1).view(_INTEGERS[stacked.dtype])
    best = values.topk(min(wanted, logits.classes), dim=1)
    return best.values, classes.gather(1, best.indices).to(torch.int64)


def count_hits(logits: Logits, ignored: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Count targets with the largest of all logits, and with one of the five largest; float64 scalars.

    Where a label has no single row of logits, nothing is a hit.
    """
    values, labels = logits.rows[:2]
    if values.dim() != 2:
        return (torch.zeros((), dtype=torch.float64, device=values.device),) * 2
    return count_found(values.topk(min(TOP, values.shape[1]), dim=1).indices, labels, ignored)


def count_found(best: torch.Tensor, labels: torch.Tensor, ignored: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Count targets that are first, and anywhere, in (samples, up to 5) class numbers; float64 scalars."""
    hit = (best == labels[:, None]) & (labels != ignored)[:, None]
    return hit[:, 0].sum(dtype=torch.float64), hit.any(dim=1).sum(dtype=torch.float64)
