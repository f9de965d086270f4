"""The record of a measured timeline: when one rank's actions ran in some steps of a training.

Every rank writes its own, ``timeline/rank3.json`` in the run's folder. Times are seconds of the rank's own clock,
which :attr:`RankTiming.offset_s` turns into that of rank 0.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from hybridpar.errors import RecordError
from hybridpar.planning.program import Action, ActionKind
from hybridpar.schema import read_json, to_data

SCHEMA_VERSION = 1
FOLDER = "timeline"
"""In the run's."""

ActionTiming = tuple[ActionKind, int | None, int | None, int | None, float, float]
"""Kind, block, micro-batch and operation of an action, then its start and end, from the step's start."""


@dataclass(frozen=True)
class StepTiming:
    """One step of one rank. Raises RecordError for an action that ends before it starts."""

    step: int
    samples: int
    """Of all ranks."""
    start_s: float
    """Of the rank's own clock."""
    length_s: float
    """To its end on this rank, its last action and the reading of its figures included."""
    actions: tuple[ActionTiming, ...]
    """All of the rank's program, in its order."""
    completions: tuple[tuple[int, float], ...] = ()
    """Operations whose completion the backend told, and when, from the step's start; of others the end of the wait
    is the first that the rank knows."""
    input_s: float | None = None
    """How long the rank waited for the step's samples before it began; None: it read none, or nobody knows."""

    def __post_init__(self) -> None:
        for number, (kind, *_, start_s, end_s) in enumerate(self.actions):
            if not 0.0 <= start_s <= end_s:
                raise RecordError(f"step {self.step}: action {number} ({kind}) runs from {start_s} to {end_s} s")

    @property
    def names(self) -> tuple[tuple[object, ...], ...]:
        """What the actions are, without their times."""
        return tuple(timing[:4] for timing in self.actions)


@dataclass(frozen=True)
class RankTiming:
    """What one rank measured. Raises RecordError for a rank outside the job and for another schema."""

    rank: int
    """Of all plan replicas."""
    world: int
    plan: str
    """Fingerprint of the plan."""
    device: str
    """The actions' times are the host's on a ``cpu``, those of the device's stream on ``cuda``."""
    offset_s: float
    """Added to this rank's clock it gives that of rank 0."""
    uncertainty_s: float
    """Of the offset; 0 on the host of rank 0, whose ranks share a clock."""
    steps: tuple[StepTiming, ...]
    host: str | None = None
    """The name of its host, as the monitor's samples have it."""
    gpu: str | None = None
    """The UUID of its GPU, likewise; None on a CPU."""
    epoch_s: float | None = None
    """Added to this rank's clock it gives the seconds since the epoch by its host's time of day."""
    schema: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        if self.schema != SCHEMA_VERSION:
            raise RecordError(f"schema {self.schema} is not {SCHEMA_VERSION}; record again with this version")
        if not 0 <= self.rank < self.world:
            raise RecordError(f"rank {self.rank} is not below the world of {self.world}")

    def save(self, run: Path) -> Path:
        """Write the record into a run's folder, all of it or nothing, and return its path."""
        path = path_of(run, self.rank)
        path.parent.mkdir(exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(to_data(self), separators=(",", ":")) + "\n")
        part.replace(path)
        return path


def path_of(run: Path, rank: int) -> Path:
    """Return where a rank's record lies in a run's folder."""
    return run / FOLDER / f"rank{rank}.json"


def load(run: Path, world: int, plan: str) -> tuple[RankTiming, ...]:
    """Read the records of all ranks of a run under a plan; none if there is not one for every rank.

    A run that went on under another plan may have left records of ranks that it no longer has. Raises RecordError,
    which names file and field, for a malformed one.
    """
    paths = [path_of(run, rank) for rank in range(world)]
    if not all(path.exists() for path in paths):
        return ()
    records = tuple(read_json(RankTiming, path, RecordError) for path in paths)
    fits = all((r.rank, r.world, r.plan) == (rank, world, plan) for rank, r in enumerate(records))
    return records if fits else ()


def named(action: Action) -> tuple[ActionKind, int | None, int | None, int | None]:
    """Return what a record calls an action."""
    return action.kind, action.block, action.micro_batch, action.operation
