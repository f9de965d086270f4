"""A user's own loss, on the logits of all classes."""

from __future__ import annotations

from collections.abc import Callable

import torch

from hybridpar.data.samples import IGNORED, check_labels
from hybridpar.errors import ConfigError, PlanError
from hybridpar.model.chain import Chain
from hybridpar.planning.blocks import positions
from hybridpar.planning.plan import Plan
from hybridpar.runtime.loss import Figures, Logits, Outcome, count_hits, share_of


class OwnLoss:
    """Any function of logits (samples, ...) and labels (samples,) int64.

    Where every token has a label: of (samples, tokens, classes) and (samples, tokens).

    Args:
        function: gives the **sum** over the samples that it gets; a scalar with a gradient. Where it is not
            ``additive``, it gives the loss of the whole step instead.
        weight: what the sum over a step is divided by, from all labels of the step (samples, ...); the weights of
            parts of a step must add up to its own. Default: the number of labels that are not ``ignored``.
        additive: whether the loss of a step is the sum of those of its micro-batches. One that is not (a
            contrastive one, say) needs all samples of a step in one micro-batch of the last stage.
        ignored: a label that may lie outside the classes; ``function`` has to leave its samples out.

    A ``function`` gets the samples of one micro-batch, and is called on every rank of the last stage.
    """

    mixes = True
    sampled = None

    def __init__(
        self,
        function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        *,
        weight: Callable[[torch.Tensor], torch.Tensor | float] | None = None,
        additive: bool = True,
        ignored: int = IGNORED,
    ) -> None:
        if weight is not None and not additive:
            raise ConfigError(
                "loss: weight is for additive losses; one that is not gives the loss of the step itself"
            )
        self.function, self.additive, self.ignored = function, additive, ignored
        self._weight = weight

    def check_plan(self, plan: Plan, chain: Chain) -> None:
        """Raise PlanError where no rank has the logits of all classes, or of all samples if they are needed."""
        del chain
        last = positions(plan)[-1]
        if last.sharded:
            raise PlanError(
                f"plan.tail.degree: {len(last.ranks)}, but an own loss needs all logits on one rank; "
                "plan with plan.tail.degree=1, or take the cross-entropy"
            )
        alone = plan.replicas * len(last.ranks) == 1
        if not self.additive and not (alone and last.micro_batch >= plan.global_batch):
            raise PlanError(
                f"plan.{last.kind}.micro_batch: {last.micro_batch} on {plan.replicas * len(last.ranks)} ranks, "
                f"but a loss that is not additive needs all {plan.global_batch} samples at once; plan with "
                f"plan.replicas=1 plan.tail.degree=1 plan.tail.micro_batch={plan.global_batch}"
            )

    def check(self, labels: torch.Tensor, classes: int) -> None:
        """Raise DataError for labels that are neither classes nor ignored."""
        check_labels(labels, classes, "the batch", self.ignored)

    def weight(self, labels: torch.Tensor) -> torch.Tensor:
        """Return what the sum of the step's losses is divided by; float64 scalar."""
        if self._weight is None or not self.additive:
            return (labels != self.ignored).sum(dtype=torch.float64)
        return torch.as_tensor(self._weight(labels), dtype=torch.float64, device=labels.device)

    def score(self, logits: Logits, *, train: bool) -> torch.Tensor:
        """Return no figures: there are no shards that could exchange any."""
        del train
        return logits.values.new_empty((len(logits.values), 0))

    def combine(self, logits: Logits, figures: Figures, weight: torch.Tensor, *, train: bool) -> Outcome:
        """Call the function and, in training, differentiate it. Raises ConfigError if it gives no scalar."""
        del figures
        with torch.set_grad_enabled(train):
            values = logits.values.detach().requires_grad_(train)
            parts = [(self.function(values, labels), share) for labels, share in logits.targets]
            value = parts[0][0] if logits.others is None else sum(part * share for part, share in parts)
        if not isinstance(value, torch.Tensor) or value.dim() or (train and not value.requires_grad):
            gave = type(value).__name__
            if isinstance(value, torch.Tensor):
                gave += f" of shape {tuple(value.shape)}{'' if value.requires_grad else ' without a gradient'}"
            raise ConfigError(f"loss: the function gave {gave}; return a scalar tensor that depends on the logits")
        counted = logits.labels != self.ignored
        samples, own_weight = counted.sum(dtype=torch.float64), self.weight(logits.labels)
        loss_sum = value.detach().double() * (1 if self.additive else own_weight)
        if not train:
            return Outcome(loss_sum, own_weight, samples, *count_hits(logits.rows, self.ignored), None)
        (gradient,) = torch.autograd.grad(value, values)
        if self.additive:
            gradient = gradient * share_of(weight).to(gradient.dtype)
        zero = torch.zeros_like(loss_sum)
        return Outcome(loss_sum, own_weight, samples, zero, zero, gradient.contiguous())
