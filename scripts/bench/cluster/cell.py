"""A cell: what one entry took in one setting, round by round, with what it was measured on; a JSON file each."""

from __future__ import annotations

import re
import statistics
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hybridpar.errors import ConfigError
from hybridpar.schema import read_json, to_data
from scripts.bench.cluster.setting import Setting
from scripts.bench.files import write_json
from scripts.launch.namespaces import INTERFACE


@dataclass(frozen=True)
class Conditions:
    """What must be the same for two measurements to stand in one table."""

    commit: str
    code: str
    """Digest of all that is measured and measures, so that a changed document makes nothing stale."""
    machine: str
    versions: str
    """Of Python and torch."""
    warm_up: int
    """Steps of a launch that are not timed."""
    steps: int
    """Timed steps of a launch."""

    def same(self, other: Conditions) -> bool:
        """Whether what was measured under ``other`` need not be measured again."""
        return replace(self, commit=other.commit) == other


@dataclass(frozen=True)
class Entry:
    """Who runs in a setting, and how."""

    name: str
    """Of the contestant, or of one of our plans: ``hybridpar, three_stage``."""
    contestant: str
    options: dict[str, Any] = field(default_factory=dict)
    shape: str | None = None
    """Of our plan."""
    predicted_s: float | None = None
    """Of our plan's step, written down before it ran."""
    predictions_sha256: str | None = None
    """Of the file that holds the prediction."""
    problem: str | None = None
    """Why it cannot run: every try of its tuning failed."""

    @property
    def slug(self) -> str:
        """The name as a file's."""
        return re.sub(r"[^a-z0-9_]+", "-", self.name.lower())


@dataclass(frozen=True)
class Round:
    """One launch: what every rank saw, as the worker wrote it."""

    number: int
    date: str
    """UTC, at the start."""
    seconds: float
    """Of the whole launch."""
    ranks: tuple[dict[str, Any], ...] = ()
    beat_s: float | None = None
    """CPU seconds of the machine's beat meanwhile: how fast it was."""
    error: str | None = None

    @property
    def steps_s(self) -> list[float]:
        """Seconds of every timed step, of its slowest rank."""
        return [max(each) for each in zip(*(rank["step_s"] for rank in self.ranks), strict=True)]

    @property
    def cpu_s(self) -> list[float]:
        """CPU seconds of every timed step, of all ranks."""
        return [sum(each) for each in zip(*(rank["cpu_s"] for rank in self.ranks), strict=True)]

    def sent_bytes(self, interface: str, ranks_per_host: int) -> list[float]:
        """Return the bytes per step that every host sent through an interface, as its counters had it."""
        return self._counted(interface, ranks_per_host, 1)

    def received_bytes(self, interface: str, ranks_per_host: int) -> list[float]:
        """Return the bytes per step that every host received through an interface."""
        return self._counted(interface, ranks_per_host, 0)

    def _counted(self, interface: str, ranks_per_host: int, way: int) -> list[float]:
        """Return a counter of every host per step; the ranks of a host all see the same counters."""
        firsts = self.ranks[::ranks_per_host]
        return [r["bytes"].get(interface, [0, 0])[way] / max(1, len(r["step_s"])) for r in firsts]


@dataclass(frozen=True)
class Cell:
    """An entry in a setting."""

    setting: Setting
    entry: Entry
    conditions: Conditions
    rounds: tuple[Round, ...] = ()

    @property
    def able(self) -> tuple[Round, ...]:
        """The rounds that did not fail."""
        return tuple(r for r in self.rounds if r.error is None and r.ranks)

    @property
    def error(self) -> str | None:
        """Why there is no time: of the tuning, or of the last round."""
        if self.able:
            return None
        return self.entry.problem or (self.rounds[-1].error if self.rounds else None)

    @property
    def steps_s(self) -> list[float]:
        """All timed steps of all rounds."""
        return [s for r in self.able for s in r.steps_s]

    @property
    def round_s(self) -> dict[int, float]:
        """Median step of every round that did not fail, by its number."""
        return {r.number: statistics.median(r.steps_s) for r in self.able}

    @property
    def cpu_s(self) -> float | None:
        """Median CPU seconds of a step, of all ranks; None where nothing was measured."""
        found = [s for r in self.able for s in r.cpu_s]
        return statistics.median(found) if found else None

    @property
    def peak_bytes(self) -> int | None:
        """Most memory of a rank above its baseline."""
        found = [rank["peak_bytes"] for r in self.able for rank in r.ranks]
        return max(found) if found else None

    def sent_bytes(self, interface: str = INTERFACE) -> float | None:
        """Bytes per step that all hosts together sent through an interface, the median of the rounds."""
        found = [sum(r.sent_bytes(interface, self.setting.ranks_per_host)) for r in self.able]
        return statistics.median(found) if found else None

    def has(self, number: int) -> bool:
        """Whether a round was measured; one that failed was."""
        return any(r.number == number for r in self.rounds)

    def save(self, path: Path) -> None:
        """Write the cell."""
        write_json(path, to_data(self))

    @staticmethod
    def load(path: Path) -> Cell:
        """Read a cell; raises ConfigError for a file that is none."""
        return read_json(Cell, path, ConfigError)


def resumed(path: Path, fresh: Cell) -> Cell:
    """Return the cell of a file where it is of the same conditions and entry, else the ``fresh`` one."""
    if path.exists():
        known = Cell.load(path)
        if known.conditions.same(fresh.conditions) and (known.setting, known.entry) == (
            fresh.setting,
            fresh.entry,
        ):
            return known
    return fresh
