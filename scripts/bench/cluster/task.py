"""A task: what one contestant does in one launch; and what a rank of it saw."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from scripts.bench.cluster.contestants.contestant import Options
from scripts.bench.cluster.setting import Setting


@dataclass(frozen=True)
class Task:
    """Steps of one contestant in one setting, which start from the same weights in every launch."""

    contestant: str
    setting: Setting
    options: Options
    out: str
    """Folder for the results of all ranks."""
    warm_up: int = 1
    """Steps that are not timed."""
    steps: int = 3
    """Timed steps."""
    losses: int = 0
    """So many first steps tell their losses; a task that asks for any has no dropout at all."""

    def save(self, path: Path) -> None:
        """Write the task as JSON."""
        path.write_text(json.dumps(asdict(self), indent=1))

    @staticmethod
    def load(path: Path) -> Task:
        """Read a task; raises TypeError for fields that it has not, or lacks."""
        data = json.loads(path.read_text())
        return Task(**{**data, "setting": Setting(**data["setting"])})


@dataclass
class Seen:
    """What one rank saw."""

    step_s: list[float] = field(default_factory=list)
    """Of every timed step, from all ranks' being ready to this one's end."""
    cpu_s: list[float] = field(default_factory=list)
    """CPU seconds of this process meanwhile."""
    losses: list[float] = field(default_factory=list)
    """Mean loss over all samples of the first steps; all ranks have the same."""
    peak_bytes: int = 0
    """Most resident memory above what the process had before the contestant was made."""
    bytes: dict[str, list[int]] = field(default_factory=dict)
    """Received and sent during the timed steps, by interface of this rank's host, whichever process did it."""
    error: str | None = None
    """Traceback, where it failed; the steps before are kept."""

    def save(self, folder: Path, rank: int) -> None:
        """Write this as JSON, where ``load`` finds it."""
        path = _path(folder, rank)
        path.with_suffix(".part").write_text(json.dumps(asdict(self), indent=1))
        path.with_suffix(".part").rename(path)

    @staticmethod
    def load(folder: Path, rank: int) -> Seen:
        """Read what a rank saw; one that was killed left nothing, which is an error too."""
        path = _path(folder, rank)
        if not path.exists():
            return Seen(error=f"rank {rank} was killed before it could tell anything")
        return Seen(**json.loads(path.read_text()))


def _path(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank}.json"
