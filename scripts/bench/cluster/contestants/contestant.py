"""What a contestant is: one rank's part of a training."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch

from scripts.bench.cluster.setting import Setting

Options = dict[str, Any]
"""What is tuned of a contestant: keyword arguments of its class, as JSON has them."""


class Contestant(ABC):
    """One rank's part of a training; its class is called with the work, and with its options by name."""

    lossy: ClassVar[bool] = False
    """Whether its gradients are rounded on the way, so that its losses need not agree."""
    alone: ClassVar[bool] = False
    """Whether it runs in one process, whatever the number of ranks."""

    @classmethod
    @abstractmethod
    def grid(cls, setting: Setting) -> list[Options]:
        """Return the options to try in a setting, the most promising ones first."""

    @classmethod
    def norm_samples(cls, setting: Setting, options: Options) -> int | None:
        """Return over how many neighbouring samples a batch norm takes its statistics; None: not equally many."""
        return options.get("micro_batch") or setting.images_per_rank

    @abstractmethod
    def step(self, images: torch.Tensor, labels: torch.Tensor) -> float:
        """Train on all samples of a step, of which this takes its own.

        Returns this rank's share of the mean loss over all samples: the shares of all ranks add up to it.
        """


def own_micro_batches(setting: Setting) -> list[int | None]:
    """Return micro-batches that divide a rank's samples: all of them at once, a half and a quarter."""
    return [None, *(setting.images_per_rank // n for n in (2, 4) if setting.images_per_rank % n == 0)]


def product(**choices: list[Any]) -> list[Options]:
    """Return every combination of some choices; the last choice varies fastest."""
    return [dict(zip(choices, each, strict=True)) for each in itertools.product(*choices.values())]
