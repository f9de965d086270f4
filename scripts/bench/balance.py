"""Runs of neighbouring layers with about equal work."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

import torch

from scripts.bench.work import Work

TIMED = 3
"""The fastest of so many forwards and backwards counts."""


def balanced(costs: Sequence[float], parts: int) -> list[tuple[int, int]]:
    """Cut layers of given costs into ``parts`` runs, of which the most expensive one is as cheap as can be.

    The costs of the runs that end at a layer are found from those with one run less (Bellman 1957).
    Returns half-open intervals; raises ValueError where there are fewer layers than parts.
    """
    count = len(costs)
    if count < parts:
        raise ValueError(f"{count} layers cannot be cut into {parts} parts")
    before = [0.0, *accumulate(costs)]
    best = {end: (before[end], (0,)) for end in range(1, count + 1)}
    for part in range(2, parts + 1):
        best = {
            end: min(
                (max(worst, before[end] - before[cut]), (*cuts, cut))
                for cut, (worst, cuts) in best.items()
                if cut < end
            )
            for end in range(part, count + 1)
        }
    return list(pairwise([*best[count][1], count]))


def counted(work: Work) -> list[float]:
    """Return the operations of a sample in every layer."""
    return [float(layer.flops_per_sample) for layer in work.traced.chain.layers]


def measured(work: Work, micro_batch: int, micro_batches: int) -> list[float]:
    """Return the seconds of a step in every layer on this rank: forwards and backwards, and its update."""
    return [_layer_s(work, index, micro_batch, micro_batches) for index in range(len(work.traced.modules))]


def _layer_s(work: Work, index: int, micro_batch: int, micro_batches: int) -> float:
    layer, own = work.part(index, index + 1), work.traced.chain.layers[index]
    x = torch.randn(micro_batch, *own.in_shape, dtype=work.dtype, requires_grad=index > 0)
    parameters = list(layer.parameters())

    def passes() -> None:
        y = layer(x)
        if y.requires_grad:
            y.backward(torch.ones_like(y))

    total_s = micro_batches * _fastest_s(passes)
    return total_s + (_fastest_s(work.sgd(parameters).step) if parameters else 0.0)


def _fastest_s(run: Callable[[], object]) -> float:
    """Return the CPU seconds of the fastest of some runs, after one that warms up."""
    run()
    taken = []
    for _ in range(TIMED):
        began_s = time.process_time()
        run()
        taken.append(time.process_time() - began_s)
    return min(taken)
