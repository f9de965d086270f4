"""Whether a contestant does the same work as everybody: its losses beside those of one process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from scripts.bench.cluster.contestants import find
from scripts.bench.cluster.task import Task

STEPS = 5
AGREEMENT = 1e-5
"""By what share the losses of the first steps may differ: roundings of float32, summed in another order."""


def reference(task: Task, out: str) -> Task | None:
    """Return the task of one process whose losses those of ``task`` have to be.

    Batch norms take their statistics over the samples of one micro-batch of a rank, in everybody's training as it
    is: so the one process goes through the same samples in micro-batches of that size. None: the contestant's
    batch norms see samples in numbers that differ, and no loop over micro-batches does what it does.
    """
    samples = find(task.contestant).norm_samples(task.setting, task.options)
    if samples is None:
        return None
    return replace(task, contestant="floor", options={"micro_batch": samples}, losses=STEPS, steps=0, out=out)


def difference(losses: Sequence[float], single: Sequence[float]) -> float:
    """Return the largest relative difference between the losses and those of a single process."""
    return max(abs(a - b) / abs(b) for a, b in zip(losses, single, strict=True))
