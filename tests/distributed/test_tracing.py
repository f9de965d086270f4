"""A training has a few steps traced by torch's profiler, whatever becomes of that."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from hybridpar.errors import ConfigError
from hybridpar.report.kernels import load
from hybridpar.report.run import Run
from hybridpar.runtime import tracer
from hybridpar.runtime.executor import Executor
from hybridpar.runtime.tracer import Tracer
from tests.support.runs import small, train_by_command, train_here

TRACED = ("train.steps=4", "train.timeline=null", "monitor.trace.steps=[1,3]")


def test_traced_steps_are_summed_up_by_stage_on_every_rank(tmp_path: Path) -> None:
    train_by_command(2, tmp_path, "plan=front_tail", "plan.effort=quick", *TRACED)
    run = Run.load(tmp_path)
    records = load(tmp_path, 2, run.plan.fingerprint)
    assert [r.rank for r in records] == [0, 1]
    for record in records:
        assert (record.source, record.steps) == ("cpu", (2,))
        assert set(record.stages) == {"front", "tail"}
        for use in record.stages.values():
            assert 0 < use.busy_s < use.window_s
            assert use.occupancy is None
        busy_s = sum(use.busy_s for use in record.stages.values())
        assert record.device.busy_s == pytest.approx(busy_s, rel=1e-6), "on a CPU one after the other"
    with gzip.open(tmp_path / "trace" / "rank1.trace.json.gz", "rt") as file:
        names = {event["name"] for event in json.load(file)["traceEvents"]}
    assert {"hybridpar/step/1", "hybridpar/step/2", "hybridpar/tail/micro-batch 0/backward"} <= names
    assert "hybridpar/step/3" not in names
    assert {p.name for p in (tmp_path / "trace").iterdir()} == {
        f"rank{rank}.{kind}" for rank in (0, 1) for kind in ("json", "trace.json.gz")
    }


def test_outside_the_window_actions_carry_no_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named = []
    run = Executor.run

    def seen(executor: Executor, *given: object, **more: object) -> object:
        named.append(executor.scope is not None)
        return run(executor, *given, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(Executor, "run", seen)
    train_here(tmp_path, *TRACED, "train.eval_every=null")
    assert named[:4] == [False, True, True, False]


@pytest.mark.parametrize("broken", ["_start", "_end"])
def test_a_profiler_that_fails_ends_no_training(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(_: Tracer) -> None:
        raise RuntimeError("broken on purpose")

    monkeypatch.setattr(Tracer, broken, fails)
    assert train_here(tmp_path, *TRACED).steps == 4
    failure = "does not start" if broken == "_start" else "wrote no trace"
    assert f"the profiler of rank 0 {failure}: broken on purpose" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("does", "patience_s", "said"),
    [
        ("echo no space left >&2; exit 1", 60.0, "no space left"),
        ("exec sleep 99", 0.1, "that took more than 0.1 s"),
    ],
)
def test_sums_that_fail_or_hang_are_told(
    does: str,
    patience_s: float,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(tracer, "command", lambda _: ["sh", "-c", does])
    monkeypatch.setattr(tracer, "PATIENCE_S", patience_s)
    assert train_here(tmp_path, *TRACED).steps == 4
    assert f"left a trace that is not summed up: {said}" in capsys.readouterr().out


def test_a_training_that_ends_within_the_window_leaves_its_trace(tmp_path: Path) -> None:
    train_here(tmp_path, "train.steps=3", "train.timeline=null", "monitor.trace.steps=[1,100]")
    (record,) = load(tmp_path, 1, Run.load(tmp_path).plan.fingerprint)
    assert record.steps == (2,)


def test_windows_that_are_none_or_overlap_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"monitor.trace.steps: \[3, 3\] must be \[first,last\]"):
        small("monitor.trace.steps=[3,3]")
    with pytest.raises(ConfigError, match=r"monitor.trace.steps: \[12, 14\] overlaps train.timeline=\[10, 13\]"):
        train_here(tmp_path, "train.steps=3", "monitor.trace.steps=[12,14]")
