"""Evaluations after steps, and trainings that end when they no longer improve."""

import json
import math

import pytest

from hybridpar.errors import CheckpointError, ConfigError
from hybridpar.runtime import manifest as folders
from hybridpar.runtime.early_stop import EarlyStop, Patience
from hybridpar.runtime.evaluation import Evaluation
from hybridpar.train_section import EarlyStopConfig
from tests.support.runs import run, small, train_here

CONSTANT = (
    "metrics.constant=tests.support.own_code:constant",
    "train.early_stop.metric=constant",
    "data.size=24",
    "checkpoint.every=1",
)


def evaluations(folder):
    return [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]


def ended_after(metric, figures, patience=2, least=0.0):
    """After how many evaluations of one figure each it ends; None: it does not."""
    early = EarlyStop(EarlyStopConfig(metric, patience, least), {})
    for count, figure in enumerate(figures, 1):
        early.note(10 * count, Evaluation(figure, figure, 1.0, 8))
        if early.over:
            return count, early.reason
    return None


@pytest.mark.parametrize(
    ("metric", "figures", "least", "found"),
    [
        (
            "accuracy",
            [0.1, 0.3, 0.2, 0.4, 0.4, 0.3, 0.5],
            0,
            (6, "has not improved on 0.4000, after step 40, in 2"),
        ),
        ("loss", [3.0, 2.0, 2.5, 1.0, 1.0, 2.0], 0, (6, "has not improved on 1.0000, after step 40, in 2")),
        ("loss", [3.0, 2.0, 1.95, 1.9, 1.8], 0.1, (4, "has not improved on 2.0000, after step 20, in 2")),
        ("loss", [3.0, 2.0, 1.8, 1.6], 0.1, None),
        ("accuracy", [0.5, 0.4, 0.6, 0.5], 0, None),
        ("accuracy", [math.nan, 0.4, math.nan, math.nan], 0, (4, "not improved on 0.4000, after step 20, in 2")),
        ("accuracy", [math.nan, math.nan], 0, (2, "was no number in 2 evaluations")),
    ],
)
def test_it_ends_after_as_many_evaluations_that_are_no_better(metric, figures, least, found):
    ended = ended_after(metric, figures, least=least)
    assert (ended is None) == (found is None)
    if ended is not None:
        assert ended[0] == found[0]
        assert f"{metric} " in ended[1]
        assert found[1] in ended[1]


def test_what_another_metric_has_waited_does_not_count():
    settings = EarlyStopConfig("loss", 2)
    assert EarlyStop(settings, {}, Patience("loss", 1.0, 5, 2)).over
    assert EarlyStop(settings, {}, Patience("accuracy", 1.0, 5, 2)).patience == Patience("loss")


def test_an_end_that_comes_early_is_one_with_everything(tmp_path, capsys):
    """Three steps per epoch; the first evaluation is the best one. Checkpoint, line and summary say so."""
    summary = train_here(tmp_path, *CONSTANT, "train.epochs=9", "train.early_stop.patience=2", "train.mode=plain")
    assert (summary.steps, summary.epochs) == (9, 3)
    assert summary.ended_early == "constant has not improved on 1.0000, after step 3, in 2 evaluations"
    assert f"ended early: {summary.ended_early}" in capsys.readouterr().out
    assert [line["step"] for line in evaluations(tmp_path)] == [3, 6, 9]
    assert folders.complete(tmp_path / "checkpoints")[-1].name == "step-00000009"


def test_the_last_step_is_no_early_end(tmp_path):
    summary = train_here(tmp_path, *CONSTANT, "train.epochs=3", "train.early_stop.patience=2")
    assert (summary.steps, summary.ended_early) == (9, None)


def test_a_run_that_goes_on_goes_on_waiting(tmp_path):
    """Cut off after the second of four evaluations, between two of them; then with more patience."""
    often = (*CONSTANT, "train.eval_every_steps=2", "train.eval_every=null", "train.early_stop.patience=3")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    expected = train_here(whole, *often, "train.steps=30")
    train_here(cut, *often, "train.steps=5")
    last = folders.complete(cut / "checkpoints")[-1]
    last.rename(last.with_name(f".{last.name}.partial"))
    found = train_here(cut, *often, "train.steps=30", "resume=auto")
    assert (found.steps, found.ended_early) == (expected.steps, expected.ended_early) == (8, expected.ended_early)
    assert evaluations(cut) == evaluations(whole)
    assert [line["step"] for line in evaluations(cut)] == [2, 4, 6, 8]
    with pytest.raises(CheckpointError, match=r"after 8 steps, where train.early_stop ended .*patience higher"):
        train_here(cut, *often, "train.steps=30", "resume=auto")
    more = [o for o in often if "patience" not in o]
    found = train_here(cut, *more, "train.early_stop.patience=4", "train.steps=30", "resume=auto")
    assert (found.steps, [line["step"] for line in evaluations(cut)]) == (10, [2, 4, 6, 8, 10])


def test_an_end_before_its_summary_is_only_summed_up(tmp_path):
    train_here(tmp_path, *CONSTANT, "train.epochs=9", "train.early_stop.patience=1")
    (tmp_path / "summary.json").unlink()
    found = train_here(tmp_path, *CONSTANT, "train.epochs=9", "train.early_stop.patience=1", "resume=auto")
    assert found.steps == 6
    assert found.ended_early == "constant has not improved on 1.0000, after step 3, in 1 evaluation"


def test_evaluations_after_steps_and_after_epochs(tmp_path):
    """Of five steps, two per epoch; one that is due for both reasons is made once."""
    train_here(tmp_path, "train.steps=5", "train.eval_every=2", "train.eval_every_steps=3")
    assert [(line["step"], line["epoch"]) for line in evaluations(tmp_path)] == [(3, 1), (4, 1), (5, 2)]


def test_an_evaluation_amid_an_epoch_changes_nothing_of_the_training(tmp_path):
    losses = []
    for name, every in (("with", 1), ("without", "null")):
        train_here(tmp_path / name, "train.epochs=2", "data.size=40", f"train.eval_every_steps={every}")
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.early_stop.patience=0", "train.early_stop.patience: 0 must be at least 1"),
        ("train.early_stop.min_improvement=-1", "train.early_stop.min_improvement: -1.0 must be"),
        ("train.eval_every_steps=0", "train.eval_every_steps: 0 must be at least 1"),
        ("train.early_stop.metric=los", "train.early_stop.metric: there is no metric los; did you mean loss"),
    ],
)
def test_what_is_impossible_is_refused(tmp_path, override, said):
    with pytest.raises(ConfigError, match=said):
        train_here(tmp_path, override)


def test_an_early_stop_needs_evaluations():
    with pytest.raises(ConfigError, match=r"train.early_stop.metric: loss needs evaluations before the end"):
        small("train.early_stop.metric=loss", "train.eval_every=null")


def test_all_ranks_end_after_the_same_evaluation(tmp_path):
    """The metric gets worse on rank 0, and better on the other."""
    done = run(
        2,
        "data_parallel",
        f"run.dir={tmp_path}/run",
        "metrics.falling=tests.support.own_code:falling",
        "train.early_stop={metric: falling, patience: 2}",
        "train.eval_every_steps=1",
        "train.steps=9",
        "train.mode=quiet",
    )
    assert done.returncode == 0, done.stderr
    assert [line["falling"] for line in evaluations(tmp_path / "run")] == [-1, -2, -3]
    reason = json.loads((tmp_path / "run" / "summary.json").read_text())["ended_early"]
    assert reason == "falling has not improved on -1.0000, after step 1, in 2 evaluations"
