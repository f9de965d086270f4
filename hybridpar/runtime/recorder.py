"""Records what the layers of one rank give in a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from hybridpar.planning.layout import Interval
from hybridpar.planning.program import Action, Program
from hybridpar.runtime.job import Job


class Part(NamedTuple):
    """A part of a layer's output."""

    rank: int
    """Of all ranks."""
    micro_batch: int
    samples: Interval
    """Within the step."""
    features: Interval
    """Of dim ``dim``."""
    partial: bool
    """The value is a summand: the parts of all shards have to be added."""
    value: torch.Tensor
    """(samples, features, ...) or (samples, ..., features), on the CPU."""
    dim: int


class Recorder:
    """Copies the output of every layer of a job while its steps run; takes the job's observer.

    Layers that run again for the backward of a recomputed block are recorded once.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._seen: list[tuple[int, torch.Tensor]] = []
        self._parts: dict[int, list[Part]] = {}
        for modules in job.blocks.values():
            for index, layer in zip(range(*modules.block.layers), modules.layers, strict=True):
                layer.register_forward_hook(self._hook(index))
        job.observe(self._observe)

    def take(self) -> dict[int, list[Part]]:
        """Return the parts by layer, in the order in which they were made, and forget them."""
        parts, self._parts = self._parts, {}
        return parts

    def _hook(self, index: int) -> Callable[[nn.Module, object, torch.Tensor], None]:
        def seen(_layer: nn.Module, _inputs: object, output: torch.Tensor) -> None:
            # A copy: shards sum a partial output in place.
            self._seen.append((index, output.detach().to("cpu", copy=True)))

        return seen

    def _observe(self, program: Program, action: Action, _start_s: float, _end_s: float) -> None:
        seen, self._seen = self._seen, []
        if action.kind != "forward":
            return
        assert action.block is not None
        assert action.micro_batch is not None
        job, block = self._job, program.blocks[action.block]
        samples = program.numbers(action.block, action.micro_batch, job.place)
        for index, value in seen:
            features, partial = (0, job.chain.width(index + 1)), False
            if block.spans:
                shard = program.positions[block.position].ranks.index(job.place)
                span = block.spans[shard][index - block.layers[0]]
                features, partial = span.outputs, span.mode == "row"
            part = Part(
                job.rank, action.micro_batch, samples, features, partial, value, 1 + job.chain.axes[index + 1]
            )
            self._parts.setdefault(index, []).append(part)
