"""Turns: rivals that take turns, so that a machine that gets slower does so for all of them."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

RESAMPLES, INTERVAL = 10_000, 0.95
"""Of the bootstrap (Efron, "Bootstrap methods", Annals of Statistics 1979)."""


@dataclass(frozen=True)
class Turn:
    """What one rival took in one round."""

    step_s: float
    """Per step, of the slowest rank."""
    cpu_s: float
    """CPU seconds per step, of all ranks."""


@dataclass(frozen=True)
class Ratio:
    """How many times the seconds of another: the median over the rounds, and its bootstrap interval."""

    median: float
    low: float
    high: float


def order(names: Sequence[str], turn: int) -> list[str]:
    """Return who comes when in a round: everybody comes first equally often."""
    first = turn % len(names)
    return [*names[first:], *names[:first]]


def compare(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """Return the ratio of two rivals' seconds, round by round."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    dice = random.Random(0)  # noqa: S311 - has to be repeatable
    medians = sorted(statistics.median(dice.choices(ratios, k=len(ratios))) for _ in range(RESAMPLES))
    edge = round((1 - INTERVAL) / 2 * RESAMPLES)
    return Ratio(statistics.median(ratios), medians[edge], medians[-1 - edge])
