"""Where a bench keeps what; nothing that is there is made again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from scripts.bench.cluster.cell import Entry
from scripts.bench.cluster.setting import Setting


@dataclass(frozen=True)
class Folder:
    """The files of one state of the code (its digest is the folder's name)."""

    path: Path

    @property
    def beats(self) -> Path:
        """When the machine's beat was how fast."""
        return self.path / "beats.tsv"

    def profile(self, setting: Setting, memory_format: str) -> Path:
        """Layer times of a model on one rank while the others compute too."""
        return self.path / "profiles" / f"{setting.devices.name}-{memory_format}.json"

    def cluster(self, setting: Setting) -> Path:
        """The links of a setting, as probed; the same for all that is computed there."""
        return self.path / "clusters" / f"{setting.links_name}.yaml"

    def plans(self, setting: Setting, memory_format: str) -> Path:
        """A folder with the best plan of every shape, and ``predictions.json``."""
        return self.path / "plans" / f"{setting.name}-{memory_format}"

    def tuning(self, setting: Setting, contestant: str) -> Path:
        """The tries of a contestant's options in the setting where it is tuned."""
        return self.path / "tuning" / setting.name / f"{contestant}.json"

    def parity(self, setting: Setting, entry: Entry) -> Path:
        """An entry's first losses beside those of one process: for all links alike, but for our own plans.

        Those are made for a setting, and another one has others of the same name.
        """
        where = setting if entry.shape else setting.work
        return self.path / "parity" / where.name / f"{entry.slug}.json"

    def cell(self, setting: Setting, entry: Entry) -> Path:
        """What an entry took in a setting."""
        return self.path / "cells" / setting.name / f"{entry.slug}.json"

    def cells(self, setting: Setting) -> list[Path]:
        """All cells of a setting."""
        return sorted((self.path / "cells" / setting.name).glob("*.json"))

    def launch(self, name: str) -> Path:
        """What the ranks of a launch wrote."""
        return self.path / "launches" / name

    def log(self, name: str) -> Path:
        """What a launch printed; a file per rank."""
        return self.path / "logs" / f"{name}.log"
