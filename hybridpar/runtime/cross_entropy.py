"""The cross-entropy over classes that may be sharded."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from hybridpar.data.samples import IGNORED, check_labels
from hybridpar.errors import ConfigError
from hybridpar.model.chain import Chain
from hybridpar.planning.plan import Plan
from hybridpar.runtime.loss import (
    Figures,
    Logits,
    Outcome,
    best_classes,
    best_figures,
    count_found,
    own_columns,
    share_of,
)
from hybridpar.runtime.margin import Margin, MarginCriterion, entering, leaving, make_margin
from hybridpar.schema import from_data
from hybridpar.sections import LossConfig


class CrossEntropy:
    """Softmax cross-entropy with the meaning of ``torch.nn.CrossEntropyLoss``, over classes that may be sharded.

    Args:
        label_smoothing: e, in [0, 1): how much of the target is spread over all C classes.
        class_weights: w, one number of 0 or more per class; None: 1 each.
        ignore_index: a label whose samples count neither in the sum nor in the weight.
        margin: ``ArcFace(scale, margin)`` or ``CosFace(scale, margin)``, for logits that are cosines (of a
            ``CosineLinear``): what is said below is then of the changed and scaled cosines. Accuracies are of the
            plain ones. Evaluations have the margin too.
        sampled: a share in (0, 1]: in training the sums over classes are over some only, those of the step's
            labels and so many of the others (``runtime.sampling``); the plan's recipe must say so. None: over all.

    With L the logarithm of the sum of exponentials of a sample's logits l, and y its label, its loss is::

        (1 - e) w_y (L - l_y) + e / C  sum_c w_c (L - l_c)
        = a L - t,   a = (1 - e) w_y + e / C sum_c w_c,   t = (1 - e) w_y l_y + e / C sum_c w_c l_c

    and the step's loss is the sum of these over the sum of w_y. Where every token of a sample has a label, each is
    a sample here. Of a mixed sample it is the sum over both labels
    by their shares, since a and t are linear in the target. With m_i the largest logit of shard i, s_i the sum
    of its exponentials relative to m_i and t_i its part of t: M = max m_i, L = M + log sum_i s_i exp(m_i - M), and
    t = sum t_i. The gradient of a logit is a exp(l - L) - e w_c / C, minus (1 - e) w_y for the target's. So shards
    exchange three figures per sample, whatever the smoothing and the weights (as in Shoeybi et al., Megatron-LM,
    2019, section 3, with one collective instead of three). Where one rank has all classes, the loss is -t of the
    logarithms l - L, which torch makes in one operation.

    Raises ConfigError for values out of range.
    """

    def __init__(
        self,
        label_smoothing: float = 0.0,
        class_weights: Sequence[float] | torch.Tensor | None = None,
        ignore_index: int = IGNORED,
        margin: Margin | None = None,
        sampled: float | None = None,
    ) -> None:
        if not 0 <= label_smoothing < 1:
            raise ConfigError(f"loss.label_smoothing: {label_smoothing} must lie in [0, 1)")
        if sampled is not None and not 0 < sampled <= 1:
            raise ConfigError(f"loss.sampled: {sampled} must be above 0 and at most 1, or null")
        if sampled is not None and label_smoothing:
            raise ConfigError(
                f"loss.label_smoothing: {label_smoothing} is spread over all classes, of which "
                f"loss.sampled={sampled} leaves some out; set one of the two only"
            )
        self.smoothing = label_smoothing
        self.sampled = sampled
        self.ignored = ignore_index
        self.margin = margin
        self.class_weights = None if class_weights is None else torch.as_tensor(class_weights, dtype=torch.float64)
        """(classes,) float64, on the device of the labels from the first micro-batch on."""
        self._mean = 1.0
        if self.class_weights is not None:
            listed = self.class_weights.dim() == 1 and self.class_weights.numel() > 0
            if not listed or not bool(((self.class_weights >= 0) & self.class_weights.isfinite()).all()):
                raise ConfigError(
                    f"loss.class_weights: {self.class_weights.tolist()} must be finite numbers, none below 0"
                )
            self._mean = float(self.class_weights.mean())

    @property
    def mixes(self) -> bool:
        """Whether samples may have two labels: margins and sampled classes go by one."""
        return self.margin is None and self.sampled is None

    def check_plan(self, plan: Plan, chain: Chain) -> None:
        """Raise ConfigError where there is not one weight per class, or a margin without cosines."""
        del plan
        self.check_classes(chain.classes)
        head = chain.layers[-1].linear
        if self.margin is not None and not (head and head.normalized):
            raise ConfigError(
                f"loss.margin: {type(self.margin).__name__} is for cosines, but {chain.model} ends in "
                f"{chain.layers[-1].name} ({chain.layers[-1].kind}); end it in hybridpar.CosineLinear, or set "
                "loss.margin.name=none"
            )

    def check_classes(self, classes: int) -> None:
        """Raise ConfigError where there is not one weight per class."""
        if self.class_weights is not None and len(self.class_weights) != classes:
            raise ConfigError(
                f"loss.class_weights: {len(self.class_weights)} numbers, but the model has {classes} classes; "
                "give one for each, or null"
            )

    def check(self, labels: torch.Tensor, classes: int) -> None:
        """Raise DataError for labels that are neither classes nor ignored."""
        check_labels(labels, classes, "the batch", self.ignored)

    def weight(self, labels: torch.Tensor) -> torch.Tensor:
        """Return the sum of the class weights of all labels that are not ignored; float64 scalar."""
        return self._weights(labels, torch.float64).sum()

    def score(self, logits: Logits, *, train: bool) -> torch.Tensor:
        """Return this shard's figures: (labels, 3) in training, (labels, 3 + 2 * 5) in evaluation.

        None, (labels, 0), where there are no other shards.
        """
        logits = logits.rows
        if logits.whole:
            return logits.values.new_empty((len(logits.values), 0))
        if logits.empty:
            return logits.values.new_tensor([float("-inf"), 0.0, 0.0]).expand(len(logits.values), 3).contiguous()
        taken = self._taken(logits)
        target = self._target(taken.values, taken)
        largest = taken.values.max(dim=1).values
        exponentials = _less(taken, largest).exp_().sum(dim=1)
        figures = torch.stack([largest, exponentials, target], dim=1)
        return figures if train else torch.cat([figures, best_figures(logits)], dim=1)

    def _taken(self, logits: Logits) -> Logits:
        """Return what the softmax takes."""
        return logits if self.margin is None or logits.empty else entering(self.margin, logits)

    def combine(self, logits: Logits, figures: Figures, weight: torch.Tensor, *, train: bool) -> Outcome:
        """Combine the figures of all shards into the loss; ``weight`` divides the gradient."""
        logits = logits.rows
        values, labels = logits.values, logits.labels
        taken = self._taken(logits)
        weights = _sum(self._weights(y, values.dtype) * share for y, share in logits.targets)
        counted = _sum((y != self.ignored).to(values.dtype) * share for y, share in logits.targets)
        factors = weights * (1 - self.smoothing)
        if self.smoothing:
            factors += counted * (self.smoothing * self._mean)
        if logits.whole:
            logarithms = taken.values.log_softmax(dim=1)
            losses = -self._target(logarithms, logits)
        else:
            normaliser, target = _joined(figures)
            logarithms = _less(taken, normaliser)
            losses = factors * normaliser - target
        loss_sum = losses.sum(dtype=torch.float64)
        own_weight, samples = weights.sum(dtype=torch.float64), counted.sum(dtype=torch.float64)
        if not train:
            hits = count_found(best_classes(logits, figures), labels, self.ignored)
            return Outcome(loss_sum, own_weight, samples, *hits, None)
        gradient = logits.values
        if not logits.empty:
            gradient = self._gradient(logits, logarithms, (factors, counted), share_of(weight).to(values.dtype))
        zero = torch.zeros_like(loss_sum)
        return Outcome(loss_sum, own_weight, samples, zero, zero, gradient)

    def _gradient(
        self,
        logits: Logits,
        logarithms: torch.Tensor,
        figures: tuple[torch.Tensor, torch.Tensor],
        per_weight: torch.Tensor,
    ) -> torch.Tensor:
        """Return the gradient of the logits, given l - L, which is overwritten, and every sample's a and count."""
        factors, counted = figures
        gradient = logarithms.exp_().mul_((factors * per_weight)[:, None])
        for y, share in logits.targets:
            own, index = own_columns(logits, y)
            weights = self._weights(y, logarithms.dtype) * share
            on_target = own * weights * (per_weight * (self.smoothing - 1))
            gradient.scatter_add_(1, index[:, None], on_target[:, None])
        if self.smoothing:
            gradient.addr_(counted * per_weight, self._spread(logits), alpha=-1)
        return gradient if self.margin is None else leaving(self.margin, logits, gradient)

    def _target(self, values: torch.Tensor, logits: Logits) -> torch.Tensor:
        """Return this shard's part of ``(1 - e) w_y v_y + e / C  sum_c w_c v_c``, (samples,); 0 where ignored.

        Of mixed samples the sum over both labels by their shares.
        """
        if logits.others is None:
            return self._target_of(values, logits, logits.labels)
        return _sum(self._target_of(values, logits, y) * share for y, share in logits.targets)

    def _target_of(self, values: torch.Tensor, logits: Logits, labels: torch.Tensor) -> torch.Tensor:
        if logits.empty:
            return values.new_zeros(len(labels))
        if logits.whole and logits.sampled is None:
            weights = None if self.class_weights is None else self.class_weights.to(values)
            target = F.nll_loss(values, labels, weights, ignore_index=self.ignored, reduction="none")
            target *= self.smoothing - 1
        else:
            own, index = own_columns(logits, labels)
            factors = own * self._weights(labels, values.dtype) * (1 - self.smoothing)
            target = values.gather(1, index[:, None])[:, 0] * factors
        if self.smoothing:
            target = torch.where(labels == self.ignored, target, target + values @ self._spread(logits))
        return target

    def _weights(self, labels: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return w_y per sample, 0 where the label is ignored."""
        counted = labels != self.ignored
        if self.class_weights is None:
            return counted.to(dtype)
        self.class_weights = self.class_weights.to(labels.device)
        return self.class_weights[torch.where(counted, labels, 0)].to(dtype) * counted

    def _spread(self, logits: Logits) -> torch.Tensor:
        """Return e w_c / C for this shard's classes, (width,)."""
        width, share = logits.values.shape[1], self.smoothing / logits.classes
        if self.class_weights is None:
            return logits.values.new_full((width,), share)
        return (self.class_weights[logits.first : logits.first + width] * share).to(logits.values.dtype)


def _sum(parts: Iterable[torch.Tensor]) -> torch.Tensor:
    first, *others = parts
    for other in others:
        first = first + other
    return first


def _less(logits: Logits, figure: torch.Tensor) -> torch.Tensor:
    """Return the values without a figure per sample, (samples, width)."""
    return logits.values.sub_(figure[:, None]) if logits.spare else logits.values - figure[:, None]


def _joined(figures: Figures) -> tuple[torch.Tensor, torch.Tensor]:
    """Return L and t of every sample, (samples,) each, from those of all shards."""
    stacked = torch.stack(figures)
    largest = stacked[:, :, 0].max(dim=0).values
    total = (stacked[:, :, 1] * (stacked[:, :, 0] - largest).exp()).sum(dim=0)
    return largest + total.log(), stacked[:, :, 2].sum(dim=0)


def make_loss(config: LossConfig, classes: int) -> CrossEntropy:
    """Return the configured loss for a model of ``classes`` classes; reads the file of class weights, if any.

    Raises ConfigError where the file or its numbers do not fit.
    """
    weights = config.class_weights
    if isinstance(weights, str):
        weights = _read_weights(Path(weights))
    margin = make_margin(config.margin)
    loss = CrossEntropy(config.label_smoothing, weights, config.ignore_index, margin, config.sampled)
    loss.check_classes(classes)
    return loss


def torch_loss(config: LossConfig, classes: int) -> nn.Module:
    """Return torch's own module for the configured loss, over logits of all classes. Raises as ``make_loss``."""
    made = make_loss(config, classes)
    plain = nn.CrossEntropyLoss(
        made.class_weights, ignore_index=config.ignore_index, label_smoothing=config.label_smoothing
    )
    return plain if made.margin is None else MarginCriterion(made.margin, plain)


def _read_weights(path: Path) -> tuple[float, ...]:
    where = f"loss.class_weights: {path}"
    try:
        numbers = json.loads(path.read_text())
    except OSError as e:
        raise ConfigError(f"{where} cannot be read: {e.strerror}; give an existing file, or a list") from e
    except ValueError as e:
        raise ConfigError(f"{where} is not JSON: {e}; write one list of numbers") from e
    return from_data(tuple[float, ...], numbers, where, ConfigError)
