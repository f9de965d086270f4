"""A training's folder as a report reads it: what was planned, what was measured."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from hybridpar.errors import HybridparError, RecordError
from hybridpar.planning.plan import Plan
from hybridpar.report import timing
from hybridpar.report.basis import Basis
from hybridpar.report.summary import Summary
from hybridpar.report.timing import RankTiming
from hybridpar.schema import read_json

WARM_UP_STEPS = 5
"""Left out of the measured step time, or a fifth of the steps where that is less; as in the run's own summary."""


@dataclass(frozen=True)
class Step:
    """A line of ``metrics.jsonl``."""

    step: int
    loss: float
    """Not a number where it was not finite."""
    samples: int
    step_s: float


@dataclass(frozen=True)
class Evaluated:
    """A line of ``evaluations.jsonl``."""

    step: int
    """So many steps were done."""
    loss: float
    top1: float


@dataclass(frozen=True)
class Run:
    """What a run's folder holds."""

    folder: Path
    plan: Plan
    basis: Basis | None
    """None where the run kept none: nothing can be simulated then."""
    steps: tuple[Step, ...]
    evaluations: tuple[Evaluated, ...]
    summary: Summary | None
    """None as long as the run has not ended."""
    timings: tuple[RankTiming, ...]
    """By rank; none where no timeline was recorded under the plan."""

    @property
    def name(self) -> str:
        """The folder's."""
        return self.folder.resolve().name

    @property
    def step_s(self) -> float | None:
        """Median of the full steps after the warm-up."""
        full = max((s.samples for s in self.steps), default=0)
        times = [s.step_s for s in self.steps if s.samples == full]
        return median(times[min(WARM_UP_STEPS, len(times) // 5) :]) if times else None

    @staticmethod
    def load(folder: Path) -> Run:
        """Read a run's folder. Raises RecordError where it is none, or holds a malformed file, which is named."""
        if not folder.is_dir():
            raise RecordError(f"there is no folder {folder}; give a run's, as the training named it at its end")
        if not (folder / "plan.json").exists() or not (folder / "metrics.jsonl").exists():
            raise RecordError(
                f"{folder} is no run's folder: it lacks plan.json or metrics.jsonl, which a training writes as it "
                "begins"
            )
        try:
            return _read(folder)
        except HybridparError as e:
            raise RecordError(f"{folder}: {e}") from e


def _read(folder: Path) -> Run:
    basis = Basis.load(folder)
    path = folder / "plan.json"
    plan = read_json(Plan, path, RecordError) if basis is None else Plan.load(path, basis.chain)
    ended = (folder / "summary.json").exists()
    return Run(
        folder,
        plan,
        basis,
        tuple(_step(data) for data in _lines(folder / "metrics.jsonl")),
        tuple(_evaluated(data) for data in _lines(folder / "evaluations.jsonl")),
        Summary.load(folder / "summary.json") if ended else None,
        timing.load(folder, plan.world, plan.fingerprint),
    )


def _lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a file; the last one may be cut off, as the run may be writing it."""
    result: list[dict[str, Any]] = []
    texts = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for number, text in enumerate(texts, 1):
        try:
            result.append({**json.loads(text), "where": f"{path.name} line {number}"})
        except (ValueError, TypeError) as e:
            if number < len(texts):
                raise RecordError(f"{path.name} line {number} is not a JSON object: {e}") from e
    return result


def _step(data: dict[str, Any]) -> Step:
    return Step(
        int(_number(data, "step")),
        _number(data, "loss", math.nan),
        int(_number(data, "samples")),
        _number(data, "step_s"),
    )


def _evaluated(data: dict[str, Any]) -> Evaluated:
    return Evaluated(int(_number(data, "step")), _number(data, "loss", math.nan), _number(data, "top1"))


def _number(data: dict[str, Any], name: str, unknown: float | None = None) -> float:
    value = data.get(name, "missing")
    if value is None and unknown is not None:
        return unknown
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RecordError(f"{data['where']}: {name}: expected a number, got {value!r}")
    return value
