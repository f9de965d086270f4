"""A batch as a user gives it, and the part of it that one rank reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from hybridpar.errors import DataError
from hybridpar.model.chain import Chain
from hybridpar.model.inputs import pack
from hybridpar.planning.layout import Interval, length
from hybridpar.runtime.feed import StepBatch

Inputs = torch.Tensor | Sequence[torch.Tensor] | Mapping[str, torch.Tensor]
"""Of a batch; several tensors, or a mapping by their names, where the model takes several."""
WholeBatch = StepBatch | tuple[Inputs, torch.Tensor]
GivenBatch = WholeBatch | None


class Reader:
    """Takes the part of a batch that one rank, of all replicas of a plan, reads of a model's samples."""

    def __init__(self, rank: int, chain: Chain) -> None:
        self._rank, self._chain = rank, chain

    def own(
        self,
        batch: tuple[Inputs, torch.Tensor] | None,
        reads: Sequence[Interval],
        samples: int,
        first_sample: int,
    ) -> StepBatch:
        """Return this rank's part of a step of ``samples`` samples, of which it reads some intervals.

        ``batch`` is (inputs, labels) of all samples, or of the rank's own, one interval after the other; None is
        for ranks that read nothing. Raises DataError where it is something else.
        """
        own = sum(length(interval) for interval in reads)
        if batch is None:
            if own:
                raise DataError(f"rank {self._rank} reads {own} of the step's {samples} samples but got None")
            return StepBatch(None, None, samples, first_sample)
        inputs, labels = self._packed(batch[0]), batch[1]
        self._check(inputs, labels, own, samples)
        if not own:
            return StepBatch(None, None, samples, first_sample)
        if len(labels) != own:
            rows = torch.cat([torch.arange(start, stop) for start, stop in reads])
            inputs, labels = inputs[rows.to(inputs.device)], labels[rows.to(labels.device)]
        return StepBatch(inputs, labels, samples, first_sample)

    def unlabelled(self, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the inputs of a batch without labels, with some. Raises DataError for other inputs."""
        packed = self._packed(inputs)
        return packed, torch.zeros(len(packed), *self._chain.label_shape, dtype=torch.int64)

    def _packed(self, inputs: Inputs) -> torch.Tensor:
        if isinstance(inputs, torch.Tensor):
            return inputs
        return pack(self._chain.inputs, inputs, 1, f"the batch of rank {self._rank}")

    def _check(self, inputs: torch.Tensor, labels: torch.Tensor, own: int, samples: int) -> None:
        if len(inputs) != len(labels) or len(labels) not in {own, samples}:
            raise DataError(
                f"rank {self._rank} got {len(inputs)} inputs and {len(labels)} labels; give all {samples} of the "
                f"step, or the {own} that this rank reads (samples= tells the size of a smaller step)"
            )
        if labels.shape[1:] != self._chain.label_shape:
            wanted = (len(labels), *self._chain.label_shape)
            raise DataError(
                f"rank {self._rank} got labels of shape {tuple(labels.shape)}; give {wanted}, as the model's "
                f"output is {self._chain.out_shape} per sample"
            )
