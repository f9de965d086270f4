"""Sweeps: a plan per combination of overrides, all in this process, and their comparison."""

from __future__ import annotations

from dataclasses import dataclass

from hybridpar.config import Config, Sweep, compose
from hybridpar.errors import ConfigError, HybridparError
from hybridpar.planner import Report, Shelf, make_plan
from hybridpar.planning.search import Planned
from hybridpar.report.sweep import Row


@dataclass(frozen=True)
class Point:
    """One combination of a sweep, composed."""

    values: tuple[str, ...]
    config: Config | None
    error: str | None
    """Why it cannot be composed."""


def points(sweep: Sweep) -> tuple[Point, ...]:
    """Compose every combination of a sweep. Raises ConfigError, the first one's, where none can be composed."""
    result = []
    for values in sweep.points:
        try:
            result.append(Point(values, compose(sweep.overrides(values)), None))
        except HybridparError as e:
            result.append(Point(values, None, str(e)))
    if all(point.config is None for point in result):
        raise ConfigError(str(result[0].error))
    return tuple(result)


def run(sweep: Sweep, composed: tuple[Point, ...], report: Report = lambda _: None) -> tuple[Row, ...]:
    """Plan every combination; what is impossible says why in its row. Raises nothing that a user can cause."""
    shelf = Shelf()
    rows = []
    for number, point in enumerate(composed, 1):
        where = " ".join(f"{key}={value}" for key, value in zip(sweep.keys, point.values, strict=True))
        report(f"{number} of {len(composed)}: {where}")
        planned, error = _planned(point, shelf, report)
        rows.append(Row(point.values, planned, error))
    return tuple(rows)


def _planned(point: Point, shelf: Shelf, report: Report) -> tuple[Planned | None, str | None]:
    if point.config is None:
        return None, point.error
    try:
        return make_plan(point.config, shelf.prepare(point.config, report)), None
    except HybridparError as e:
        return None, str(e)
