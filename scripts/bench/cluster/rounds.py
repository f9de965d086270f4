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
        taken_s: dict[str, float] = {}
        for number in range(self.count):
            for setting, entries in fields:
                if time.monotonic() + taken_s.get(setting.name, 0.0) > self.deadline_s and number > 0:
                    self.say(f"{setting.name}: round {number + 1} would end too late")
                    continue
                began_s = time.monotonic()
                self._round(number, setting, entries)
                taken_s[setting.name] = time.monotonic() - began_s

    def _round(self, number: int, setting: Setting, entries: Sequence[Entry]) -> None:
        cells = {entry.name: self._cell(setting, entry) for entry in entries}
        for name in order(list(cells), number):
            cell = cells[name]
            if not cell.has(number) and cell.entry.problem is None and self._worthwhile(cell, cells):
                cells[name] = self._turn(number, cell)

    def _turn(self, number: int, cell: Cell) -> Cell:
        setting, entry = cell.setting, cell.entry
        steps = Steps(self.conditions.warm_up, self.conditions.steps)
        taken = self.runner.run(f"{setting.name}-{entry.slug}-{number}", setting, entry, steps, number)
        cell = replace(cell, rounds=(*cell.rounds, taken))
        cell.save(self.folder.cell(setting, entry))
        said = taken.error or f"{statistics.median(taken.steps_s):.3f} s per step"
        self.say(f"round {number + 1}, {setting.name}: {entry.name} {said}")
        return cell

    def _cell(self, setting: Setting, entry: Entry) -> Cell:
        """Return a cell, with the rounds that it has; one that cannot run is written down as it is."""
        path = self.folder.cell(setting, entry)
        cell = resumed(path, Cell(setting, entry, self.conditions))
        if not path.exists() or not cell.rounds:
            cell.save(path)
        return cell

    def _worthwhile(self, cell: Cell, cells: dict[str, Cell]) -> bool:
        """Whether another turn is needed: the first, of a rival that is not far behind, or after a success."""
        if not cell.rounds:
            return True
        if not cell.able or cell.entry.name in ALWAYS:
            return bool(cell.able)
        alone = self.runner.alone
        times_s = [
            statistics.median(c.steps_s) for c in cells.values() if c.able and not alone(c.entry.contestant)
        ]
        return alone(cell.entry.contestant) or statistics.median(cell.steps_s) <= BEHIND * min(times_s)
