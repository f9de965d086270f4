"""The comparison of a sweep's plans, as a table and as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.console import Console

from hybridpar.planning.explain import in_few_words
from hybridpar.planning.search import Planned
from hybridpar.report.text import in_bytes, in_time, titled
from hybridpar.schema import to_data


@dataclass(frozen=True)
class Row:
    """What became of one combination."""

    values: tuple[str, ...]
    """One per varied key."""
    planned: Planned | None
    error: str | None
    """Why there is no plan; None where there is one."""


def show(keys: tuple[str, ...], rows: tuple[Row, ...], console: Console) -> None:
    """Print one row per combination."""
    able = sum(row.planned is not None for row in rows)
    table = titled(f"{able} of {len(rows)} combinations have a plan")
    for key in keys:
        table.add_column(key)
    table.add_column("shape")
    for name in ("step", "samples/s", "x data_parallel", "memory/rank", "micro-batches"):
        table.add_column(name, justify="right")
    table.add_column("why")
    for row in rows:
        table.add_row(*row.values, *_cells(row))
    console.print(table)


def _cells(row: Row) -> list[str]:
    if row.planned is None:
        return [*["-"] * 6, str(row.error)]
    prediction = row.planned.chosen.prediction
    gain = speed_up(row.planned)
    return [
        row.planned.shape,
        in_time(prediction.step_s),
        f"{prediction.samples_per_s:,.0f}",
        "-" if gain is None else f"{gain:.2f}",
        in_bytes(max(prediction.memory_bytes)),
        " ".join(str(stage.micro_batch) for stage in row.planned.plan.stages),
        in_few_words(row.planned),
    ]


def speed_up(planned: Planned) -> float | None:
    """Return the step time of the best data-parallel plan over the chosen one's; None without such a plan."""
    for candidate in planned.candidates:
        if candidate.shape == "data_parallel" and candidate.plan is not None:
            return candidate.prediction.step_s / planned.chosen.prediction.step_s
    return None


def as_data(keys: tuple[str, ...], rows: tuple[Row, ...]) -> list[dict[str, Any]]:
    """Return the rows as JSON data: ``overrides``, ``shape``, ``speed_up``, ``reason``, ``plan`` and ``error``.

    ``plan`` is what ``format=json`` prints of the combination alone; what a row has not is null.
    """
    return [_data(keys, row) for row in rows]


def _data(keys: tuple[str, ...], row: Row) -> dict[str, Any]:
    planned = row.planned
    return {
        "overrides": dict(zip(keys, row.values, strict=True)),
        "shape": None if planned is None else planned.shape,
        "speed_up": None if planned is None else speed_up(planned),
        "reason": None if planned is None else in_few_words(planned),
        "plan": None if planned is None else to_data(planned.plan),
        "error": row.error,
    }
