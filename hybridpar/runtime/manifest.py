"""The folders of checkpoints: what each one says of itself, which is the latest, and which ones stay.

A checkpoint is a folder ``step-N``. It is written as ``.step-N.partial`` and renamed when all of it is on the
disk, so that a folder of the final name is always complete.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybridpar.errors import CheckpointError, DamageError
from hybridpar.planning.plan import Plan
from hybridpar.runtime.early_stop import Patience
from hybridpar.runtime.judge import Judge
from hybridpar.schema import from_data, read_json, to_data

VERSION = 1
FOLDER = "checkpoints"
MANIFEST = "checkpoint.json"
_NAME = re.compile(r"step-(\d+)")
_PARTIAL = re.compile(r"\.step-\d+\.partial")


@dataclass(frozen=True)
class Position:
    """How far a training has come."""

    step: int
    """Steps that were run."""
    epoch: int
    """The epoch that is going on, from 0."""
    samples: int
    """Samples of this epoch that were used: the offset in the sampler's order."""


@dataclass(frozen=True)
class Subject:
    """What a training is about; two trainings with equal ones can continue each other."""

    model: str
    chain: str
    """Fingerprint of the chain of layers."""
    precision: str
    optimizer: str
    seed: int
    data: str
    data_size: int | None
    """Samples to train on; None: a stream without an end."""
    shuffle: int | None = None
    """How many samples of a stream are shuffled with each other; None: they have random access."""


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself."""

    position: Position
    subject: Subject
    ranks: int
    """Files of tensors."""
    plan: dict[str, Any]
    """As ``plan.json``."""
    names: dict[str, str]
    """Where each tensor of the model's state dict lies, as ``runtime.state`` names it."""
    unused: tuple[str, ...] = ()
    """Those of the state dict that no layer uses."""
    metric: float | None = None
    """Of the evaluation just before; None where there was none."""
    best: float | None = None
    """The best metric so far."""
    judged_by: str | None = None
    """What the metrics are."""
    patience: Patience | None = None
    """Of the early stop, if there is one."""
    version: int = VERSION

    def best_of(self, metric: str | None) -> float | None:
        """Return the best ``metric`` so far; None where another one was looked at."""
        return self.best if self.judged_by == metric else None

    @staticmethod
    def load(folder: Path) -> Manifest:
        """Read a checkpoint's manifest.

        Raises DamageError for one that is missing or malformed, CheckpointError for one of another version.
        """
        if not (folder / MANIFEST).is_file():
            raise DamageError(f"{folder} is no checkpoint: it has no {MANIFEST}; give the folder of one")
        manifest = read_json(Manifest, folder / MANIFEST, DamageError)
        if manifest.version != VERSION:
            raise CheckpointError(
                f"{folder} has version {manifest.version}, but this hybridpar reads {VERSION}; use the hybridpar "
                "that wrote it"
            )
        at = manifest.position
        if manifest.ranks < 1 or min(at.step, at.epoch, at.samples) < 0:
            raise DamageError(f"{folder}: {MANIFEST} holds impossible numbers; use another checkpoint")
        return manifest

    def parallel_plan(self, folder: Path) -> Plan:
        """Return the plan under which the checkpoint in ``folder`` was made. Raises DamageError for none."""
        return from_data(Plan, self.plan, f"{folder.name}/{MANIFEST}: plan", DamageError)


def partial(home: Path, step: int) -> Path:
    """Return the folder in which the checkpoint of a step is written."""
    return home / f".step-{step:08d}.partial"


def final(home: Path, step: int) -> Path:
    """Return the folder that it has when it is complete."""
    return home / f"step-{step:08d}"


def commit(home: Path, manifest: Manifest) -> Path:
    """Complete a checkpoint whose tensors are written, and return its final folder.

    Raises CheckpointError where the files of some ranks are not visible here, OSError as the file system does.
    """
    step = manifest.position.step
    folder, complete_folder = partial(home, step), final(home, step)
    missing = [r for r in range(manifest.ranks) if not (folder / f"rank-{r}.json").is_file()]
    if missing:
        raise CheckpointError(
            f"the files of ranks {missing} are not in {folder}; checkpoints need a run.dir that all nodes share"
        )
    with (folder / MANIFEST).open("w", encoding="utf-8") as file:
        file.write(json.dumps(to_data(manifest), indent=1))
        file.flush()
        os.fsync(file.fileno())
    sync(folder)
    folder.rename(complete_folder)
    sync(home)
    return complete_folder


def sync(folder: Path) -> None:
    """Wait until a folder's entries are on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def complete(home: Path) -> list[Path]:
    """Return the complete checkpoints below a run's ``checkpoints`` folder, the earliest first."""
    if not home.is_dir():
        return []
    return sorted((p for p in home.iterdir() if _NAME.fullmatch(p.name)), key=lambda p: int(p.name[5:]))


def find(path: Path) -> Path:
    """Return a checkpoint's folder: ``path``, or the latest of the run in ``path``. Raises CheckpointError."""
    if (path / MANIFEST).is_file():
        return path
    known = complete(path / FOLDER) or complete(path)
    if not known:
        raise CheckpointError(
            f"{path} holds no checkpoint; give the folder of a checkpoint, or of a run with some"
        )
    return known[-1]


def set_aside(folder: Path) -> Path:
    """Let a damaged checkpoint no longer be one, but stay to be looked at; return its new folder.

    One of the same step that was set aside before is removed.
    """
    aside = aside_of(folder)
    if aside.exists():
        shutil.rmtree(aside)
    folder.rename(aside)
    return aside


def aside_of(folder: Path) -> Path:
    """Return where ``set_aside`` puts a checkpoint."""
    return folder.with_name(f"{folder.name}.damaged")


def clean(home: Path) -> None:
    """Remove what interrupted saves have left."""
    if home.is_dir():
        for path in home.iterdir():
            if _PARTIAL.fullmatch(path.name):
                shutil.rmtree(path)


def retain(home: Path, keep: int, judge: Judge | None) -> None:
    """Remove all checkpoints but the ``keep`` latest, and the best one by ``judge``.

    A folder that is removed loses its final name first, so that no half of it is ever taken for a checkpoint.
    One whose manifest is damaged cannot be the best.
    """
    known = complete(home)
    stay = set(known[-keep:])
    if judge is not None:
        metrics = {p.name: metric for p in known if (metric := _metric(p, judge)) is not None}
        if metrics:
            stay.add(home / judge.best(metrics))
    for path in known:
        if path not in stay:
            gone = home / f".{path.name}.partial"
            path.rename(gone)
            shutil.rmtree(gone)


def _metric(folder: Path, judge: Judge) -> float | None:
    """Return what a checkpoint is judged by; None where it has nothing of the kind, or cannot tell."""
    try:
        manifest = Manifest.load(folder)
    except DamageError:
        return None
    return manifest.metric if manifest.judged_by == judge.name else None
