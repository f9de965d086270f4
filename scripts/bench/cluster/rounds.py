"""The rounds: everybody has a turn in each, so that a machine that slows down does so for all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from scripts.bench.cluster.cell import Cell, Conditions, Entry, resumed
from scripts.bench.cluster.folder import Folder
from scripts.bench.cluster.runner import Runner, Steps
from scripts.bench.cluster.setting import Setting
from scripts.bench.turns import order

BEHIND = 1.6
"""Who takes more than so many times the fastest one's step has a turn in the first round only ..."""
ALWAYS = ("ddp", "hybridpar")
"""... apart from those that everybody is compared with."""


@dataclass(frozen=True)
class Rounds:
    """Measures entries in settings; what was measured under the same conditions stays.

    Args:
        count: rounds.
        deadline_s: of ``time.monotonic``; no round of a setting begins that would end later, apart from the first.

    """

    folder: Folder
    runner: Runner
    conditions: Conditions
    count: int
    deadline_s: float
    say: Callable[[str], None]

    def run(self, fields: Sequence[tuple[Setting, list[Entry]]]) -> None:
        """Run all rounds of all settings."""
        for number in range(self.count):
            for setting, entries in fields:
                self._round(number, setting, entries)

    def _round(self, number: int, setting: Setting, entries: Sequence[Entry]) -> None:
        """Run who is due in a round of a setting, unless it would end too late."""
        cells = {entry.name: self._cell(setting, entry) for entry in entries}
        due = {name: cell for name, cell in cells.items() if self._due(number, cell, list(cells.values()))}
        expected_s = sum(cell.rounds[-1].seconds for cell in due.values() if cell.rounds)
        if number > 0 and time.monotonic() + expected_s > self.deadline_s:
            self.say(f"{setting.name}: round {number + 1} would take {expected_s:.0f} s and end too late")
            return
        for name in order(list(cells), number):
            if name in due:
                self._turn(number, due[name])

    def _turn(self, number: int, cell: Cell) -> None:
        setting, entry = cell.setting, cell.entry
        steps = Steps(self.conditions.warm_up, self.conditions.steps)
        taken = self.runner.run(f"{setting.name}-{entry.slug}-{number}", setting, entry, steps, number)
        cell = replace(cell, rounds=(*cell.rounds, taken))
        cell.save(self.folder.cell(setting, entry))
        said = taken.error or f"{statistics.median(taken.steps_s):.3f} s per step"
        self.say(f"round {number + 1}, {setting.name}: {entry.name} {said}")

    def _cell(self, setting: Setting, entry: Entry) -> Cell:
        """Return a cell, with the rounds that it has; one that cannot run is written down as it is."""
        path = self.folder.cell(setting, entry)
        cell = resumed(path, Cell(setting, entry, self.conditions))
        if not path.exists() or not cell.rounds:
            cell.save(path)
        return cell

    def _due(self, number: int, cell: Cell, cells: Sequence[Cell]) -> bool:
        """Whether an entry has a turn in a round: the first, or after a success that is not far behind."""
        if cell.has(number) or cell.entry.problem is not None:
            return False
        if not cell.rounds:
            return True
        if not cell.able or cell.entry.name in ALWAYS:
            return bool(cell.able)
        alone = self.runner.alone
        times_s = [statistics.median(c.steps_s) for c in cells if c.able and not alone(c.entry.contestant)]
        return alone(cell.entry.contestant) or statistics.median(cell.steps_s) <= BEHIND * min(times_s)
