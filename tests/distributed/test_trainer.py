"""The training job in real processes: what it writes, and how it ends when something is wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from hybridpar.config import compose
from hybridpar.data import datasets
from hybridpar.errors import ConfigError, DataError, DivergenceError
from hybridpar.planner import load_model
from hybridpar.report.summary import Summary
from hybridpar.runtime import checks
from hybridpar.runtime.evaluation import Evaluation
from hybridpar.runtime.feed import Feed
from hybridpar.runtime.job import Job
from hybridpar.runtime.journal import check_run_dir
from hybridpar.runtime.process import Place
from hybridpar.schema import to_data
from tests.support.runs import run, run_by_torchrun, small, train_here
from tests.support.trainer_worker import make_plan


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """One epoch in three stages on four ranks."""
    folder = tmp_path_factory.mktemp("trainer") / "run"
    done = run(4, "three_stage", f"run.dir={folder}", "optimizer.clip=5.0", "train.seed=3", "optimizer.lr=0.1")
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_the_run_directory_holds_everything(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    names = {p.name for p in folder.iterdir()}
    assert names >= {
        "config.yaml",
        "plan.json",
        "metrics.jsonl",
        "evaluations.jsonl",
        "summary.json",
        "tensorboard",
    }
    assert yaml.safe_load((folder / "config.yaml").read_text())["train"]["seed"] == 3
    assert json.loads((folder / "plan.json").read_text())["world"] == 4
    assert any((folder / "tensorboard").iterdir())


def test_every_step_has_its_line(finished: tuple[Path, str]) -> None:
    lines = [json.loads(line) for line in (finished[0] / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(30))
    assert [line["samples"] for line in lines] == [48] * 29 + [1437 - 29 * 48]
    assert lines[-1]["loss"] < lines[0]["loss"]
    for line in lines:
        assert line["epoch"] == 0
        assert line["lr"] == 0.1
        assert line["samples_per_s"] == pytest.approx(line["samples"] / line["step_s"])


def test_the_summary_says_what_was_done(finished: tuple[Path, str]) -> None:
    folder, printed = finished
    summary = Summary.load(folder / "summary.json")
    assert (summary.test_samples, summary.steps, summary.epochs, summary.world) == (360, 30, 1, 4)
    assert 0.2 < summary.test_accuracy <= summary.test_top5 <= 1.0
    assert len(summary.measured_memory_bytes) == 4
    assert min(summary.measured_memory_bytes) > 0
    assert summary.predicted_step_s is None
    assert [(s.kind, s.degree, s.micro_batch) for s in summary.stages] == [
        ("front", 2, 8),
        ("middle", 2, 6),
        ("tail", 2, 16),
    ]
    assert summary.gpu.utilisation is None
    assert "no GPU" in (summary.gpu.reason or "")
    assert f"{summary.test_accuracy:.4f}" in printed
    assert str(folder) in printed
    assert json.loads((folder / "summary.json").read_text()) == json.loads(json.dumps(to_data(summary)))


def test_evaluation_counts_every_test_sample_once(finished: tuple[Path, str]) -> None:
    (line,) = (finished[0] / "evaluations.jsonl").read_text().splitlines()
    result = json.loads(line)
    assert (result["samples"], result["step"]) == (360, 30)
    for share in (result["top1"], result["top5"]):
        assert share * 360 == pytest.approx(round(share * 360))


def test_plan_replicas_train_as_a_single_process_does(tmp_path: Path) -> None:
    """Two replicas of two ranks with unequal shares and recomputation, a smaller last step, an evaluation."""
    data = ("data=synthetic", "data.size=120", "data.test_size=40", "train.global_batch=37", "train.epochs=2")
    common = ("train.precision=float64", "optimizer.clip=1.0", *data)
    losses, evaluations = [], []
    for ranks, shape in ((4, "replicas"), (1, "single")):
        folder = tmp_path / shape
        done = run(ranks, shape, f"run.dir={folder}", *common)
        assert done.returncode == 0, done.stderr
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [line["samples"] for line in lines] == [37, 37, 37, 120 - 3 * 37] * 2
        losses.append([line["loss"] for line in lines])
        evaluated = (folder / "evaluations.jsonl").read_text().splitlines()
        evaluations.append([json.loads(line) for line in evaluated])
    assert losses[0] == pytest.approx(losses[1], rel=1e-8)
    assert len(evaluations[0]) == len(evaluations[1]) == 2
    for one, other in zip(*evaluations, strict=True):
        assert one == pytest.approx(other, rel=1e-8)
    summary = Summary.load(tmp_path / "replicas" / "summary.json")
    assert (summary.world, summary.replicas, len(summary.measured_memory_bytes)) == (4, 2, 4)


def test_another_world_is_one_message_before_anything_starts(tmp_path: Path) -> None:
    done = run(1, "three_stage", f"run.dir={tmp_path / 'run'}")
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert "the plan is for 4 processes, but this job has 1" in line
    assert "torchrun --nproc-per-node 4" in line
    assert not (tmp_path / "run").exists()


def test_another_world_under_torchrun_is_said_once(tmp_path: Path) -> None:
    done = run_by_torchrun(2, "three_stage", f"run.dir={tmp_path / 'run'}")
    assert done.returncode != 0
    assert done.stderr.count("the plan is for 4 processes, but this job has 2") == 1
    assert "exitcode  : 2" in done.stderr
    assert 'trainer_worker.py", line' not in done.stderr


def test_a_failing_rank_ends_the_job(tmp_path: Path) -> None:
    done = run_by_torchrun(4, "three_stage", f"run.dir={tmp_path / 'run'}", BREAK_RANK="2")
    assert done.returncode != 0
    assert (
        "rank 2 failed in 'forward middle.0 (features.5..features.8) micro-batch 0': broken on purpose"
        in done.stderr
    )
    assert done.stderr.count("ZeroDivisionError: broken on purpose") == 1


def test_torchrun_restarts_a_failed_job(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    done = run_by_torchrun(2, "data_parallel", f"run.dir={folder}", "train.steps=2", restarts=1, BREAK_RANK="1")
    assert done.returncode == 0, done.stderr
    assert Summary.load(folder / "summary.json").steps == 2


def test_one_process_needs_no_torchrun(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    arguments = ("single", f"run.dir={folder}", "train.steps=2", "train.eval_every=null", "train.mode=quiet")
    done = run(1, *arguments)
    assert done.returncode == 0, done.stderr
    assert Summary.load(folder / "summary.json").test_samples == 360
    again = run(1, *arguments)
    assert again.returncode == 2
    assert "holds a run already" in again.stderr


def test_a_loss_that_is_not_finite_ends_the_job_once(tmp_path: Path) -> None:
    done = run_by_torchrun(
        2, "data_parallel", f"run.dir={tmp_path}", "train.steps=9", "optimizer.lr=1e30", "train.mode=plain"
    )
    assert done.returncode != 0
    (line,) = [text for text in done.stderr.splitlines() if "the loss is not finite" in text]
    assert "optimizer.lr, or set optimizer.clip" in line
    assert "exitcode  : 2" in done.stderr
    lines = strict((tmp_path / "metrics.jsonl").read_text())
    assert lines[-1]["loss"] is None
    assert all(isinstance(line["loss"], float) for line in lines[:-1])
    assert f"at step {lines[-1]['step']}: it arose in layer " in line
    assert re.search(r"of front, micro-batch 0 \(samples \d+\.\.\d+\) on rank [01]", line)


def strict(text: str) -> list[dict[str, Any]]:
    """Read lines of JSON, without the words for infinity and not-a-number that Python adds to it."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


# One process, in this one: two steps an epoch, eight test samples


def test_given_steps_decide_how_long_the_training_is(tmp_path: Path) -> None:
    """More steps than the epochs have were once cut down without a word."""
    summary = train_here(tmp_path, "train.steps=5", "train.epochs=1")
    assert (summary.steps, summary.epochs) == (5, 3)
    assert train_here(tmp_path / "epochs", "train.epochs=2").steps == 4


def test_workers_of_an_evaluation_end_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = []
    evaluate, close = Job.evaluate, Feed.close

    def evaluated(job: Job, feed: Feed) -> Evaluation:
        events.append(feed)
        return evaluate(job, feed)

    def closed(feed: Feed) -> None:
        events.append(feed)
        close(feed)

    monkeypatch.setattr(Job, "evaluate", evaluated)
    monkeypatch.setattr(Feed, "close", closed)
    train_here(tmp_path, "train.epochs=2")
    test_feed = events[0]
    assert events[:4] == [test_feed] * 4


def test_one_line_says_why_there_is_no_gpu_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_here(tmp_path, "monitor=auto")
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "no GPU data: the job uses no GPU on this node"
    assert sum("GPU" in line for line in printed) == 1


def test_a_warm_up_as_long_as_the_training_is_refused_before_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="warmup_steps: 2, but the training has 2 steps"):
        train_here(tmp_path / "run", "optimizer.schedule.warmup_steps=2")
    assert not (tmp_path / "run").exists()


def test_an_evaluation_that_is_not_finite_is_an_error_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Job, "evaluate", lambda *_: Evaluation(float("nan"), 0.0, 0.0, 8))
    with pytest.raises(
        DivergenceError,
        match=r"not finite \(nan\) in the evaluation after step 1: it arose in the loss.*; lower optim",
    ):
        train_here(tmp_path)
    (line,) = strict((tmp_path / "evaluations.jsonl").read_text())
    assert (line["loss"], line["top1"]) == (None, 0.0)


def test_an_occupied_folder_is_noticed_before_the_data_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "metrics.jsonl").touch()
    monkeypatch.setattr(datasets, "load", lambda *_: pytest.fail("loaded"))
    with pytest.raises(ConfigError, match="holds a run already"):
        train_here(tmp_path)


def test_folders_that_cannot_be_made_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check_run_dir(small())
    check_run_dir(small(f"run.dir={tmp_path}/a/b"))
    assert not list(tmp_path.iterdir())
    (tmp_path / "runs").touch()
    for config in (small(), small(f"run.dir={tmp_path}/runs/b")):
        with pytest.raises(ConfigError, match=rf"run\.dir: .* cannot be made in {tmp_path}/runs; give another"):
            check_run_dir(config)
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(ConfigError, match="holds a run already"):
        check_run_dir(small(f"run.dir={tmp_path}"))
    check_run_dir(small(f"run.dir={tmp_path}"), restarted=True)


def test_only_ranks_that_read_need_the_data(tmp_path: Path) -> None:
    """Nodes of the middle and the tail once had to hold the images too."""
    config = compose(["model=small_vgg", "data=image_folder", f"data.root={tmp_path}/none"])
    traced, _ = load_model(config)
    plan = make_plan("three_stage", config, traced.chain)
    for rank in (2, 3):
        checks.check(config, plan, traced.chain, Place(rank, 4, rank, 4))
    for rank in (0, 1):
        with pytest.raises(DataError, match=r"there is no .*/none/train"):
            checks.check(config, plan, traced.chain, Place(rank, 4, rank, 4))
