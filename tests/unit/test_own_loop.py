"""The run's folder that a loop of one's own makes, in a single process."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import hybridpar
from hybridpar.cluster.describe import local
from hybridpar.errors import ConfigError, MonitorError
from hybridpar.planning.plan import Plan
from hybridpar.profiling.analytic import estimate
from hybridpar.report.comparison import compare
from hybridpar.report.run import Run
from hybridpar.runtime import feed

BATCH = torch.randn(2, 1, 4, 4), torch.tensor([0, 2])


def wrapped(*, known: bool = True) -> hybridpar.Job:
    """A job, of a plan that this process knows the prediction of, or not."""
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Flatten(), nn.Linear(12, 3))
    plan: Plan = hybridpar.plan(model, (1, 4, 4), 2, effort="quick")
    if not known:
        hybridpar.api._bases.clear()
    return hybridpar.wrap(model, plan, partial(torch.optim.SGD, lr=0.1))


def steps_of(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_steps_within_are_recorded_and_others_are_not(tmp_path: Path) -> None:
    job = wrapped()
    job.step(BATCH)
    with hybridpar.recording(job, tmp_path / "run", timeline=(1, 3), monitor="off") as folder:
        for _ in range(4):
            job.step(BATCH)
    job.step(BATCH)
    assert folder == tmp_path / "run"
    assert steps_of(folder) == [1, 2, 3, 4]
    run = Run.load(folder)
    assert [s.step for s in run.timings[0].steps] == [2, 3], "counted from the first that is recorded"
    assert [s.input_s for s in run.timings[0].steps] == [None, None], "nobody knows how batches by hand were made"
    assert compare(run) is not None
    assert job.observer is None


def test_a_loop_that_breaks_leaves_what_it_has(tmp_path: Path) -> None:
    def broken(job: hybridpar.Job) -> None:
        with hybridpar.recording(job, tmp_path / "run", timeline=(0, 9), monitor="off"):
            job.step(BATCH)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        broken(wrapped())
    assert steps_of(tmp_path / "run") == [0]
    assert len(Run.load(tmp_path / "run").timings[0].steps) == 1


def test_a_folder_with_another_run_is_refused_and_one_that_goes_on_keeps_its_steps(tmp_path: Path) -> None:
    record = partial(hybridpar.recording, folder=tmp_path, timeline=None, monitor="off")
    job = wrapped()
    with record(job):
        for _ in range(3):
            job.step(BATCH)
    other = wrapped()
    with (
        pytest.raises(ConfigError, match=f"folder: {tmp_path} holds a run already; give another one"),
        record(other),
    ):
        pass
    other.go_on(2, 4)
    with record(other):
        other.step(BATCH)
    assert steps_of(tmp_path) == [0, 1, 2]
    blocked = tmp_path / "file"
    blocked.write_text("")
    with (
        pytest.raises(ConfigError, match=f"folder: cannot write {blocked / 'run'}"),
        hybridpar.recording(wrapped(), blocked / "run"),
    ):
        pass


def test_a_plan_of_elsewhere_is_predicted_on_what_is_given(tmp_path: Path) -> None:
    job = wrapped(known=False)
    with hybridpar.recording(job, tmp_path / "bare", monitor="off"):
        job.step(BATCH)
    assert Run.load(tmp_path / "bare").basis is None
    job, cluster = wrapped(known=False), local(1)
    profile = estimate(job.chain, cluster.device, "float32")
    with hybridpar.recording(job, tmp_path / "run", monitor="off", profile=profile, cluster=cluster):
        job.step(BATCH)
    basis = Run.load(tmp_path / "run").basis
    assert basis is not None
    assert basis.chain == job.chain


def test_what_cannot_be_recorded_is_refused(tmp_path: Path) -> None:
    job = wrapped()
    with pytest.raises(ConfigError, match=r"timeline: \[3, 3\] must be \[first,last\]"):
        hybridpar.recording(job, tmp_path, timeline=(3, 3))
    with pytest.raises(ConfigError, match=r"trace.steps: \[12, 14\] overlaps train.timeline=\[10, 13\]"):
        hybridpar.recording(job, tmp_path, trace=(12, 14))
    with pytest.raises(ConfigError, match=r"monitor.interval_s: 0.01 is not in"):
        hybridpar.recording(job, tmp_path, interval_s=0.01)
    with (
        pytest.raises(MonitorError, match="monitor=required, but the job uses no GPU"),
        hybridpar.recording(job, tmp_path / "run", monitor="required"),
    ):
        pass


def test_a_feed_tells_how_long_a_batch_was_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for at 0 and 6, there at 5 and 9; at 20 there is no more."""
    data = [
        (torch.zeros(1, 4, 4), 0),
        (torch.ones(1, 4, 4), 1),
        (torch.ones(1, 4, 4), 2),
        (torch.ones(1, 4, 4), 0),
    ]
    loader = wrapped().loader(data)
    ticks = iter((0.0, 5.0, 6.0, 9.0, 20.0))
    monkeypatch.setattr(feed, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    assert [batch.waited_s for batch in loader] == [5.0, 3.0]
