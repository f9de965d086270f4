"""One process that trains on all samples: what the work itself takes, without any communication."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F

from scripts.bench.cluster.contestants.contestant import Contestant, Options, product
from scripts.bench.cluster.setting import Setting
from scripts.bench.work import Work


class Floor(Contestant):
    """A plain loop over micro-batches that add up their gradients.

    Args:
        work: what is trained.
        micro_batch: samples of a forward; None: all of a step's.
        channels_last: whether images and weights lie so in memory.
        update: how the optimizer goes through the parameters.

    """

    alone: ClassVar[bool] = True

    def __init__(
        self, work: Work, micro_batch: int | None = None, *, channels_last: bool = False, update: str = "fused"
    ) -> None:
        self._model = work.whole()
        if channels_last:
            self._model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._micro_batch = micro_batch or work.global_batch
        self._optimizer = work.sgd(self._model.parameters(), update)

    @classmethod
    def grid(cls, setting: Setting) -> list[Options]:
        """Return micro-batches, memory formats and ways to update."""
        sizes = [n for n in (16, 8, 32, 64) if n <= setting.global_batch and setting.global_batch % n == 0]
        return product(micro_batch=sizes or [None], channels_last=[False, True], update=["fused", "foreach"])

    @classmethod
    def norm_samples(cls, setting: Setting, options: Options) -> int | None:
        """Return the micro-batch."""
        return options.get("micro_batch") or setting.global_batch

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> float:
        """Train."""
        self._optimizer.zero_grad()
        total = 0.0
        for x, y in zip(images.split(self._micro_batch), labels.split(self._micro_batch), strict=True):
            loss = F.cross_entropy(self._model(x), y, reduction="sum") / len(labels)
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
        self._optimizer.step()
        return total
