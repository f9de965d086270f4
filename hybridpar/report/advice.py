"""Advice on a run as a report shows it: what to change, why, and what the planner predicts of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from hybridpar.report.findings import Finding
from hybridpar.report.text import in_bytes, in_time

Kind = Literal["micro_batch", "input", "communication", "bubble", "throttled", "memory"]


@dataclass(frozen=True)
class Forecast:
    """What the planner predicts of the run as it is, and of what is advised."""

    now_s: float
    """Step time."""
    then_s: float
    now_batch: int
    """Samples per step."""
    then_batch: int
    now_bytes: int
    """Memory of the fullest rank."""
    then_bytes: int
    source: Literal["measured", "estimated"]
    """Of the profile behind both."""

    @property
    def gain(self) -> float:
        """By how much the throughput grows: 0.25 is a quarter more samples per second."""
        return (self.then_batch / self.then_s) / (self.now_batch / self.now_s) - 1


@dataclass(frozen=True)
class Advice:
    """One thing to change, with what speaks for it."""

    kind: Kind
    stage: str | None
    """The stage it is about; None: all of them."""
    what: str
    """What to do, in a sentence."""
    evidence: tuple[str, ...]
    """What was measured, each with its figures and where they come from."""
    overrides: tuple[str, ...]
    """To be typed behind the run's own; none where no setting helps."""
    effect: Forecast


@dataclass(frozen=True)
class Advised:
    """All that there is to say of one run."""

    advices: tuple[Advice, ...] = ()
    """The largest predicted gain first."""
    remarks: tuple[str, ...] = ()
    """What was looked at and is no fault, or has no remedy that the planner knows."""
    lacking: tuple[str, ...] = ()
    """Evidence that is missing, and how to come by it; nothing is said of what it would decide."""

    @staticmethod
    def merged(parts: Iterable[Advised]) -> Advised:
        """Return everything once; of advices with the same overrides one, with the evidence of all."""
        known = list(parts)
        by_overrides: dict[tuple[str, ...], Advice] = {}
        for advice in (a for part in known for a in part.advices):
            key = advice.overrides or (advice.what,)
            first = by_overrides.get(key)
            by_overrides[key] = (
                advice if first is None else replace(first, evidence=_once(first.evidence + advice.evidence))
            )
        return Advised(
            tuple(sorted(by_overrides.values(), key=lambda a: -a.effect.gain)),
            _once(text for part in known for text in part.remarks),
            _once(text for part in known for text in part.lacking),
        )


def _once(texts: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(texts))


def advice_finding(advised: Advised) -> Finding:
    """Return the advice as a table that the terminal and the page show alike."""
    rows = [row for number, advice in enumerate(advised.advices, 1) for row in _rows(number, advice)]
    notes = (() if rows else ("nothing that the planner predicts a gain for",)) + advised.remarks
    missing = tuple(f"not judged: {text}" for text in advised.lacking)
    return Finding("advice", ("", ""), tuple(rows), (*notes, *missing), texts=2)


def _rows(number: int, advice: Advice) -> Iterator[tuple[str, str]]:
    yield f"{number}.", advice.what
    if advice.overrides:
        yield "type", " ".join(advice.overrides)
    yield "predicted", effect_text(advice.effect)
    yield from (("since" if i == 0 else "", text) for i, text in enumerate(advice.evidence))


def effect_text(effect: Forecast) -> str:
    """Write a forecast: ``step 120 ms → 90 ms (+33% samples/s), 1.2 GiB → 1.4 GiB, estimated profile``."""
    batch = "" if effect.now_batch == effect.then_batch else f" of {effect.then_batch} samples"
    return (
        f"step {in_time(effect.now_s)} → {in_time(effect.then_s)}{batch} ({_gain(effect.gain)} samples/s), "
        f"{in_bytes(effect.now_bytes)} → {in_bytes(effect.then_bytes)}, {effect.source} profile"
    )


def _gain(gain: float) -> str:
    return f"{gain:+.0%}" if gain < 1 else f"{1 + gain:.1f}x the"
