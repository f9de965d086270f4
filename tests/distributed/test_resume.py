"""Checkpoints of jobs: what a job was, another one becomes: under the same plan bit for bit."""

from __future__ import annotations

import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from hybridpar.errors import CheckpointError, ConfigError, DamageError, DivergenceError
from hybridpar.model.deferred import defer
from hybridpar.model.trace import trace
from hybridpar.planning.plan import Plan
from hybridpar.report.summary import show
from hybridpar.runtime import intact, pieces, resume
from hybridpar.runtime import manifest as folders
from hybridpar.runtime.communicators import ProcessGroups
from hybridpar.runtime.job import Job
from hybridpar.runtime.manifest import Manifest
from hybridpar.runtime.modules import Owned
from hybridpar.runtime.pieces import Piece, Stored, write
from hybridpar.runtime.process import Process
from tests.support.checkpoints import OPTIMIZERS, SAVING, make_job, normed_case, plan_of
from tests.support.runs import WORKER, run, small, train_here
from tests.support.threads import run_ranks
from tests.support.training import Case, assemble, make_case


def go_on(case: Case, job: Job) -> list[float]:
    """The steps that are left."""
    return [job.step(case.data[n], samples=len(case.data[n][1])) for n in range(job.steps, case.steps)]


def trained(case: Case, plan: Plan, folder: Path, optimizer: str) -> list[tuple[list[float], dict[str, Any]]]:
    """Train, save after two steps, go on; the losses after that, and all that the job holds at the end."""

    def body(rank: int, groups: ProcessGroups) -> tuple[list[float], dict[str, Any]]:
        job = make_job(case, plan, rank, groups, optimizer)
        for x, y in case.data[:2]:
            job.step((x, y), samples=len(y))
        write(folder, rank, job.state.pieces())
        return go_on(case, job), {n: p.copied().tensor for n, p in job.state.pieces().items()}

    return run_ranks(plan, body)


def resumed(
    case: Case, plan: Plan, folder: Path, ranks: int, optimizer: str, *, same_plan: bool
) -> list[tuple[list[float], dict[str, Any], list[Owned]]]:
    def body(rank: int, groups: ProcessGroups) -> tuple[list[float], dict[str, Any], list[Owned]]:
        job = make_job(case, plan, rank, groups, optimizer)
        job.state.restore(Stored(folder, ranks), same_plan=same_plan)
        job.go_on(2, 26)
        losses = go_on(case, job)
        held = {n: p.copied().tensor for n, p in job.state.pieces().items()}
        return losses, held, list(job.parameters.values())

    return run_ranks(plan, body)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", ["alone", "data_parallel", "front_tail", "pipeline", "replicas"])
def test_the_same_plan_goes_on_bit_for_bit(tmp_path: Path, kind: str, optimizer: str) -> None:
    case = normed_case()
    plan = plan_of(case, kind)
    expected = trained(case, plan, tmp_path, optimizer)
    got = resumed(case, plan, tmp_path, plan.world, optimizer, same_plan=True)
    for (losses, held), (again, found, _) in zip(expected, got, strict=True):
        assert losses == again
        assert held.keys() == found.keys()
        for name, value in held.items():
            assert torch.equal(value, found[name]), name


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("front_tail", "alone"),
        ("alone", "front_tail"),
        ("data_parallel", "replicas"),
        ("replicas", "pipeline"),
        ("pipeline", "data_parallel"),
        ("front_tail", "replicas"),
    ],
)
def test_another_plan_goes_on_with_the_same_training(
    tmp_path: Path, before: str, after: str, optimizer: str
) -> None:
    """Without batch norm, whose statistics depend on micro-batches; with dropout, which does not."""
    case = make_case(steps=4, samples=(13, 13, 13, 9), dropout=0.3)
    plan, other = plan_of(case, before), plan_of(case, after)
    (expected, _), *_ = trained(case, plan, tmp_path / "", optimizer)
    got = resumed(case, other, tmp_path, plan.world, optimizer, same_plan=False)
    for losses, _, _ in got:
        assert losses == pytest.approx(expected, rel=1e-10)
    whole = trained(case, plan_of(case, "alone"), _new(tmp_path / "single"), optimizer)[0][1]
    for name, value in assemble([owned for _, _, owned in got]).items():
        reference = whole[f"parameter/{name}"]
        assert (value - reference).norm() <= 1e-10 * reference.norm(), name


def _new(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_statistics_of_batch_norms_become_their_mean_under_another_plan(tmp_path: Path) -> None:
    case = normed_case()
    plan = plan_of(case, "data_parallel")
    trained(case, plan, tmp_path, "sgd")
    stored = Stored(tmp_path, 3)
    name = next(n for n in stored.tensors if n.startswith("buffer/0/") and n.endswith("running_mean")).split("/")[
        2
    ]
    values = [stored.read(f"buffer/{copy}/{name}") for copy in range(3)]
    assert not torch.equal(values[0], values[1])

    def body(rank: int, groups: ProcessGroups) -> torch.Tensor:
        job = make_job(case, plan_of(case, "alone"), rank, groups)
        job.state.restore(stored, same_plan=False)
        return job.state.pieces()[f"buffer/0/{name}"].tensor

    (found,) = run_ranks(plan_of(case, "alone"), body)
    torch.testing.assert_close(found, torch.stack(values).mean(0))


class Tied(nn.Module):
    """Two linears of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(x.flatten(1)))
        return self.head(torch.relu(self.second(x)))  # type: ignore[no-any-return]


def test_tied_weights_are_saved_once_and_stay_tied(tmp_path: Path) -> None:
    source = defer(Tied)
    case = Case(source, trace(source.module, (6,), "tied"), 4, (13, 13, 13, 9))
    plan = replace(plan_of(case, "data_parallel"))
    expected = trained(case, plan, tmp_path, "adamw")
    names = [n for n in Stored(tmp_path, 3).tensors if n.startswith("parameter/") and n.endswith("weight")]
    assert len(names) == 2
    ((single, _, _),) = resumed(case, plan_of(case, "alone"), tmp_path, 3, "adamw", same_plan=False)
    assert single == pytest.approx(expected[0][0], rel=1e-10)


class Shared(nn.Module):
    """Two stages that have one batch norm, of buffers only."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)
        self.norm = nn.BatchNorm1d(6, affine=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.first(x))
        return self.head(torch.relu(self.norm(self.second(x))))  # type: ignore[no-any-return]


def test_a_buffer_that_two_stages_have_is_saved_for_each(tmp_path: Path) -> None:
    """It was written twice under one name, and no such checkpoint could be read."""
    source = defer(Shared)
    case = Case(source, trace(source.module, (6,), "shared"), 4, (12, 12, 12, 8))
    plan = plan_of(case, "pipeline")
    expected = trained(case, plan, tmp_path, "sgd")
    names = {n for n in Stored(tmp_path, 2).tensors if n.endswith("running_mean")}
    assert names == {"buffer/0/norm.running_mean", "buffer/0.1/norm.running_mean"}
    for (losses, held), (again, found, _) in zip(
        expected, resumed(case, plan, tmp_path, 2, "sgd", same_plan=True), strict=True
    ):
        assert losses == again
        assert all(torch.equal(value, found[name]) for name, value in held.items())
    ((single, _, _),) = resumed(case, plan_of(case, "alone"), tmp_path, 2, "sgd", same_plan=False)
    assert len(single) == 2


# Whole trainings, in this process


def lines(path: Path) -> list[dict[str, Any]]:
    timing = {"step_s", "samples_per_s", "time_s"}
    return [
        {k: v for k, v in json.loads(line).items() if k not in timing} for line in path.read_text().splitlines()
    ]


def final(folder: Path) -> dict[str, torch.Tensor]:
    last = folders.complete(folder / "checkpoints")[-1]
    stored = Stored(last, Manifest.load(last).ranks)
    return {name: stored.read(name) for name in stored.tensors if not name.startswith("generator/")}


@pytest.mark.parametrize("step", [2, 5, 8])
def test_a_run_that_was_cut_off_ends_as_if_it_had_not_been(tmp_path: Path, step: int) -> None:
    """In the middle of an epoch, at its end, and with a half-written line and a half-written checkpoint."""
    train_here(tmp_path / "whole", *SAVING)
    train_here(tmp_path / "cut", *SAVING)
    home = tmp_path / "cut" / "checkpoints"
    for path in folders.complete(home):
        if int(path.name[5:]) > step:
            path.rename(home / f".{path.name}.partial")
    (tmp_path / "cut" / "summary.json").unlink()
    metrics = tmp_path / "cut" / "metrics.jsonl"
    metrics.write_text(metrics.read_text()[:-9])
    train_here(tmp_path / "cut", *SAVING, "resume=auto")
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        assert lines(tmp_path / "cut" / name) == lines(tmp_path / "whole" / name)
    assert not list(home.glob(".*"))
    expected, got = final(tmp_path / "whole"), final(tmp_path / "cut")
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        assert torch.equal(value, got[name]), name


def test_auto_begins_anew_without_a_checkpoint_and_refuses_a_complete_run(tmp_path: Path) -> None:
    assert train_here(tmp_path, *SAVING, "resume=auto").steps == 10
    with pytest.raises(
        CheckpointError, match=r"the training has 10: it is complete; set train.steps or train.epochs higher"
    ):
        train_here(tmp_path, *SAVING, "resume=auto")
    assert train_here(tmp_path, *SAVING, "resume=auto", "train.steps=12").steps == 12


def test_a_checkpoint_by_its_path_begins_a_run_of_its_own(tmp_path: Path) -> None:
    train_here(tmp_path / "first", *SAVING)
    train_here(tmp_path / "second", *SAVING, "train.steps=12", f"resume={tmp_path / 'first'}")
    assert [line["step"] for line in lines(tmp_path / "second" / "metrics.jsonl")] == [10, 11]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.seed=1", "with train.seed 0, but here it is 1"),
        ("data.size=48", "with a number of training samples .* 40, but here it is 48"),
        ("optimizer=adamw", "with optimizer.name SGD, but here it is AdamW"),
        ("model.options.width=5", "a chain of layers"),
        ("train.global_batch=12", "made 16 samples into an epoch, where no step of train.global_batch=12 begins"),
    ],
)
def test_a_checkpoint_of_another_training_is_refused(tmp_path: Path, override: str, said: str) -> None:
    saving = [s for s in SAVING if not override.startswith(s.split("=")[0])]
    train_here(tmp_path / "first", *SAVING)
    origin = tmp_path / "first" / "checkpoints" / "step-00000002"
    with pytest.raises(CheckpointError, match=said):
        train_here(tmp_path / "second", *saving, override, f"resume={origin}")
    assert not (tmp_path / "second").exists()


DAMAGES = {
    "truncated": ("rank-0.bin", lambda content: content[:20], r"rank-0.bin has 20 bytes, but \d+ were written"),
    "other bytes": (
        "rank-0.bin",
        lambda content: bytes(b ^ 1 for b in content),
        "are not those that were written",
    ),
    "half a manifest": ("checkpoint.json", lambda content: content[:20], "checkpoint.json is not JSON"),
    "another plan": ("checkpoint.json", lambda content: content.replace(b'"stages"', b'"phases"'), "plan"),
}


def spoil(folder: Path, damage: str) -> str:
    """Damage a checkpoint, and return what is said of it."""
    name, change, said = DAMAGES[damage]
    file = folder / name
    file.write_bytes(change(file.read_bytes()))
    return said


@pytest.mark.parametrize("damage", DAMAGES)
def test_auto_goes_on_from_the_last_checkpoint_that_is_intact(
    tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """It says which ones are damaged and why, keeps them aside, and ends as the run did before."""
    train_here(tmp_path, *SAVING)
    expected, records = final(tmp_path), lines(tmp_path / "metrics.jsonl")
    *_, good, early, latest = folders.complete(tmp_path / "checkpoints")
    said = [spoil(latest, damage), spoil(early, "truncated")]
    assert train_here(tmp_path, *SAVING, "resume=auto").steps == 10
    told = [line for line in capsys.readouterr().err.splitlines() if "is kept as" in line]
    for line, why, folder in zip(told, said, (latest, early), strict=True):
        assert re.search(rf"^hybridpar: .*{why}.*from {good.name}, .*is kept as {folder.name}.damaged$", line)
        assert folder.with_name(f"{folder.name}.damaged").is_dir()
    assert lines(tmp_path / "metrics.jsonl") == records
    got = final(tmp_path)
    assert all(torch.equal(value, got[name]) for name, value in expected.items())


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_that_is_named_is_refused_with_the_one_before_it(tmp_path: Path, damage: str) -> None:
    """Whether it is noticed when it is looked for, or when it is read."""
    first = tmp_path / "first"
    train_here(first, *SAVING, "train.epochs=1")
    *_, before, latest = folders.complete(first / "checkpoints")
    said = rf"{spoil(latest, damage)}.*; the one before it is {before}: give that one by resume="
    with pytest.raises(DamageError, match=said):
        train_here(tmp_path / "second", *SAVING, f"resume={latest}")
    assert latest.is_dir()


def test_auto_does_not_begin_anew_where_all_are_damaged(tmp_path: Path) -> None:
    train_here(tmp_path, *SAVING, "train.epochs=1", "checkpoint.keep=2")
    records = (tmp_path / "metrics.jsonl").read_text()
    for folder in folders.complete(tmp_path / "checkpoints"):
        (folder / "checkpoint.json").unlink()
    with pytest.raises(DamageError, match=r"has no checkpoint.json.*none of the 1 before it is intact; to begin"):
        train_here(tmp_path, *SAVING, "resume=auto")
    assert (tmp_path / "metrics.jsonl").read_text() == records


def test_a_damaged_manifest_before_the_latest_stops_no_save(tmp_path: Path) -> None:
    judged = ("checkpoint.every=2", "checkpoint.keep=1", "checkpoint.best=loss", "data.size=40")
    train_here(tmp_path, *judged[:1], "checkpoint.keep=2", *judged[2:], "train.epochs=1")
    spoil(folders.complete(tmp_path / "checkpoints")[0], "half a manifest")
    assert train_here(tmp_path, *judged, "train.epochs=2", "resume=auto").steps == 10


def test_the_latest_and_the_best_stay(tmp_path: Path) -> None:
    train_here(
        tmp_path,
        "checkpoint.every=2",
        "checkpoint.keep=1",
        "checkpoint.best=loss",
        "data.size=40",
        "train.epochs=3",
    )
    losses = {line["step"]: line["loss"] for line in lines(tmp_path / "evaluations.jsonl")}
    best = min(losses, key=lambda step: losses[step])
    stay = {int(p.name[5:]) for p in folders.complete(tmp_path / "checkpoints")}
    assert stay == {best, 15}


def test_a_restart_before_the_first_own_checkpoint_keeps_the_plan_that_is_asked_for(tmp_path: Path) -> None:
    """``resume=PATH`` begins under any plan, also where torchrun begins it a second time."""
    first = tmp_path / "first"
    train_here(first, *SAVING)
    chain = Manifest.load(folders.find(first)).subject.chain
    asked = small(f"run.dir={tmp_path / 'second'}", f"resume={first}")
    restarted = Process("cpu")
    restarted.place = replace(restarted.place, restarts=1)
    for config, kept in ((asked, False), (small(f"run.dir={first}"), True)):
        folder = intact.look(config, restarted).folder
        assert folder is not None
        assert folder.parent == first / "checkpoints"
        assert (resume.former_plan(config, folder, chain) is not None) == kept


def test_what_a_best_checkpoint_was_judged_by_is_not_mixed(tmp_path: Path) -> None:
    """A loss of 1.2 is not worse than an accuracy of 0.9."""
    judged = ("checkpoint.every=100", "checkpoint.keep=1", "data.size=40", "train.eval_every=1")
    train_here(tmp_path, *judged, "checkpoint.best=accuracy", "train.epochs=1")
    train_here(tmp_path, *judged, "checkpoint.best=loss", "train.epochs=3", "resume=auto")
    manifests = [Manifest.load(p) for p in folders.complete(tmp_path / "checkpoints")]
    assert {m.judged_by for m in manifests} == {"loss"}
    best = min(line["loss"] for line in lines(tmp_path / "evaluations.jsonl")[1:])
    assert min(m.metric for m in manifests if m.metric is not None) == best


def test_another_batch_needs_the_steps_of_the_whole_training(tmp_path: Path) -> None:
    """Steps of one size and epochs of another do not add up."""
    train_here(tmp_path, "checkpoint.every=5", "data.size=48", "train.steps=6")
    other = ("checkpoint.every=5", "data.size=48", "train.global_batch=16", "resume=auto")
    with pytest.raises(CheckpointError, match=r"global_batch=8, but here it is 16: .* give train.steps"):
        train_here(tmp_path, *other, "train.epochs=9")
    assert train_here(tmp_path, *other, "train.steps=8").steps == 8


def test_an_epoch_that_would_have_no_step_left_is_over(tmp_path: Path) -> None:
    """Of 20 samples the step after 16 is dropped from now on."""
    train_here(tmp_path, "checkpoint.every=2", "data.size=20", "train.steps=2")
    summary = train_here(
        tmp_path, "checkpoint.every=2", "data.size=20", "train.steps=5", "train.drop_last=true", "resume=auto"
    )
    assert summary.steps == 5
    assert [line["epoch"] for line in lines(tmp_path / "metrics.jsonl")] == [0, 0, 1, 1, 2]


def test_a_run_without_checkpoints_is_not_erased_by_going_on(tmp_path: Path) -> None:
    train_here(tmp_path, "train.epochs=1")
    records = (tmp_path / "metrics.jsonl").read_text()
    with pytest.raises(ConfigError, match=r"has ended and left no checkpoint to go on from"):
        train_here(tmp_path, "train.epochs=2", "resume=auto")
    assert (tmp_path / "metrics.jsonl").read_text() == records


def test_a_run_that_goes_on_has_no_summary_until_it_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An old one once stood for a training that was killed before it wrote its own."""
    train_here(tmp_path, *SAVING)
    monkeypatch.setattr("hybridpar.runtime.trainer.summarise", None)
    with pytest.raises(TypeError):
        train_here(tmp_path, *SAVING, "train.steps=12", "resume=auto")
    assert not (tmp_path / "summary.json").exists()
    monkeypatch.undo()
    assert train_here(tmp_path, *SAVING, "train.steps=12", "resume=auto").steps == 12


def with_slow_steps(folder: Path) -> Path:
    """The run's first steps took 1,000 s each, if one believes its records."""
    path = folder / "metrics.jsonl"
    slow = [{**json.loads(line), "step_s": 1000.0} for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line) + "\n" for line in slow))
    return folder


def test_only_steps_of_the_present_plan_are_compared_with_its_prediction(tmp_path: Path) -> None:
    """Also in a third process, and where nothing is left to do under the present plan."""
    train_here(tmp_path, *SAVING, "train.steps=6")
    same = train_here(with_slow_steps(tmp_path), *SAVING, "train.steps=8", "resume=auto")
    assert same.measured_step_s == 1000
    other = train_here(with_slow_steps(tmp_path), *SAVING, "train.steps=9", "resume=auto", micro_batch=4)
    assert other.measured_step_s is not None
    assert other.measured_step_s < 500
    assert other.samples_per_s == 8 / other.measured_step_s
    assert other.total_s > 8000
    third = train_here(tmp_path, *SAVING, "train.steps=10", "resume=auto", micro_batch=4)
    assert third.measured_step_s is not None
    assert third.measured_step_s < 500
    (tmp_path / "summary.json").unlink()
    none = train_here(tmp_path, *SAVING, "train.steps=10", "resume=auto", micro_batch=2)
    assert (none.measured_step_s, none.samples_per_s) == (None, None)
    show(none, Console(file=io.StringIO()))


def test_parameters_that_are_not_finite_replace_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss of a step is that before its update."""
    step = Job.step

    def spoiling(job: Job, *given: Any, **more: Any) -> float:
        loss = step(job, *given, **more)
        if job.steps == 3:
            next(iter(job.parameters.values())).tensor.data.fill_(torch.nan)
        return loss

    monkeypatch.setattr(Job, "step", spoiling)
    with pytest.raises((CheckpointError, DivergenceError)):
        train_here(tmp_path, *SAVING, "checkpoint.asynchronous=false", "checkpoint.keep=1")
    assert [p.name for p in folders.complete(tmp_path / "checkpoints")] == ["step-00000002"]


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    append, seen = pieces._append, []

    def full(file: Any, name: str, piece: Piece) -> Any:
        seen.append(name)
        if "step-00000003" in str(file.name) and name.startswith("optimizer"):
            raise OSError(28, "No space left on device")
        return append(file, name, piece)

    monkeypatch.setattr(pieces, "_append", full)
    with pytest.raises(
        CheckpointError, match=r"No space left on device; the last good one is .*step-00000002: free"
    ):
        train_here(tmp_path, *SAVING)
    home = tmp_path / "checkpoints"
    assert sorted(p.name for p in home.iterdir()) == ["step-00000001", "step-00000002"]
    monkeypatch.undo()
    assert train_here(tmp_path, *SAVING, "resume=auto").steps == 10


# Kills


def start(ranks: int, *arguments: str) -> subprocess.Popen[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return subprocess.Popen(
        [sys.executable, *launcher, str(WORKER), *arguments],
        env={**os.environ, "PYTHONPATH": str(WORKER.parents[2]), "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def ranks_of(process: subprocess.Popen[str]) -> list[int]:
    found = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return sorted(int(pid) for pid in found)


@dataclass(frozen=True)
class Kill:
    """A rank's end: so long after so many lines of metrics."""

    lines: int
    after_s: float
    rank: int


def draw(count: int, ranks: int) -> list[Kill]:
    """Moments from a few steps after a start on: a step here takes some 10 ms, and so does a save."""
    drawn, at = random.Random(count), 0  # noqa: S311
    kills = []
    for _ in range(count):
        at += drawn.randrange(2, 9)
        kills.append(Kill(at, drawn.uniform(0, 0.04), drawn.randrange(ranks)))
    return kills


def run_until_killed(kill: Kill, ranks: int, metrics: Path, *arguments: str) -> None:
    process = start(ranks, *arguments)
    deadline_s = time.monotonic() + 90
    while process.poll() is None and time.monotonic() < deadline_s:
        if metrics.exists() and metrics.read_text().count("\n") >= kill.lines and len(ranks_of(process)) == ranks:
            time.sleep(kill.after_s)
            os.kill(ranks_of(process)[kill.rank], signal.SIGKILL)
            break
        time.sleep(0.002)
    assert process.wait(60) != 0, f"the job ended before {kill}"


@pytest.mark.parametrize(
    ("ranks", "plan", "kills"),
    [
        (2, "front_tail", 3),
        pytest.param(4, "three_stage", 30, marks=[pytest.mark.slow, pytest.mark.timeout(1800)]),
    ],
    ids=["three", "thirty"],
)
def test_killed_ranks_change_nothing_of_the_result(tmp_path: Path, ranks: int, plan: str, kills: int) -> None:
    """During steps, saves that go on beside them, and evaluations."""
    moments = draw(kills, ranks)
    steps = moments[-1].lines + 10
    arguments = (plan, f"train.steps={steps}", "checkpoint.every=2", "train.eval_every=5", "train.mode=quiet")
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    for kill in moments:
        run_until_killed(kill, ranks, cut / "metrics.jsonl", *arguments, f"run.dir={cut}", "resume=auto")
    for folder in (cut, whole):
        done = run(ranks, *arguments, f"run.dir={folder}", "resume=auto")
        assert done.returncode == 0, done.stderr
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        assert lines(cut / name) == lines(whole / name)
    expected, got = final(whole), final(cut)
    assert all(torch.equal(value, got[name]) for name, value in expected.items())


# SIGTERM


@pytest.mark.parametrize(("ranks", "workers"), [pytest.param(1, 0, marks=pytest.mark.slow), (2, 0), (2, 1)])
def test_sigterm_ends_after_a_step_that_is_saved(tmp_path: Path, ranks: int, workers: int) -> None:
    """The launcher's own exit code says that it was told to end; what counts is what the ranks leave.

    It signals whole process groups: processes that read ahead are not to end before the ranks.
    """
    shape = "single" if ranks == 1 else "data_parallel"
    arguments = (shape, "train.global_batch=24", "checkpoint.every=100000", "train.mode=quiet")
    arguments = (*arguments, f"data.workers={workers}")
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    process = start(ranks, *arguments, f"run.dir={cut}", "train.steps=100000")
    metrics, deadline_s = cut / "metrics.jsonl", time.monotonic() + 90
    while not (metrics.exists() and metrics.read_text().count("\n") >= 5) and time.monotonic() < deadline_s:
        time.sleep(0.01)
    process.terminate()
    process.wait(60)
    (saved,) = folders.complete(cut / "checkpoints")
    step = int(saved.name[5:])
    assert len(lines(metrics)) == step
    assert not (cut / "summary.json").exists()
    more = f"train.steps={step + 3}"
    assert run(ranks, *arguments, f"run.dir={cut}", "resume=auto", more).returncode == 0
    assert run(ranks, *arguments, f"run.dir={whole}", more).returncode == 0
    assert lines(metrics) == lines(whole / "metrics.jsonl")
    expected, got = final(whole), final(cut)
    assert all(torch.equal(value, got[name]) for name, value in expected.items())


def test_a_signal_between_epochs_ends_the_run_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an epoch of five steps, the fifth: the evaluation that is due is made, and the next epoch not begun."""
    step = Job.step

    def signalled(job: Job, *given: Any, **more: Any) -> float:
        if job.steps == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(job, *given, **more)

    monkeypatch.setattr(Job, "step", signalled)
    with pytest.raises(AssertionError):
        train_here(tmp_path, *SAVING, "train.eval_every=1")  # there is no summary
    assert [line["step"] for line in lines(tmp_path / "evaluations.jsonl")] == [5]
    assert folders.complete(tmp_path / "checkpoints")[-1].name == "step-00000005"
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert train_here(tmp_path, *SAVING, "train.eval_every=1", "resume=auto").steps == 10
