"""A training's folder as a report reads it: what was planned, what was measured."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybridpar.errors import HybridparError, RecordError
from hybridpar.planning.plan import Plan
from hybridpar.report import kernels, timing
from hybridpar.report.basis import Basis
from hybridpar.report.history import Evaluated, Evaluations, Step, Steps
from hybridpar.report.kernels import RankKernels
from hybridpar.report.recording import Recording
from hybridpar.report.summary import Summary
from hybridpar.report.timing import RankTiming
from hybridpar.schema import read_json


@dataclass(frozen=True)
class Run:
    """What a run's folder holds."""

    folder: Path
    plan: Plan
    basis: Basis | None
    """None where the run kept none: nothing can be simulated then."""
    steps: Steps
    evaluations: Evaluations
    summary: Summary | None
    """None as long as the run has not ended."""
    timings: tuple[RankTiming, ...]
    """By rank; none where no timeline was recorded under the plan."""
    recording: Recording | None = None
    """None where the monitor recorded no sample."""
    traces: tuple[RankKernels, ...] = ()
    """Of the ranks that have one under the plan."""

    @property
    def name(self) -> str:
        """The folder's."""
        return self.folder.resolve().name

    @property
    def step_s(self) -> float | None:
        """Median of the full steps after the warm-up."""
        return self.steps.step_s

    @staticmethod
    def load(folder: Path) -> Run:
        """Read a run's folder. Raises RecordError where it is none, or holds a malformed file, which is named."""
        check_folder(folder)
        try:
            return _read(folder)
        except HybridparError as e:
            raise RecordError(f"{folder}: {e}") from e


def check_folder(folder: Path) -> None:
    """Raise RecordError where a folder is not there, or no run's."""
    if not folder.is_dir():
        raise RecordError(f"there is no folder {folder}; give a run's, as the training named it at its end")
    if not (folder / "plan.json").exists() or not (folder / "metrics.jsonl").exists():
        raise RecordError(
            f"{folder} is no run's folder: it lacks plan.json or metrics.jsonl, which a training writes as it "
            "begins"
        )


def _read(folder: Path) -> Run:
    basis = Basis.load(folder)
    path = folder / "plan.json"
    plan = read_json(Plan, path, RecordError) if basis is None else Plan.load(path, basis.chain)
    ended = (folder / "summary.json").exists()
    steps = Steps.of(map(step_of, _lines(folder / "metrics.jsonl")))
    return Run(
        folder,
        plan,
        basis,
        steps,
        Evaluations.of(map(evaluated_of, _lines(folder / "evaluations.jsonl"))),
        Summary.load(folder / "summary.json") if ended else None,
        timing.load(folder, plan.world, plan.fingerprint),
        Recording.load(folder, steps.ends),
        kernels.load(folder, plan.world, plan.fingerprint),
    )


Line = tuple[str, dict[str, Any]]
"""Where it stands, and what it holds."""


def _lines(path: Path) -> Iterator[Line]:
    """Yield the lines of a file one by one; the last one may be cut off, as the run may be writing it."""
    if not path.exists():
        return
    with path.open("rb") as file:
        broken = ""
        for number, text in enumerate(file, 1):
            if broken:
                raise RecordError(broken)
            try:
                data = json.loads(text)
                if not isinstance(data, dict):
                    broken = f"{path.name} line {number} is not a JSON object: {data!r}"
            except ValueError as e:
                broken = f"{path.name} line {number} is not a JSON object: {e}"
            if not broken:
                yield f"{path.name} line {number}", data


def step_of(line: Line) -> Step:
    """Return a line of ``metrics.jsonl``. Raises RecordError naming a field that is missing or no number."""
    return Step(
        int(_number(line, "step")),
        _number(line, "loss", math.nan),
        int(_number(line, "samples")),
        _number(line, "step_s"),
        _number(line, "time_s") if "time_s" in line[1] else None,
    )


def evaluated_of(line: Line) -> Evaluated:
    """Return a line of ``evaluations.jsonl``, likewise."""
    return Evaluated(int(_number(line, "step")), _number(line, "loss", math.nan), _number(line, "top1"))


def _number(line: Line, name: str, unknown: float | None = None) -> float:
    where, data = line
    value = data.get(name, "missing")
    if value is None and unknown is not None:
        return unknown
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RecordError(f"{where}: {name}: expected a number, got {value!r}")
    return value
