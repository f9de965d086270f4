"""Compares the steps of a job with those of a single process, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from hybridpar.runtime.job import Job
from hybridpar.runtime.ledger import Ledger
from hybridpar.runtime.recorder import Part, Recorder
from hybridpar.runtime.reference import Reference


class Meeting(Protocol):
    """How the ranks of a verification talk besides the plan's communicators."""

    def share(self, make: Callable[[], Any], owner: int = 0) -> Any:
        """Return the JSON data that ``make`` gives on one rank, on every rank; there is no timeout for it."""
        ...

    def collect(self, value: Any) -> list[Any] | None:
        """Return every rank's value on rank 0, None elsewhere."""
        ...


class Slice(NamedTuple):
    """A rank's part of a parameter, with its gradient, or of a batch norm's buffer, on the CPU."""

    name: str
    rank: int
    dim: int | None
    start: int
    value: torch.Tensor
    gradient: torch.Tensor | None = None
    begin: int | None = None
    """Where in the flattened parameter a gradient begins that is a run of it; None: it is that of all."""


class Verifier:
    """Compares one job with a single process. All ranks make one and call ``run``; rank 0 has the reference.

    ``slack`` is how far parameters may be apart in one step without a fault; ``again`` lets the reference begin
    each step with the plan's parameters, where rounding alone may set them apart.
    """

    def __init__(
        self,
        job: Job,
        meeting: Meeting,
        reference: Reference | None,
        tolerance: float,
        slack: float = 0.0,
        *,
        again: bool = False,
    ) -> None:
        self.job, self._meeting, self._reference = job, meeting, reference
        self._recorder = Recorder(job)
        self.ledger = Ledger(tolerance)
        """What was compared; on rank 0."""
        self._slack, self._again = slack, again
        self._layers = job.chain.layers
        self._owner: dict[str, int] = {}
        for index, layer in enumerate(self._layers):
            for parameter in layer.parameters:
                self._owner.setdefault(parameter.name, index)

    def run(self, batch: Any, whole: Callable[[], tuple[torch.Tensor, torch.Tensor]]) -> bool:
        """Run a step on both sides; returns, on every rank, whether all agrees.

        ``batch`` is this rank's part for ``Job.step``; ``whole`` gives rank 0 the whole step's inputs and labels.
        Raises what a step raises, and DivergenceError where the single process leaves the finite numbers.
        """
        step, reference, ledger = self.job.steps, self._reference, self.ledger
        loss = self.job.step(batch)
        parts = self._recorder.take()

        def single() -> None:
            assert reference is not None
            reference.step(*whole(), batch.first_sample, batch.share)

        self._meeting.share(single)  # all wait here for the slower side, without a timeout
        for index in range(len(self._layers)):
            collected = self._meeting.collect(parts.pop(index, []))
            if reference is not None and collected is not None:
                self._outputs(step, index, [p for own in collected for p in own])
        if reference is not None:
            values = torch.tensor([loss], dtype=torch.float64), torch.tensor([reference.loss], dtype=torch.float64)
            ledger.compare(step, "loss", "the loss", "all ranks", values, abs(reference.loss))
        self._parameters(step)
        self._statistics(step)
        agrees: bool = self._meeting.share(lambda: ledger.first is None)
        return agrees

    def _outputs(self, step: int, index: int, parts: Sequence[Part]) -> None:
        """Compare every part of a layer's output; summands of all shards are added first."""
        assert self._reference is not None
        layer, expected = self._layers[index], self._reference.outputs[index].cpu()
        scale, width = float(expected.abs().max()), self.job.chain.width(index + 1)
        covered = torch.zeros((len(expected), width), dtype=torch.bool)
        for part in _summed(parts):
            rows, (first, last) = slice(*part.samples), part.features
            covered[rows, first:last] = True
            who = f"rank {part.rank}" if part.rank >= 0 else "all shards together"
            place = f"{who}, micro-batch {part.micro_batch}, samples {part.samples[0]}..{part.samples[1] - 1}"
            values = part.value, expected[rows].narrow(part.dim, first, last - first)
            self.ledger.compare(step, "output", layer.name, place, values, scale)
        if not covered.all():
            sample, feature = (int(i) for i in (~covered).nonzero()[0])
            self.ledger.missing(step, "output", layer.name, f"sample {sample}, feature {feature} (on no rank)")

    def _parameters(self, step: int) -> None:
        """Compare gradients, the last layer's first, then the updated parameters; then begin again from them."""
        gathered: dict[int, list[Slice]] = {}
        runs = self.job.gradient_runs()
        for index in reversed(range(len(self._layers))):
            own = [self._slice(o, runs) for o in self.job.parameters.values() if self._owner[o.name] == index]
            collected = self._meeting.collect(own)
            if collected is None or self._reference is None:
                continue
            gathered[index] = [s for rank in collected for s in rank]
            self._gradients(step, index, gathered[index])
        for index, slices in sorted(gathered.items()):
            self._updated(step, index, slices)

    def _slice(self, owned: Any, runs: Mapping[nn.Parameter, tuple[int, torch.Tensor]]) -> Slice:
        begin, gradient = runs.get(owned.tensor, (None, owned.tensor.grad))
        value = owned.tensor.detach().cpu()
        gradient = None if gradient is None else gradient.cpu()
        return Slice(owned.name, self.job.rank, owned.dim, owned.start, value, gradient, begin)

    def _gradients(self, step: int, index: int, slices: Sequence[Slice]) -> None:
        assert self._reference is not None
        expected = {
            name: p.grad.cpu()
            for name, p in self._reference.parameters.items()
            if self._owner[name] == index and p.grad is not None
        }
        scale = _largest(expected.values())
        for s in slices:
            if s.gradient is not None and s.name in expected:
                values = s.gradient, _gradient(expected[s.name], s)
                self.ledger.compare(step, "gradient", self._layers[index].name, _who(s), values, scale)

    def _updated(self, step: int, index: int, slices: Sequence[Slice]) -> None:
        assert self._reference is not None
        layer = self._layers[index]
        expected = {n: p.detach().cpu() for n, p in self._reference.parameters.items() if self._owner[n] == index}
        covered = {name: torch.zeros_like(value, dtype=torch.bool) for name, value in expected.items()}
        scale = _largest(expected.values())
        for s in slices:
            values = s.value, _cut(expected[s.name], s)
            self.ledger.compare(step, "parameter", layer.name, _who(s), values, scale, self._slack)
            _cut(covered[s.name], s).fill_(True)
            if self._again:
                with torch.no_grad():
                    _cut(self._reference.parameters[s.name], s).copy_(s.value)
        for name, whole in covered.items():
            if not whole.all():
                self.ledger.missing(step, "parameter", layer.name, f"{name} (a part of it on no rank)")

    def _statistics(self, step: int) -> None:
        """Compare each rank's own running statistics with those of its micro-batches in the single process."""
        for index, layer in enumerate(self._layers):
            if not layer.batch_norm:
                continue
            own = [
                Slice(name, self.job.rank, None, 0, buffer.detach().cpu())
                for modules in self.job.blocks.values()
                for number, module in zip(range(*modules.block.layers), modules.layers, strict=True)
                if number == index
                for name, buffer in module.named_buffers()
            ]
            for s in (s for rank in self._meeting.collect(own) or () for s in rank):
                assert self._reference is not None
                expected = self._reference.replica(index, s.rank).get_buffer(s.name).cpu()
                scale = float(expected.abs().max()) if expected.numel() else 0.0
                self.ledger.compare(step, "statistics", layer.name, _who(s), (s.value, expected), scale)


def _summed(parts: Sequence[Part]) -> Iterator[Part]:
    """Iterate over the parts in the order of their samples; summands become one part, of rank -1."""
    sums: dict[tuple[int, int], Part] = {}
    for part in sorted(parts, key=lambda p: (p.samples, p.rank)):
        if not part.partial:
            yield part
        elif part.samples in sums:
            sums[part.samples].value.add_(part.value)
        else:
            sums[part.samples] = part._replace(rank=-1, value=part.value.clone())
    yield from sums.values()


def _cut(whole: torch.Tensor, part: Slice) -> torch.Tensor:
    """Return the view of a parameter that a rank's slice covers."""
    return whole if part.dim is None else whole.narrow(part.dim, part.start, part.value.shape[part.dim])


def _gradient(whole: torch.Tensor, part: Slice) -> torch.Tensor:
    """Return what a rank's gradient is to be, of that of a whole parameter."""
    if part.begin is None or part.gradient is None:
        return _cut(whole, part)
    return whole.flatten().narrow(0, part.begin, part.gradient.numel())


def _who(part: Slice) -> str:
    where = "" if part.dim is None else f" [from {part.start} in dim {part.dim}]"
    return f"rank {part.rank}, {part.name}{where}"


def _largest(values: Iterable[torch.Tensor]) -> float:
    return max((float(v.abs().max()) for v in values if v.numel()), default=0.0)
