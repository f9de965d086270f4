"""Whether everybody does the same work: the first losses beside those of one process, without dropout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hybridpar.errors import ConfigError
from hybridpar.schema import read_json, to_data
from scripts.bench.cluster import parity
from scripts.bench.cluster.cell import Conditions, Entry
from scripts.bench.cluster.contestants import find
from scripts.bench.cluster.folder import Folder
from scripts.bench.cluster.runner import Runner, Steps
from scripts.bench.cluster.setting import Setting
from scripts.bench.cluster.task import Task
from scripts.bench.files import write_json


@dataclass(frozen=True)
class Agreement:
    """Losses of an entry and of one process."""

    entry: Entry
    conditions: Conditions
    losses: tuple[float, ...] = ()
    single: tuple[float, ...] = ()
    lossy: bool = False
    """It rounds gradients on the way, and need not agree."""
    note: str | None = None
    """Why there are no losses to compare."""

    @property
    def difference(self) -> float | None:
        """The largest relative difference; None where nothing was compared."""
        return parity.difference(self.losses, self.single) if self.losses and self.single else None

    @property
    def holds(self) -> bool:
        """Whether the entry does the same work, or is marked as one that does not."""
        return self.lossy or (self.difference is not None and self.difference <= parity.AGREEMENT)


@dataclass(frozen=True)
class Agreements:
    """Compares losses; over links and cores without limits, as neither changes them."""

    folder: Folder
    runner: Runner
    conditions: Conditions
    say: Callable[[str], None]

    def of(self, setting: Setting, entry: Entry) -> Agreement:
        """Return an entry's agreement, measured now unless it was under the same conditions."""
        path = self.folder.parity(setting, entry)
        before = known(path, entry)
        if before is not None and before.conditions.same(self.conditions):
            return before
        found = self._measured(setting.work, entry)
        write_json(path, to_data(found))
        self.say(f"losses of {entry.name}: {found.note or f'{found.difference:.1e} from one process'}")
        return found

    def _measured(self, work: Setting, entry: Entry) -> Agreement:
        lossy = find(entry.contestant).lossy
        task = Task(entry.contestant, work, entry.options, "")
        alone = parity.reference(task, "")
        if alone is None:
            return Agreement(entry, self.conditions, lossy=lossy, note="no loop over micro-batches does the same")
        losses, error = self._losses(f"losses-{work.name}-{entry.slug}", work, entry)
        if error is not None:
            return Agreement(entry, self.conditions, lossy=lossy, note=error)
        single, error = self._single(work, Entry("floor", alone.contestant, alone.options))
        return Agreement(entry, self.conditions, losses, single, lossy, error)

    def _single(self, work: Setting, entry: Entry) -> tuple[tuple[float, ...], str | None]:
        """Return one process's losses, which all entries with the same micro-batches share."""
        name = "-".join(["single", work.name, *(f"{k}={v}" for k, v in sorted(entry.options.items()))])
        path = self.folder.parity(work, entry).with_name(f"{name}.json")
        before = known(path, entry)
        if before is not None and before.conditions.same(self.conditions):
            return before.losses, before.note
        losses, error = self._losses(name, work, entry)
        write_json(path, to_data(Agreement(entry, self.conditions, losses, note=error)))
        return losses, error

    def _losses(self, name: str, work: Setting, entry: Entry) -> tuple[tuple[float, ...], str | None]:
        taken = self.runner.run(name, work, entry, Steps(0, 0, parity.STEPS))
        return tuple(taken.ranks[0]["losses"]) if taken.ranks else (), taken.error


def known(path: Path, entry: Entry) -> Agreement | None:
    """Read the agreement of an entry; None where there is none, or of other options."""
    if not path.exists():
        return None
    found = read_json(Agreement, path, ConfigError)
    return found if found.entry == entry else None
