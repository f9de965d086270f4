"""Which checkpoint a training begins with: the one that is named, or the last one of its run that is intact."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hybridpar.config import Config
from hybridpar.errors import DamageError
from hybridpar.runtime import manifest as folders
from hybridpar.runtime.manifest import Manifest
from hybridpar.runtime.pieces import Stored
from hybridpar.runtime.process import Process


@dataclass(frozen=True)
class Damaged:
    """A checkpoint that is passed over."""

    folder: Path
    why: str
    """What is wrong with it, in one line."""


@dataclass(frozen=True)
class Found:
    """What ``look`` has found."""

    folder: Path | None = None
    """The checkpoint to begin with; None: the training begins with its initial weights."""
    damaged: tuple[Damaged, ...] = ()
    """Later ones of the run that it cannot go on from, the latest first."""

    def notes(self) -> list[str]:
        """Return what is said of those that are passed over, a line for each."""
        assert self.folder is not None or not self.damaged
        return [
            f"{damaged.why}; the run goes on from {self.folder.name if self.folder else None}, the last good one "
            f"before it, and the damaged one is kept as {folders.aside_of(damaged.folder).name}"
            for damaged in self.damaged
        ]

    def set_aside(self) -> None:
        """Take the damaged ones out of the way of those that the run is going to make."""
        for damaged in self.damaged:
            folders.set_aside(damaged.folder)


def home(config: Config) -> Path:
    """Return the folder of the checkpoints of a run whose folder is given."""
    return Path(str(config.run.dir)).expanduser().absolute() / folders.FOLDER


def look(config: Config, process: Process) -> Found:
    """Return the checkpoint that a training begins with; all ranks call this, and get the same.

    ``resume=auto``, and a job that torchrun restarted, take the latest one of the run all of whose bytes are those
    that were written: the ranks share out its slices to compare their checksums. Nothing is changed on the disk.
    Rank 0 raises CheckpointError where ``resume`` names no checkpoint, DamageError where all of the run's are
    damaged; the others end.
    """
    own: list[Path] = []
    if config.run.dir is not None and (config.resume == "auto" or process.place.restarts > 0):
        own = [Path(p) for p in process.share(lambda: [str(p) for p in folders.complete(home(config))])]
    damaged: list[Damaged] = []
    for folder in reversed(own):
        why = _damage(folder, process)
        if why is None:
            return Found(folder, tuple(damaged))
        damaged.append(Damaged(folder, why))
    if damaged:
        process.share(lambda: _refuse(damaged))
    if config.resume in {None, "auto"}:
        return Found()
    named = Path(config.resume).expanduser()
    return Found(Path(process.share(lambda: str(folders.find(named)))))


def _damage(folder: Path, process: Process) -> str | None:
    """Return what is wrong with a checkpoint, None if nothing is; all ranks call this."""
    seen = process.share(lambda: _glance(folder))
    if isinstance(seen, str):
        return seen
    found: list[str | None] = process.tell(_misread(folder, seen, process.rank, process.world))
    return next((why for why in found if why is not None), None)


def _glance(folder: Path) -> int | str:
    """Return for how many ranks a checkpoint has files, or what is wrong with it, without reading a tensor."""
    try:
        manifest = Manifest.load(folder)
        manifest.parallel_plan(folder)
        Stored(folder, manifest.ranks)
    except DamageError as e:
        return str(e)
    return manifest.ranks


def _misread(folder: Path, ranks: int, share: int, shares: int) -> str | None:
    """Return what is wrong with this rank's share of the slices."""
    try:
        Stored(folder, ranks).verify(share, shares)
    except DamageError as e:
        return str(e)
    return None


def _refuse(damaged: list[Damaged]) -> None:
    latest = damaged[0]
    others = f", and none of the {len(damaged) - 1} before it is intact" if damaged[1:] else ""
    raise DamageError(
        f"{latest.why}{others}; to begin anew give another run.dir, or remove {latest.folder.parent}"
    )
