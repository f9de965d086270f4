"""What came out of a setting: times, ratios, bytes, and what of the requirement holds."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from scripts.bench.cluster.agreement import Agreement
from scripts.bench.cluster.cell import Cell
from scripts.bench.cluster.field import OURS
from scripts.bench.cluster.setting import Setting
from scripts.bench.turns import Ratio, compare

DDP, FLOOR = "ddp", "floor"


@dataclass(frozen=True)
class Row:
    """An entry of a setting, beside the others."""

    cell: Cell
    agreement: Agreement | None
    to_ddp: Ratio | None
    """Its step over DistributedDataParallel's, over the rounds that both ran."""
    to_best: Ratio | None
    """Its step over that of the fastest peer."""
    floor_s: float | None
    """What one process takes of CPU time, over the cores that all ranks have together."""

    @property
    def name(self) -> str:
        """Of the entry."""
        return self.cell.entry.name

    @property
    def step_s(self) -> float | None:
        """Median of all timed steps; of the floor what it would take on all ranks' cores."""
        if self.name == FLOOR:
            return self.floor_s
        return statistics.median(self.cell.steps_s) if self.cell.able else None

    @property
    def error(self) -> float | None:
        """By what share of the step the prediction is too long; negative: too short."""
        predicted = self.cell.entry.predicted_s
        return None if predicted is None or self.step_s is None else predicted / self.step_s - 1

    @property
    def ours(self) -> bool:
        """Whether this is the planner's choice or another plan of ours."""
        return self.cell.entry.contestant == OURS


@dataclass(frozen=True)
class Result:
    """A setting with all its rows, fastest first, failures last."""

    setting: Setting
    rows: tuple[Row, ...]

    def of(self, name: str) -> Row | None:
        """Return the row of an entry that has a time."""
        return next((r for r in self.rows if r.name == name and r.step_s is not None), None)

    @property
    def best_peer(self) -> Row | None:
        """The fastest that is not ours and does the same work without loss."""
        return next((r for r in self.rows if _rival(r)), None)

    def ratio(self, name: str, other: Row | None) -> float | None:
        """Return how many times the step of ``other`` an entry takes; None where one of both has no time."""
        row = self.of(name)
        if row is None or other is None or not row.step_s or not other.step_s:
            return None
        found = _ratio(row.cell, other.cell)
        return found.median if found is not None else row.step_s / other.step_s


def result(setting: Setting, cells: Sequence[Cell], agreed: Callable[[Cell], Agreement | None]) -> Result:
    """Compare the cells of a setting."""
    known = {cell.entry.name: cell for cell in cells}
    floor = known.get(FLOOR)
    cpu_s = floor.cpu_s if floor is not None else None
    floor_s = None if cpu_s is None else cpu_s / (setting.cores * setting.world)
    agreements = {name: agreed(cell) for name, cell in known.items()}
    plain = [Row(cell, agreements[name], None, None, floor_s) for name, cell in known.items()]
    ordered = sorted(plain, key=lambda r: (r.step_s is None, r.step_s or 0.0, r.name))
    best = next((r.cell for r in ordered if _rival(r)), None)
    rows = [Row(r.cell, r.agreement, _to(r, known.get(DDP)), _to(r, best), floor_s) for r in ordered]
    return Result(setting, tuple(rows))


def _rival(row: Row) -> bool:
    """Whether hybridpar has to be as fast as this one."""
    lossy = row.agreement is not None and row.agreement.lossy
    return row.step_s is not None and not row.ours and row.name != FLOOR and not lossy


def _to(row: Row, other: Cell | None) -> Ratio | None:
    return None if row.name == FLOOR or other is None else _ratio(row.cell, other)


def _ratio(cell: Cell, other: Cell) -> Ratio | None:
    """Compare the rounds that both ran."""
    ours, theirs = cell.round_s, other.round_s
    both = sorted(ours.keys() & theirs.keys())
    return compare([ours[n] for n in both], [theirs[n] for n in both]) if both else None
