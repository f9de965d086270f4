"""Predictions against measurements: the rows of the table, and whether the requirement holds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scripts.bench.accuracy.draw import CLOSE
from scripts.bench.accuracy.measure import Measured
from scripts.bench.accuracy.predict import Predicted, Predictions

LEAST_PLANS, LEAST_CLOSE = 12, 5
MEDIAN_ERROR, WORST_ERROR, RESIDENT_ERROR, REGRET = 0.05, 0.15, 0.10, 0.05
LEAST_CORRELATION = 0.95
LARGE_BYTES = 500e6
"""Resident memory is compared for ranks above this."""


@dataclass(frozen=True)
class Row:
    """One plan."""

    predicted: Predicted
    measured: tuple[Measured, ...]
    profile_beat_s: float | None = None
    """Of the beat while the profile was taken."""

    @property
    def failure(self) -> str | None:
        """The error of a measurement that failed."""
        return next((m.error for m in self.measured if m.error), None)

    @property
    def step_s(self) -> float | None:
        """Median over the timed steps of all rounds; None where one failed."""
        steps = [s for m in self.measured for s in m.steps_s]
        return None if self.failure or not steps else statistics.median(steps)

    @property
    def error(self) -> float | None:
        """Of the step time: (predicted - measured) / measured."""
        return None if self.step_s is None else self.predicted.step_s / self.step_s - 1

    @property
    def speed(self) -> float | None:
        """How fast the machine was, relative to when the profile was taken; None where the beat is unknown."""
        beats = [m.beat_s for m in self.measured if m.beat_s]
        return self.profile_beat_s / statistics.median(beats) if self.profile_beat_s and beats else None

    @property
    def even_error(self) -> float | None:
        """Of the step time, had the machine been as fast as during the profile in every round; None if unknown."""
        if self.failure or not self.profile_beat_s:
            return None
        steps = [s * self.profile_beat_s / m.beat_s for m in self.measured for s in m.steps_s if m.beat_s]
        return self.predicted.step_s / statistics.median(steps) - 1 if steps else None

    @property
    def resident_bytes(self) -> tuple[int, ...]:
        """Measured peak per rank, the greatest of all rounds."""
        return tuple(max(ranks) for ranks in zip(*self._ranks("resident_bytes"), strict=True))

    @property
    def resident_error(self) -> float | None:
        """The error that is largest in size among the ranks above 500 MB; None where there are none."""
        pairs = zip(self.predicted.resident_bytes, self.resident_bytes, strict=False)
        errors = [p / m - 1 for p, m in pairs if max(p, m) > LARGE_BYTES]
        return max(errors, key=abs, default=None)

    @property
    def live_error_bytes(self) -> int | None:
        """Predicted less measured peak of live tensors, of the rank where it is largest in size."""
        pairs = [
            (p, m)
            for ranks in self._ranks("live_bytes")
            for p, m in zip(self.predicted.live_bytes, ranks, strict=True)
        ]
        return max((p - m for p, m in pairs), key=abs, default=None)

    @property
    def foreign_cores(self) -> float:
        """The most that other processes took of the machine during a round."""
        return max((m.foreign_cores or 0.0 for m in self.measured), default=0.0)

    def _ranks(self, field: str) -> list[tuple[int, ...]]:
        return [tuple(getattr(r, field) for r in m.ranks) for m in self.measured if m.ranks]


@dataclass(frozen=True)
class Verdict:
    """One part of the requirement."""

    what: str
    wanted: str
    found: str
    holds: bool


def rows(
    predictions: Predictions, results: dict[str, list[Measured]], profile_beat_s: float | None = None
) -> list[Row]:
    """Return a row per predicted plan, fastest prediction first; none is left out."""
    ordered = sorted(predictions.plans, key=lambda p: p.step_s)
    return [Row(p, tuple(results[p.name]), profile_beat_s) for p in ordered]


def drift(table: Sequence[Row]) -> str | None:
    """Say how the machine's speed varied, and what the errors would be without; None where the beat is unknown."""
    speeds = [r.speed for r in table if r.speed is not None]
    errors = [abs(r.even_error) for r in table if r.even_error is not None]
    if not speeds or not errors:
        return None
    return (
        f"{min(speeds):.2f} to {max(speeds):.2f} times what it was during the profile; with that divided out the "
        f"median error of the step time is {statistics.median(errors):.1%}, the worst {max(errors):.1%}"
    )


def verdicts(table: Sequence[Row], best_s: float) -> list[Verdict]:
    """Return what of the requirement holds. A failed plan makes every figure of the step time fail."""
    failed = [r.predicted.name for r in table if r.step_s is None]
    close = sum(r.predicted.step_s <= best_s * (1 + CLOSE) for r in table)
    result = [
        Verdict("plans", f"at least {LEAST_PLANS}", str(len(table)), len(table) >= LEAST_PLANS),
        Verdict(
            "of them within 15 % of the best predicted",
            f"at least {LEAST_CLOSE}",
            str(close),
            close >= LEAST_CLOSE,
        ),
        Verdict("failed", "none", ", ".join(failed) or "none", not failed),
    ]
    return result + _times([r for r in table if r.step_s is not None], whole=not failed) + _memory(table)


def _times(able: list[Row], *, whole: bool) -> list[Verdict]:
    """Return what holds of the step times of the plans that ran; nothing does unless they are the ``whole``."""
    errors = [abs(r.error or 0.0) for r in able]
    median, worst = (statistics.median(errors), max(errors)) if able else (None, None)
    correlation = spearman([r.predicted.step_s for r in able], [r.step_s or 0.0 for r in able])
    chosen = next((r.step_s for r in able if r.predicted.kind == "choice"), None)
    slower = None if chosen is None else chosen / min(r.step_s or chosen for r in able) - 1
    found = "unknown" if correlation is None else f"{correlation:.3f}"
    ordered = correlation is not None and correlation >= LEAST_CORRELATION
    return [
        _at_most("median error of the step time", MEDIAN_ERROR, median, whole=whole),
        _at_most("worst error of the step time", WORST_ERROR, worst, whole=whole),
        Verdict("rank correlation", f"at least {LEAST_CORRELATION}", found, ordered and whole),
        _at_most("the planner's choice slower than the best measured", REGRET, slower, whole=whole),
    ]


def _at_most(what: str, limit: float, found: float | None, *, whole: bool) -> Verdict:
    said = "unknown" if found is None else f"{found:.1%}"
    return Verdict(what, f"at most {limit:.0%}", said, whole and found is not None and found <= limit)


def _memory(table: Sequence[Row]) -> list[Verdict]:
    live = [r.live_error_bytes for r in table if r.live_error_bytes is not None]
    resident = [r.resident_error for r in table if r.resident_error is not None]
    result = []
    if live:
        most = max(live, key=abs)
        result.append(Verdict("live tensor bytes", "exact", f"{most:+,} bytes", most == 0))
    if resident:
        worst = max(resident, key=abs)
        wanted = f"within {RESIDENT_ERROR:.0%}"
        what = "resident memory of ranks above 500 MB"
        result.append(Verdict(what, wanted, f"{worst:+.1%}", abs(worst) <= RESIDENT_ERROR))
    return result


def spearman(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Return Spearman's rank correlation: Pearson's of the ranks, equal values sharing their mean rank.

    None where it is not defined: fewer than two values, or all of one list equal.
    """
    first, second = _ranks(a), _ranks(b)
    if len(set(first)) < 2 or len(set(second)) < 2:
        return None
    return statistics.correlation(first, second)


def _ranks(values: Sequence[float]) -> list[float]:
    ordered = sorted(values)
    return [ordered.index(v) + (ordered.count(v) - 1) / 2 for v in values]
