"""hybridpar, by its own API, under a plan that was made before."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from hybridpar.api import process
from hybridpar.planning.blocks import positions
from hybridpar.planning.layout import chunks
from hybridpar.planning.plan import Plan, Precision
from hybridpar.runtime.job import Job
from scripts.bench.cluster.contestants.contestant import Contestant, Options, product
from scripts.bench.cluster.setting import Setting
from scripts.bench.cluster.training import work_of
from scripts.bench.work import Work

_PRECISIONS: dict[torch.dtype, Precision] = {torch.float32: "float32", torch.float64: "float64"}


class Hybridpar(Contestant):
    """hybridpar.

    Args:
        work: what is trained.
        plan: file of the plan, which was made for the same memory format.
        channels_last: whether images and weights lie so in memory.
        update: how the optimizer goes through the parameters.

    """

    def __init__(self, work: Work, plan: str, *, channels_last: bool = False, update: str = "fused") -> None:
        if channels_last:
            work = work.channels_last()
        place, loaded = process(), Plan.load(Path(plan), work.traced.chain)
        loaded = replace(loaded, precision=_PRECISIONS[work.dtype])
        self._job = Job(
            loaded,
            work.traced,
            work.source,
            partial(work.sgd, update=update),
            place.connect(loaded),
            rank=place.rank,
            seed=work.seed,
        )
        for block in self._job.blocks.values():
            work.silence(block)

    @classmethod
    def grid(cls, setting: Setting) -> list[Options]:
        """Return memory formats and ways to update; whoever plans adds the plan for the format."""
        del setting
        return product(channels_last=[False, True], update=["fused", "foreach"])

    @classmethod
    def norm_samples(cls, setting: Setting, options: Options) -> int | None:
        """Return how many samples a rank with batch norms has at a time, if that is one number under the plan."""
        work = work_of(setting)
        chain = (work.channels_last() if options.get("channels_last") else work).traced.chain
        plan = Plan.load(Path(options["plan"]), chain)
        normed = [p for p in positions(plan) if any(chain.layers[i].batch_norm for i in range(*p.layers))]
        sizes = {
            stop - start
            for position in normed
            for first, last in plan.replica_samples(plan.global_batch)
            for chunk in chunks(last - first, position.micro_batch, position.weights)
            for start, stop in chunk
        }
        if not normed:
            return setting.global_batch
        return sizes.pop() if len(sizes) == 1 else None

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> float:
        """Train; hybridpar tells every rank the mean loss."""
        return self._job.step((images, labels)) / self._job.plan.world
