"""Whether a stage's devices were half empty while they computed, and whether that is a fault."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from hybridpar.report.attribution import StageAttribution
from hybridpar.report.device_use import FIGURES
from hybridpar.report.kernels import together

LOW, BUSY = 0.5, 0.5
"""Occupancy below which a device counts as half empty; activity of its tensor cores or memory from which on it is
busy nevertheless: few warps are enough for that."""


@dataclass(frozen=True)
class HalfEmpty:
    """A stage whose occupancy is low, or unknown."""

    verdict: Literal["fault", "no fault", "unknown"]
    text: str


def half_empty(stages: Sequence[StageAttribution]) -> HalfEmpty | None:
    """Judge the positions and plan replicas of a stage; None where their occupancy is high."""
    occupancy, tensor, dram = (_mean(stages, name) for name in FIGURES)
    sources = dict.fromkeys(s.use.sources["occupancy"] for s in stages if "occupancy" in s.use.sources)
    traced = together(s.kernels for s in stages if s.kernels is not None)
    if occupancy is None:
        occupancy, sources = traced.occupancy, {"kineto": None}
    if occupancy is None:
        return HalfEmpty(
            "unknown", "occupancy is in no sample that can be told apart (docs/report.md, attribution)"
        )
    if occupancy >= LOW:
        return None
    seen = f"occupancy was {occupancy:.0%} while it computed ({'; '.join(sources)})"
    if traced.below_half is not None:
        seen = f"{seen} and below 50% for {traced.below_half:.0%} of the time (kineto)"
    for name, activity in (("tensor cores", tensor), ("memory", dram)):
        if activity is not None and activity >= BUSY:
            return HalfEmpty("no fault", f"{seen}, which is no fault with its {name} {activity:.0%} active")
    if tensor is None or dram is None:
        return HalfEmpty("unknown", f"{seen}, but not how active tensor cores and memory were")
    return HalfEmpty("fault", f"{seen}, tensor cores {tensor:.0%} and memory {dram:.0%} active")


def _mean(stages: Sequence[StageAttribution], name: str) -> float | None:
    values = [value for s in stages if (value := getattr(s.use, name)) is not None]
    return sum(values) / len(values) if values else None
