"""Checkpoints of sharded optimizer state: real processes, gloo, float32; any plan goes on with any checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from hybridpar.planning.plan import Plan, Recipe, Segment, Stage, validate
from hybridpar.runtime import manifest as folders
from hybridpar.runtime import zero
from hybridpar.runtime.export import export
from hybridpar.runtime.job import Job
from hybridpar.runtime.manifest import Manifest
from hybridpar.runtime.optimizer import make_factory
from hybridpar.runtime.pieces import Piece, Stored, write
from hybridpar.runtime.process import Process
from tests.support.checkpoints import OPTIMIZERS
from tests.support.processes import spawn
from tests.support.runs import train_by_command
from tests.support.training import Case, make_case

SAMPLES = (13, 13, 13, 9)
SAVED_AFTER = 2


@dataclass(frozen=True)
class Task:
    """A training on all ranks of a plan: from its begin, or from what another task has saved."""

    name: str
    sharding: str
    origin: str | None = None
    origin_ranks: int = 2
    same_plan: bool = False


@dataclass(frozen=True)
class Outcome:
    """What a task left on one rank; beside it lies a checkpoint of the end, ``NAME, end``."""

    losses: list[float]
    """Of the steps after the checkpoint."""
    saved: dict[str, tuple[int, int]]
    """Of every flat tensor of the checkpoint, where the rank's slice begins and how long it is."""
    masters_equal: bool
    """Whether after restoring DeepSpeed's copies of the parameters are the parameters."""


def make_plan(case: Case, kind: str, sharding: str) -> Plan:
    """A front and a tail on two ranks, or a front alone on two or three, of uneven shares."""
    chain = case.traced.chain
    cut, last = chain.tail_start, len(chain.layers)
    if kind == "front_tail":
        front = Stage("front", 3, (Segment((0, cut), (0, 1), (2.0, 1.0)),))
        tail = Stage("tail", 4, (Segment((cut, last), (0, 1)),), ("column", "row", "column"))
        world, stages = 2, (front, tail)
    else:
        world = int(kind.removeprefix("front_of_"))
        shares = (2.0, *[1.0] * (world - 1))
        stages = (Stage("front", 3, (Segment((0, last), tuple(range(world)), shares),)),)
    recipe = Recipe(sharding=sharding)  # type: ignore[arg-type]
    plan = Plan(chain.model, chain.fingerprint, world, 13, "float32", stages, bucket_bytes=1, recipe=recipe)
    validate(plan, chain)
    return plan


def go_on(case: Case, job: Job, stop: int) -> list[float]:
    return [
        job.step((case.data[n][0].float(), case.data[n][1]), samples=SAMPLES[n]) for n in range(job.steps, stop)
    ]


def masters_equal(job: Job) -> bool:
    """Whether DeepSpeed's float32 copies are the parameters."""
    mappings = [(o.tensor, getattr(o.tensor, "_hp_mapping", None)) for o in job.parameters.values()]
    return all(
        torch.equal(m.hp_fragment, p.detach().flatten()[m.lp_fragment_address.start :][: m.hp_fragment.numel()])
        for p, m in mappings
        if m is not None
    )


def perform(task: Task, optimizer: str, kind: str, process: Process, communicators: Any, home: Path) -> Outcome:
    case, factory = make_case(dropout=0.2, samples=SAMPLES), make_factory(OPTIMIZERS[optimizer])
    job = Job(
        make_plan(case, kind, task.sharding),
        case.traced,
        case.source,
        factory,
        communicators,
        rank=process.rank,
        engines=zero.make_engines(process, factory, Recipe(sharding=task.sharding)),  # type: ignore[arg-type]
        seed=7,
    )
    saved = {}
    if task.origin is None:
        go_on(case, job, SAVED_AFTER)
        pieces = job.state.pieces()
        saved = {n: (p.offsets[0], p.tensor.numel()) for n, p in pieces.items() if len(p.offsets) == 1}
        save(home / task.name, process.rank, pieces)
    else:
        job.state.restore(Stored(home / task.origin, task.origin_ranks), same_plan=task.same_plan)
        job.go_on(SAVED_AFTER, sum(SAMPLES[:SAVED_AFTER]))
    equal = masters_equal(job)
    losses = go_on(case, job, len(SAMPLES))
    save(home / f"{task.name}, end", process.rank, job.state.pieces())
    return Outcome(losses, saved, equal)


def save(folder: Path, rank: int, pieces: Mapping[str, Piece]) -> None:
    folder.mkdir(exist_ok=True)
    write(folder, rank, pieces)


def run_rank(rank: int, folder: str, kind: str, tasks: Sequence[Task]) -> None:
    home, process = Path(folder), Process("cpu", 60.0)
    communicators = process.connect(make_plan(make_case(samples=SAMPLES), kind, "none"))
    outcomes = {}
    for optimizer in OPTIMIZERS:
        (home / optimizer).mkdir(exist_ok=True)
        for task in tasks:
            outcome = perform(task, optimizer, kind, process, communicators, home / optimizer)
            outcomes[optimizer, task.name] = vars(outcome)
            process.gather(None)  # all have written before any reads
    torch.save(outcomes, home / f"{kind}-{rank}.pt")
    process.gather(None)
    process.close()


def perform_all(folder: Path, kind: str, world: int, *tasks: Task) -> dict[tuple[str, str], list[Outcome]]:
    """Perform tasks with all optimizers; what they left on all ranks, by optimizer and task."""
    spawn(world, run_rank, str(folder), kind, tasks)
    ranks = [torch.load(folder / f"{kind}-{rank}.pt") for rank in range(world)]
    return {key: [Outcome(**rank[key]) for rank in ranks] for key in ranks[0]}


class Done:
    """All tasks, with all optimizers."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        front = perform_all(
            folder,
            "front_of_2",
            2,
            Task("sharded front", "zero1"),
            Task("sharded front, continued", "zero1", "sharded front", same_plan=True),
        )
        front_tail = perform_all(
            folder,
            "front_tail",
            2,
            Task("plain", "none"),
            Task("sharded", "zero1"),
            Task("sharded, continued", "zero1", "sharded", same_plan=True),
            Task("sharded to plain", "none", "sharded"),
            Task("plain to sharded", "zero1", "plain"),
            Task("sharded front to tail", "none", "sharded front"),
            Task("plain to sharded gradients", "zero2", "plain"),
            Task("sharded gradients", "zero2"),
            Task("sharded gradients, continued", "zero2", "sharded gradients", same_plan=True),
            Task("sharded gradients to plain", "none", "sharded gradients"),
            Task("sharded gradients to sharded state", "zero1", "sharded gradients"),
            Task("sharded front to sharded with tail", "zero1", "sharded front"),
        )
        three = perform_all(
            folder,
            "front_of_3",
            3,
            Task("two to three ranks", "zero1", "sharded front"),
            Task("two to three ranks, sharded gradients", "zero2", "sharded front"),
            Task("tail to three ranks", "zero1", "plain"),
        )
        self._outcomes = front | front_tail | three

    def outcomes(self, optimizer: str, task: str) -> list[Outcome]:
        """Of all ranks."""
        return self._outcomes[optimizer, task]

    def end(self, optimizer: str, task: str) -> dict[str, torch.Tensor]:
        """All that the ranks held in the end."""
        stored = Stored(self._folder / optimizer / f"{task}, end", len(self.outcomes(optimizer, task)))
        return {name: stored.read(name) for name in stored.tensors}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    pytest.importorskip("deepspeed")
    return Done(tmp_path_factory.mktemp("zero"))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("task", ["sharded", "sharded front", "sharded gradients"])
def test_the_same_plan_goes_on_bit_for_bit(done: Done, task: str, optimizer: str) -> None:
    continued = f"{task}, continued"
    for one, other in zip(done.outcomes(optimizer, task), done.outcomes(optimizer, continued), strict=True):
        assert one.losses == other.losses
    expected, got = done.end(optimizer, task), done.end(optimizer, continued)
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        assert torch.equal(value, got[name]), name


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    "task",
    [
        "sharded to plain",
        "plain to sharded",
        "sharded front to tail",
        "sharded front to sharded with tail",
        "plain to sharded gradients",
        "sharded gradients to plain",
        "sharded gradients to sharded state",
        "two to three ranks",
        "two to three ranks, sharded gradients",
        "tail to three ranks",
    ],
)
def test_another_plan_goes_on_with_the_same_training(done: Done, task: str, optimizer: str) -> None:
    for outcome in done.outcomes(optimizer, task):
        assert outcome.losses == pytest.approx(done.outcomes(optimizer, "plain")[0].losses, rel=1e-6)
        assert outcome.masters_equal
    expected, got = done.end(optimizer, "plain"), done.end(optimizer, task)
    for name, value in expected.items():
        if not name.startswith("generator/"):
            assert (got[name].view_as(value) - value).norm() <= 1e-6 * value.norm(), name


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_replica_saves_its_own_fragments(done: Done, optimizer: str) -> None:
    key = {"sgd": "momentum_buffer", "adamw": "exp_avg"}[optimizer]
    first, second = (
        {name: place for name, place in outcome.saved.items() if name.startswith(f"optimizer/{key}/")}
        for outcome in done.outcomes(optimizer, "sharded front")
    )
    lengths = [sum(length for _, length in saved.values()) for saved in (first, second)]
    assert abs(lengths[0] - lengths[1]) <= 4  # of padding
    on_both = first.keys() & second.keys()
    assert len(on_both) == 1
    for name in on_both:
        (start, length), (then, _) = first[name], second[name]
        assert (start, then) == (0, length)


# From the command line

SAVING = ("plan=data_parallel", "optimizer=adamw", "optimizer.sharding=zero1", "checkpoint.every=2")


def final(folder: Path) -> dict[str, torch.Tensor]:
    last = folders.complete(folder / "checkpoints")[-1]
    stored = Stored(last, Manifest.load(last).ranks)
    return {name: stored.read(name) for name in stored.tensors if not name.startswith("generator/")}


def test_a_sharded_run_is_continued_and_exported_from_the_command_line(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    train_by_command(2, cut, *SAVING, "train.steps=4")
    _, losses = train_by_command(2, whole, *SAVING, "train.steps=6")
    plan, continued = train_by_command(2, cut, *SAVING, "train.steps=6", "resume=auto")
    assert plan["recipe"]["sharding"] == "zero1"
    assert continued == losses
    expected, got = final(whole), final(cut)
    assert any(name.startswith("optimizer/exp_avg/") for name in expected)
    assert expected.keys() == got.keys()
    assert all(torch.equal(value, got[name]) for name, value in expected.items())
    export(cut, tmp_path / "model.safetensors")
    for name, value in safetensors.torch.load_file(tmp_path / "model.safetensors").items():
        assert torch.equal(value, expected[f"parameter/{name}"]), name
    origin = f"resume={cut / 'checkpoints' / 'step-00000004'}"
    alone, plain = train_by_command(1, tmp_path / "alone", *SAVING[:2], "train.steps=6", origin)
    assert alone["recipe"]["sharding"] == "none"
    assert plain == pytest.approx(losses[4:], rel=1e-5)
