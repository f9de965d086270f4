"""Sweeps: one table over all combinations, each model traced once, mistakes in their rows."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from hybridpar import planner
from hybridpar.config import Config, expand
from hybridpar.errors import ConfigError
from hybridpar.profiling.analytic import estimate
from hybridpar.profiling.record import Profile
from tests.support.command import run

SMALL = ("model=small_vgg", "train.global_batch=16")


# Expanding overrides


def test_combinations_vary_the_last_key_fastest() -> None:
    sweep = expand(["model.in_shape=[3,64,64]", "cluster=a,b", "train.global_batch=64,128"])
    assert sweep.keys == ("cluster", "train.global_batch")
    assert sweep.points == (("a", "64"), ("a", "128"), ("b", "64"), ("b", "128"))
    assert sweep.overrides(("b", "64")) == ("model.in_shape=[3,64,64]", "cluster=b", "train.global_batch=64")


@pytest.mark.parametrize(
    ("override", "values"),
    [
        ("train.global_batch=range(1,4)", ["1", "2", "3"]),
        ("train.global_batch=choice(8,16)", ["8", "16"]),
        ("plan.front.ranks=[0,1],[2,3]", ["[0,1]", "[2,3]"]),
        ("model.options.width=4,8", ["4", "8"]),
        ("cluster=glob(*00_*)", ["h100_1x8", "p100_4x1_40g", "v100_2x8"]),
    ],
)
def test_hydra_s_sweep_syntax_is_understood(override: str, values: list[str]) -> None:
    assert [point[0] for point in expand([override]).points] == values


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.global_batch=64"], "-m varies nothing"),
        ([], "-m varies nothing"),
        (["train.global_batch=interval(1,2)"], "no values to go through"),
        (["cluster=glob(z*)"], "no values to go through"),
        (["cluster=a,b", "cluster=c"], "cluster: given twice; write its values as cluster=a,b"),
        (["cluster=a,b", "explain=true"], "explain: of no use with -m"),
        (["cluster=a,b", "diff=plan.json"], "diff: of no use with -m"),
        (["cluster=a,b", "plan.global_batch_range=[8,16]"], "plan.global_batch_range: of no use with -m"),
        (["format=text,json"], "format: of no use with -m"),
        (["a==,,"], "cannot read override"),
    ],
)
def test_what_cannot_be_swept_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        expand(overrides)
    assert message in str(caught.value)


# The table


def test_a_sweep_is_one_table_and_traces_a_model_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    traced = []
    original = planner.load_model

    def counted(config: Config) -> Any:
        traced.append(config.model.name)
        return original(config)

    monkeypatch.setattr(planner, "load_model", counted)
    varied = ("cluster=p100_4x1_40g,h100_1x8,nowhere", "train.global_batch=16,32")
    out, err = run(capsys, "plan", "-m", "model=small_vgg", *varied)
    assert traced == ["small_vgg"]
    assert "4 of 6 combinations have a plan" in out
    rows = [line for line in out.splitlines() if re.match(r"(p100_4x1_40g|h100_1x8|nowhere) ", line)]
    assert [row.split()[:2] for row in rows] == [
        [cluster, batch] for cluster in ("p100_4x1_40g", "h100_1x8", "nowhere") for batch in ("16", "32")
    ]
    for row in rows[:4]:
        assert re.search(r"(data_parallel|pipeline|front_tail|three_stage) +[\d.]+ ms +[\d,]+ +\d\.\d\d ", row)
    for row in rows[4:]:
        assert "unknown cluster=nowhere" in row
    assert "3 of 6: cluster=h100_1x8 train.global_batch=16" in err
    assert max(map(len, out.splitlines())) <= 160


def test_two_models_are_traced_once_each(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    traced = []
    original = planner.load_model

    def counted(config: Config) -> Any:
        traced.append(config.model.options["width"])
        return original(config)

    monkeypatch.setattr(planner, "load_model", counted)
    varied = ("model.options.width=4,8", "train.global_batch=4,8")
    run(capsys, "plan", "--multirun", "model=small_vgg", "plan=data_parallel", "cluster=p100_4x1_40g", *varied)
    assert traced == [4, 8]


def test_a_measured_profile_is_taken_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = []

    def instead(config: Config, traced: Any, _: Any, *, on_cpu: bool = False) -> Profile:
        taken.append(on_cpu)
        device = planner.from_config(config.cluster).device
        return estimate(traced.chain, device, config.train.precision)

    monkeypatch.setattr(planner, "measured", instead)
    fixed = ("model=small_vgg", "plan=data_parallel", "cluster=p100_4x1_40g", "profile=measured")
    run(capsys, "plan", "-m", *fixed, "profile.cache=false", "train.global_batch=4,8")
    assert taken == [False]


def test_a_sweep_as_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "sweep.json"
    varied = ("cluster=p100_4x1_40g,nowhere", "plan=pipeline,data_parallel")
    out, err = run(capsys, "plan", "-m", *SMALL, *varied, "format=json", f"out={path}")
    rows = json.loads(out)
    assert json.loads(path.read_text()) == rows
    assert f"plans saved to {path}" in err
    assert [row["overrides"] for row in rows] == [
        {"cluster": c, "plan": p} for c in ("p100_4x1_40g", "nowhere") for p in ("pipeline", "data_parallel")
    ]
    pipeline, data_parallel, *lost = rows
    assert (pipeline["shape"], data_parallel["shape"]) == ("pipeline", "data_parallel")
    assert data_parallel["speed_up"] == pytest.approx(1.0)
    gain = data_parallel["plan"]["prediction"]["step_s"] / pipeline["plan"]["prediction"]["step_s"]
    assert pipeline["speed_up"] == pytest.approx(gain)
    assert pipeline["error"] is None
    for row in lost:
        assert row["plan"] is row["shape"] is row["speed_up"] is row["reason"] is None
        assert "unknown cluster=nowhere" in row["error"]


def test_a_sweep_fails_only_if_every_combination_does(capsys: pytest.CaptureFixture[str]) -> None:
    tight = ("cluster=p100_4x1_40g", "cluster.device.memory_bytes=1000,2000")
    out, err = run(capsys, "plan", "-m", *SMALL, *tight, code=2)
    assert "0 of 2 combinations have a plan" in out
    assert "none of the 2 combinations has a plan; the first: no plan fits into memory" in err
    out, err = run(capsys, "plan", "-m", *SMALL, "cluster=nowhere,elsewhere", code=2)
    assert out == ""
    assert "unknown cluster=nowhere" in err


@pytest.mark.parametrize("command", ["train", "profile", "config"])
def test_only_plans_are_swept(capsys: pytest.CaptureFixture[str], command: str) -> None:
    _, err = run(capsys, command, "-m", "train.global_batch=1,2", code=2)
    assert err == f"hybridpar: {command} -m: only plans are swept; start one {command} per combination\n"


def test_a_sweep_runs_in_one_process(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    _, err = run(capsys, "plan", "-m", "train.global_batch=1,2", code=2)
    assert "start it without torchrun" in err


def test_a_sweep_s_file_is_checked_first(capsys: pytest.CaptureFixture[str]) -> None:
    out, err = run(capsys, "plan", "-m", *SMALL[:1], "train.global_batch=1,2", "out=/nowhere/s.json", code=2)
    assert out == ""
    assert "/nowhere/s.json" in err
    assert "1 of 2" not in err
