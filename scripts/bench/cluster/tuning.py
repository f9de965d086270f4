"""Tuning: every contestant's options, tried on the hosts within one time budget that is the same for all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from scripts.bench.cluster.cell import Conditions, Round
from scripts.bench.cluster.contestants.contestant import Options


@dataclass(frozen=True)
class Try:
    """One launch with some options."""

    options: Options
    seconds: float
    """Of the whole launch."""
    cost_s: float | None
    """Median seconds of a step; of who runs alone its CPU seconds. None: it failed."""
    error: str | None = None


@dataclass(frozen=True)
class Tuning:
    """All tries of a contestant."""

    contestant: str
    conditions: Conditions
    budget_s: float
    grid: tuple[Options, ...]
    tries: tuple[Try, ...]

    @property
    def best(self) -> Options | None:
        """The fastest options; the only ones of a grid untried; None where every try failed."""
        if len(self.grid) == 1 and not self.tries:
            return self.grid[0]
        able = [t for t in self.tries if t.cost_s is not None]
        return min(able, key=lambda t: t.cost_s or 0.0).options if able else None

    @property
    def error(self) -> str | None:
        """What the first try failed with, where all did."""
        return None if self.best is not None else self.tries[0].error


def tune(
    contestant: str,
    grid: Sequence[Options],
    budget_s: float,
    conditions: Conditions,
    launch: Callable[[Options, int], Try],
) -> Tuning:
    """Try options until the budget is used up; a try that was begun ends. A grid of one is not tried.

    The first of the grid comes first, then always what differs least from the best so far, earlier ones first:
    a search along the axes, which finds good options in a fraction of the grid.
    """
    tries: list[Try] = []
    left = list(grid) if len(grid) > 1 else []
    began_s = time.monotonic()
    while left and (not tries or time.monotonic() - began_s < budget_s):
        best = Tuning(contestant, conditions, budget_s, tuple(grid), tuple(tries)).best if tries else None
        options = min(left, key=lambda o: _differences(o, best or grid[0]))
        left.remove(options)
        tries.append(launch(options, len(tries)))
    return Tuning(contestant, conditions, budget_s, tuple(grid), tuple(tries))


def tried(options: Options, taken: Round, *, alone: bool) -> Try:
    """Return a launch as a try."""
    if taken.error is not None:
        return Try(options, taken.seconds, None, taken.error)
    return Try(options, taken.seconds, statistics.median(taken.cpu_s if alone else taken.steps_s))


def _differences(a: Options, b: Options) -> int:
    return sum(a.get(key) != b.get(key) for key in {*a, *b})
