"""A training records its timeline, and the report lays it over the simulated one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hybridpar.errors import ConfigError, RecordError
from hybridpar.planning.program import Action, Program
from hybridpar.report.comparison import compare, programs_of
from hybridpar.report.overlay import FILES
from hybridpar.report.run import Run
from hybridpar.runtime.callback import Callback
from hybridpar.runtime.executor import Executor
from hybridpar.runtime.job import Job
from hybridpar.runtime.journal import StepRecord
from tests.support.command import run
from tests.support.runs import small, train_by_command, train_here


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training in three stages on four ranks, five steps of which are recorded."""
    path = tmp_path_factory.mktemp("report") / "demo"
    train_by_command(
        4,
        path,
        "plan=three_stage",
        "plan.effort=quick",
        "train.steps=6",
        "train.timeline=[1,6]",
        "train.eval_every=1",
    )
    return path


def test_every_rank_leaves_a_record_of_the_window(folder: Path) -> None:
    found = Run.load(folder)
    assert [r.rank for r in found.timings] == [0, 1, 2, 3]
    assert {tuple(s.step for s in r.steps) for r in found.timings} == {(1, 2, 3, 4, 5)}
    assert found.basis is not None
    (program,) = programs_of(found, found.basis)
    for record in found.timings:
        for step in record.steps:
            assert len(step.actions) == len(program.actions[record.rank])
            told = {program.operations[i].content for i, _ in step.completions}
            assert "label" in told, "gloo tells when a collective is complete"


def test_the_comparison_covers_every_action(folder: Path) -> None:
    comparison = compare(Run.load(folder))
    assert comparison is not None
    assert comparison.steps == 4
    (program,) = programs_of(Run.load(folder), comparison.basis)
    kinds = [a.kind for own in program.actions for a in own]
    assert len(comparison.deviations) == len(kinds) - kinds.count("start")
    assert comparison.uncertainty_s == 0.0
    assert comparison.overlap.receives == sum(o.kind == "send" for o in program.operations)


def test_the_report_names_what_deviates_most(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = run(capsys, "report", str(folder))
    comparison = compare(Run.load(folder))
    assert comparison is not None
    first = comparison.deviations[0]
    line = next(line for line in out.splitlines() if line.startswith(first.name))
    assert f" {first.rank} " in line
    for said in ("where the step's time goes", "rank 3", "middle", "gradient buckets under backward", "memory"):
        assert said in out
    assert "steps          6, loss" in out
    assert out.rindex("\nadvice ") > out.rindex("largest deviations")


def test_two_runs_are_told_one_after_the_other(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = run(capsys, "report", str(folder), str(folder))
    assert out.count("largest deviations") == 2


def test_a_page_and_pictures_are_written(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, pictures = tmp_path / "report.html", tmp_path / "pictures"
    out, err = run(capsys, "report", str(folder), f"out={page}", f"pictures={pictures}")
    assert "largest deviations" in out
    assert f"page saved to {page}" in err
    assert "the step, predicted and measured" in page.read_text()
    assert {p.name for p in pictures.iterdir()} == set(FILES)


def test_what_cannot_be_drawn_or_written_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = copied(folder, tmp_path / "run", "plan.json", "metrics.jsonl", "profile.json", "cluster.yaml")
    _, err = run(capsys, "report", str(bare), f"pictures={tmp_path / 'p'}", code=2)
    assert "no timeline was recorded under this plan: train with train.timeline=[10,13]" in err
    _, err = run(capsys, "report", str(folder), str(folder), f"pictures={tmp_path / 'p'}", code=2)
    assert "are of one run's step; ask for them run by run" in err
    _, err = run(capsys, "report", str(folder), f"out={tmp_path / 'no' / 'page.html'}", code=2)
    assert err.startswith(f"hybridpar: out: cannot write {tmp_path / 'no' / 'page.html'}")
    out, _ = run(capsys, "report", str(folder), "advice=false")
    assert "\nadvice " not in out
    _, err = run(capsys, "report", str(folder), "advice=perhaps", code=2)
    assert "advice=false to leave the advice out" in err
    _, err = run(capsys, "report", str(folder), "colour=red", code=2)
    assert err.startswith("hybridpar: report ")
    assert "takes the folders of one or more runs, out=FILE.html for a page" in err


def test_a_folder_that_is_none_or_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, err = run(capsys, "report", str(tmp_path / "nowhere"), code=2)
    assert err.startswith(f"hybridpar: there is no folder {tmp_path / 'nowhere'}; ")
    _, err = run(capsys, "report", str(tmp_path), code=2)
    assert err.startswith(f"hybridpar: {tmp_path} is no run's folder: it lacks plan.json")
    _, err = run(capsys, "report", code=2)
    assert "takes the folders of one or more runs" in err
    assert err.count("\n") == 1


def copied(folder: Path, to: Path, *names: str) -> Path:
    to.mkdir()
    for name in names:
        (to / name).write_text((folder / name).read_text())
    return to


def test_without_a_timeline_the_report_says_how_to_record_one(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("plan.json", "metrics.jsonl", "profile.json", "cluster.yaml")
    out, _ = run(capsys, "report", str(copied(folder, tmp_path / "run", *names)))
    assert "no timeline was recorded under this plan: train with train.timeline=[10,13]" in out
    assert "what ran where" in out
    out, _ = run(capsys, "report", str(copied(folder, tmp_path / "old", "plan.json", "metrics.jsonl")))
    assert "the run kept no profile.json and cluster.yaml" in out


def test_a_line_that_is_cut_off_is_left_out_and_a_wrong_one_is_named(folder: Path, tmp_path: Path) -> None:
    path = copied(folder, tmp_path / "run", "plan.json", "metrics.jsonl") / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines, lines[0][:20]]))
    assert Run.load(path.parent).steps.count == 6
    path.write_text("\n".join([lines[0][:20], *lines]))
    with pytest.raises(RecordError, match=r"metrics.jsonl line 1 is not a JSON object"):
        Run.load(path.parent)
    wrong = {**json.loads((folder / "profile.json").read_text()), "schema": 0}
    (path.parent / "profile.json").write_text(json.dumps(wrong))
    (path.parent / "cluster.yaml").write_text((folder / "cluster.yaml").read_text())
    with pytest.raises(RecordError, match=rf"{path.parent}: profile.json: schema: 0 is not"):
        Run.load(path.parent)
    (path.parent / "profile.json").unlink()
    path.write_text(json.dumps({**json.loads(lines[0]), "step_s": "long"}) + "\n")
    with pytest.raises(RecordError, match=r"metrics.jsonl line 1: step_s: expected a number, got 'long'"):
        Run.load(path.parent)


# The window


def test_outside_the_window_nothing_is_observed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = []
    run = Executor.run

    def seen(executor: Executor, *given: object, **more: object) -> object:
        watched.append(executor.observer is not None)
        return run(executor, *given, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(Executor, "run", seen)
    train_here(tmp_path, "train.steps=5", "train.timeline=[1,3]", "train.eval_every=null")
    assert watched[:5] == [False, True, True, False, False]


class Counts(Callback):
    """Observes all steps by itself."""

    def __init__(self) -> None:
        self.actions = 0

    def on_start(self, job: Job) -> None:
        job.observe(self.note)

    def note(self, program: Program, action: Action, start_s: float, end_s: float) -> None:
        del program, action, start_s, end_s
        self.actions += 1


COUNTS: list[Counts] = []


def counting() -> Counts:
    COUNTS.append(Counts())
    return COUNTS[-1]


@pytest.mark.parametrize("window", ["null", "[1,3]", "[7,9]"])
def test_a_users_own_observer_goes_on(tmp_path: Path, window: str) -> None:
    train_here(tmp_path, "train.steps=3", f"train.timeline={window}", f"train.callbacks=[{__name__}:counting]")
    config = small(f"run.dir={tmp_path}")
    assert COUNTS[-1].actions >= 3 * config.train.global_batch // 8
    assert (tmp_path / "timeline").exists() == (window == "[1,3]")
    COUNTS.clear()


class Breaks(Callback):
    """Fails after the third step."""

    def on_step(self, record: StepRecord) -> None:
        if record.step == 2:
            raise ZeroDivisionError("broken on purpose")


def test_a_training_that_breaks_inside_the_window_leaves_what_it_has(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        train_here(tmp_path, "train.steps=5", "train.timeline=[1,100]", f"train.callbacks=[{__name__}:Breaks]")
    found = Run.load(tmp_path)
    assert [s.step for s in found.timings[0].steps] == [1, 2]
    assert found.summary is None


@pytest.mark.parametrize("window", ["[3,3]", "[-1,2]"])
def test_a_window_that_is_none_is_refused(window: str) -> None:
    with pytest.raises(ConfigError, match=r"train.timeline: \[.*\] must be \[first,last\]"):
        small(f"train.timeline={window}")
