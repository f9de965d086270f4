"""The five axes on which data and model parallelism differ, in figures of the simulated step.

Synchronisation, use of the devices, load balance, stragglers and input: the comparison of J. Geng's talk on
large-scale distributed machine learning (2019), which finds that neither way wins on all of them.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from hybridpar.model.chain import Chain
from hybridpar.planning.compression import SUMS
from hybridpar.planning.layout import length
from hybridpar.planning.program import Content, Program
from hybridpar.planning.timesplit import TimeSplit
from hybridpar.planning.trial import Trials

SLOWER = 0.9
"""Speed of the one slow rank: ten percent below the others."""
SLOWED_KINDS = 4
"""Kinds of ranks that are tried as the slow one, the busiest first: a long pipeline has one kind per rank."""
SYNCHRONISED: frozenset[Content] = frozenset({*SUMS, "zero"})
"""Contents that keep replicas of parameters equal."""
EXCHANGED: frozenset[Content] = frozenset({"activation", "gradient", "sum", "statistics", "moments"})
"""Contents that carry samples' values, or figures of them, between stages, shards and replicas."""


@dataclass(frozen=True)
class Axes:
    """A plan on the five axes."""

    synchronised_bytes: float
    """Bytes of gradient reductions (and of parameter gathers, with a sharded optimizer) that the rank with the
    most of them sends in one step."""
    exchanged_bytes: float
    """Likewise of activations, their gradients, the sums inside a tail and the figures of batch norms."""
    busy_share: float
    """Busy device time over ranks times period, 0..1."""
    balance: float
    """Mean over maximum of the ranks' busy time, 0..1; 1: all ranks have equally much to do."""
    straggler: float
    """Relative increase of the step time when one rank, the worst choice, is 10 % slower: 0.1 / 0.9 = 11 % where
    everything waits for it, 0 where it has slack."""
    input_samples_per_s: float
    """Samples per second that the rank which reads most has to be fed with."""
    input_bytes_per_s: float
    """The same in bytes of decoded input."""
    readers: int
    """Ranks that read input."""


def axes(trials: Trials, program: Program, split: TimeSplit) -> Axes:
    """Put a plan on the five axes: one more simulation per distinguishable rank, for the slow one."""
    busy = [split.busy_s(rank) for rank in range(len(program.actions))]
    read = [sum(length(i) for i in program.reads(rank)) for rank in range(len(program.actions))]
    rate = max(read) / split.period_s if split.period_s else 0.0
    return Axes(
        synchronised_bytes=_busiest_sender(program, SYNCHRONISED),
        exchanged_bytes=_busiest_sender(program, EXCHANGED),
        busy_share=sum(busy) / (len(busy) * split.period_s) if split.period_s else 0.0,
        balance=sum(busy) / len(busy) / max(busy) if max(busy) else 1.0,
        straggler=_straggler(trials, program, split),
        input_samples_per_s=rate,
        input_bytes_per_s=rate * input_bytes(program.chain, program.plan.itemsize),
        readers=sum(count > 0 for count in read) * program.plan.replicas,
    )


def input_bytes(chain: Chain, itemsize: int) -> int:
    """Bytes of one decoded input sample: integers (token ids) have 8 bytes each."""
    return math.prod(chain.in_shape) * (8 if chain.input_dtype == "int" else itemsize)


def _busiest_sender(program: Program, contents: Iterable[Content]) -> float:
    """Return the bytes of some contents that the rank with the most of them sends per step.

    Of a message its sender sends all. Of a collective over n ranks each sends what a ring takes (Patarasu and
    Yuan, 2009): ``2 (n-1)/n S`` for a sum, half of it where each gets a part, ``(n-1) S`` where
    each of n gives S bytes to all.
    """
    sent: dict[int, float] = defaultdict(float)
    for operation in program.operations:
        if operation.content not in contents:
            continue
        n = len(operation.ranks) * (program.plan.replicas if operation.across else 1)
        shares = {"send": 1.0, "all_gather": n - 1.0, "sharded_update": n - 1.0, "reduce_scatter": (n - 1) / n}
        share = shares.get(operation.kind, 2 * (n - 1) / n)
        for rank in operation.ranks[:1] if operation.kind == "send" else operation.ranks:
            sent[rank] += operation.bytes * share
    return max(sent.values(), default=0.0)


def _straggler(trials: Trials, program: Program, split: TimeSplit) -> float:
    """Return the largest relative increase over one rank of every kind, of those kinds that are busiest.

    Ranks are of a kind when they hold the same places and are busy for equally long.
    """
    if not split.period_s:
        return 0.0
    kinds: dict[object, int] = {}
    for rank in range(len(program.actions)):
        held = tuple(p.index for p in program.positions if rank in p.ranks)
        kinds.setdefault((held, f"{split.busy_s(rank):.6g}"), rank)
    tried = sorted(kinds.values(), key=split.busy_s, reverse=True)[:SLOWED_KINDS]
    slowest_s = max(trials.step_with_slow_rank_s(program, rank, SLOWER) for rank in tried)
    return max(slowest_s / split.period_s - 1.0, 0.0)
