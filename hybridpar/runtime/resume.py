"""Going on from a checkpoint: whether it fits, and what it restores."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from hybridpar.config import Config
from hybridpar.data.sampler import Order
from hybridpar.errors import CheckpointError, DamageError
from hybridpar.model.chain import Chain
from hybridpar.planning.blocks import positions
from hybridpar.planning.plan import Plan
from hybridpar.runtime import manifest as folders
from hybridpar.runtime.feed import Feed
from hybridpar.runtime.intact import home
from hybridpar.runtime.job import Job
from hybridpar.runtime.manifest import Manifest, Position, Subject
from hybridpar.runtime.pieces import Stored
from hybridpar.runtime.state import PARAMETER
from hybridpar.runtime.stream_state import mark_from
from hybridpar.schema import from_data


@dataclass(frozen=True)
class Resume:
    """A checkpoint to go on from."""

    folder: Path
    manifest: Manifest
    same_run: bool
    """Whether it lies in the run's own folder: the run's records are then continued."""
    same_plan: bool

    @property
    def position(self) -> Position:
        """How far the training had come."""
        return self.manifest.position

    def restore(self, job: Job, feed: Feed) -> None:
        """Bring a job and what feeds it to where the checkpoint was made.

        Raises CheckpointError for what is damaged or foreign.
        """
        with _telling_of_others(self.folder):
            stored = Stored(self.folder, self.manifest.ranks)
            job.state.restore(stored, same_plan=self.same_plan)
            mark = mark_from(stored, job.rank) if job.reads else None
        job.go_on(self.position.step, self.position.samples)
        if mark is not None:
            feed.go_on(mark)


@contextlib.contextmanager
def _telling_of_others(folder: Path) -> Iterator[None]:
    """Let an error of a checkpoint that cannot be read name the one before it."""
    try:
        yield
    except DamageError as e:
        before = [other for other in folders.complete(folder.parent) if other < folder]
        if not before:
            raise
        raise DamageError(
            f"{e}; the one before it is {before[-1]}: give that one by resume=, or continue its run by "
            "resume=auto, which passes over what is damaged"
        ) from e


def former_plan(config: Config, folder: Path | None, chain: str) -> Plan | None:
    """Return the plan that a continued run had, for any number of ranks; None where there is none for ``chain``.

    ``folder`` is the checkpoint that it continues with. One that is given by its path may be continued under any
    plan, and has no say here.
    """
    if folder is None or config.run.dir is None or folder.parent != home(config):
        return None
    plan = Manifest.load(folder).parallel_plan(folder)
    return plan if plan.chain == chain else None


def opened(config: Config, folder: Path, plan: Plan, subject: Subject, order: Order, steps: int) -> Resume:
    """Return a checkpoint that a training begins with, compared with what is to be trained, ``steps`` steps.

    Raises CheckpointError where it is damaged, belongs to another training, is complete already, or was made
    where no step of this plan begins.
    """
    with _telling_of_others(folder):
        manifest = Manifest.load(folder)
        former = manifest.parallel_plan(folder)
        Stored(folder, manifest.ranks)
    for name, key in _KEYS.items():
        ours, theirs = getattr(subject, name), getattr(manifest.subject, name)
        if ours != theirs:
            raise CheckpointError(
                f"{folder} is of a training with {key} {theirs}, but here it is {ours}; set it as it was, or give "
                "another checkpoint"
            )
    at, batch = manifest.position, order.global_batch
    if at.samples % batch:
        raise CheckpointError(
            f"{folder} was made {at.samples} samples into an epoch, where no step of train.global_batch={batch} "
            f"begins; set a global batch that divides it, or {former.global_batch} as it was"
        )
    if former.global_batch != batch and config.train.steps is None:
        raise CheckpointError(
            f"{folder} was made with train.global_batch={former.global_batch}, but here it is {batch}: {at.step} "
            "steps and train.epochs do not add up; give train.steps, the steps of the whole training"
        )
    if at.samples // batch >= order.steps:  # with drop_last it was the last step of its epoch
        manifest = replace(manifest, position=Position(at.step, at.epoch + 1, 0))
    same_run = config.run.dir is not None and folder.parent == home(config)
    over = manifest.patience is not None and manifest.patience.is_over(config.train.early_stop)
    summed_up = not same_run or (home(config).parent / "summary.json").exists()
    if at.step > steps or (summed_up and (over or at.step == steps)):
        raise _complete(folder, at.step, None if over else steps)
    return Resume(folder, manifest, same_run, alike(former, plan))


def _complete(folder: Path, step: int, steps: int | None) -> CheckpointError:
    """Return what is raised for a training that has ended; ``steps`` None: before its last step."""
    ended, remedy = f"and the training has {steps}", "train.steps or train.epochs higher"
    if steps is None:
        ended, remedy = "where train.early_stop ended the training", "train.early_stop.patience higher"
    return CheckpointError(
        f"{folder} was made after {step} steps, {ended}: it is complete; set {remedy} to train on"
    )


def check_cuts(found: Resume, plan: Plan, chain: Chain) -> None:
    """Raise CheckpointError for optimizer state of which shards need a part, but that cannot be cut."""
    stored = Stored(found.folder, found.manifest.ranks)
    sharded = [chain.layers[slice(*at.layers)] for at in positions(plan) if at.sharded]
    cut = {parameter.name for layers in sharded for layer in layers for parameter in layer.parameters}
    for name, saved in stored.tensors.items():
        kind, _, rest = name.partition("/")
        key, _, parameter = rest.partition("/")
        if kind != "optimizer" or parameter not in cut or prod(saved.size) == 1:
            continue
        shape = tuple(stored.tensors[PARAMETER + parameter].size)
        if tuple(saved.size) not in {shape, (prod(shape),)}:
            raise CheckpointError(
                f"{found.folder}: the optimizer's {key} of {parameter} has the shape {list(saved.size)}, of which "
                f"the plan's tail cannot have a part as it has of the parameter {list(shape)}; continue under a "
                "plan without shards (plan.tail.degree=1, or another shape)"
            )


def reopened(folder: Path, data: Any, plan: Plan, *, same_run: bool) -> Resume:
    """Return on any rank what ``opened`` gave on the first, from its manifest as plain data."""
    manifest = from_data(Manifest, data, folders.MANIFEST, CheckpointError)
    return Resume(folder, manifest, same_run, alike(manifest.parallel_plan(folder), plan))


def alike(one: Plan, other: Plan) -> bool:
    """Whether two plans put the same work on the same ranks, whatever is predicted of them."""
    return one.fingerprint == other.fingerprint


_KEYS = {
    "model": "model.name",
    "chain": "a chain of layers (model.*, train.autocast, train.memory_format)",
    "precision": "train.precision",
    "optimizer": "optimizer.name",
    "seed": "train.seed",
    "data": "data.name",
    "data_size": "a number of training samples (data.*)",
    "shuffle": "samples of a stream that are shuffled with each other, hybridpar.Stream(shuffle=...),",
}
