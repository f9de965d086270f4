"""Callbacks of a training: when they are called, and how they end it."""

import json

import pytest

from hybridpar.errors import ConfigError
from hybridpar.runtime.callback import make_callbacks
from tests.support.runs import run, train_here

OWN = "train.callbacks=[tests.support.own_code:Notes]"


def notes(path):
    return [tuple(json.loads(line)) for line in path.read_text().splitlines()]


def ended(monkeypatch, tmp_path, *overrides, **end):
    """What one process notes of 2 epochs of 2 steps, and its summary."""
    monkeypatch.setenv("NOTES", str(tmp_path / "notes"))
    monkeypatch.setenv("END", json.dumps({"0": end}))
    summary = train_here(tmp_path / "run", OWN, "train.epochs=2", "train.mode=quiet", *overrides)
    return notes(tmp_path / "notes-0.jsonl"), summary


def test_they_are_called_at_every_moment(monkeypatch, tmp_path):
    found, _ = ended(monkeypatch, tmp_path, "checkpoint.every=3")
    assert found == [
        ("start", 0),
        ("step", 0),
        ("step", 1),
        ("evaluation", 2),
        ("step", 2),
        ("checkpoint", 3),
        ("step", 3),
        ("evaluation", 4),
        ("checkpoint", 4),
        ("end", 0),
    ]


@pytest.mark.parametrize(("what", "at", "steps"), [("step", 0, 1), ("evaluation", 2, 2), ("checkpoint", 1, 2)])
def test_one_that_asks_for_it_ends_the_training(monkeypatch, tmp_path, what, at, steps):
    """With an evaluation and a summary, as after the last step."""
    found, summary = ended(monkeypatch, tmp_path, "checkpoint.every=1", **{what: at})
    assert summary is not None
    assert [n for n, _ in found].count("step") == steps
    assert found[-3:] == [("evaluation", steps), ("checkpoint", steps), ("end", 0)]


def test_one_rank_ends_all_after_the_same_step(tmp_path):
    """Rank 2 of 4 asks after its fourth step; rank 1 after an evaluation, had there been one."""
    end = json.dumps({"2": {"step": 3}})
    done = run(
        4,
        "three_stage",
        f"run.dir={tmp_path}/run",
        OWN,
        "metrics={recall: tests.support.own_code:recall}",
        NOTES=f"{tmp_path}/notes",
        END=end,
    )
    assert done.returncode == 0, done.stderr
    everyone = [notes(tmp_path / f"notes-{rank}.jsonl") for rank in range(4)]
    assert everyone == [everyone[0]] * 4
    assert everyone[0] == [("start", 0), *(("step", i) for i in range(5)), ("evaluation", 5), ("end", 0)]
    (line,) = (tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()
    assert 0 <= json.loads(line)["recall"] <= 1
    assert (tmp_path / "run" / "summary.json").exists()


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("Notes", "'Notes' is not of the form module:name"),
        ("nowhere:Notes", "nowhere:Notes cannot be imported: No module named 'nowhere'; put it on PYTHONPATH"),
        ("tests.support.own_code:Note", "tests.support.own_code has no Note; did you mean Notes"),
        ("tests.support.own_code:recall", "gives a OwnMetric; name a class that derives from hybridpar.Callback"),
    ],
)
def test_what_is_no_callback_is_refused(reference, message):
    with pytest.raises(ConfigError, match=f"train.callbacks: .*{message}|train.callbacks: {message}"):
        make_callbacks([reference])
