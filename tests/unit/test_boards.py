"""Where scalars are shown: TensorBoard; Weights & Biases and MLflow by packages that only note what they get."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hybridpar.config import compose
from hybridpar.doctor.examine import _packages
from hybridpar.errors import ConfigError
from hybridpar.runtime.checks import check_config
from tests.support.checkpoints import SAVING
from tests.support.runs import train_here

WANDB = """
import json
class Run:
    def __init__(self, **given):
        self.file = open(given["dir"] + "/noted", "a")
        self.note(["init", given])
    def note(self, what):
        self.file.write(json.dumps(what) + "\\n")
    def log(self, values, step):
        self.note(["log", step, values])
    def finish(self):
        self.note(["finish"])
        self.file.close()
def init(**given):
    return Run(**given)
"""

MLFLOW = """
import json
from types import SimpleNamespace
class MlflowClient:
    def __init__(self, tracking_uri):
        self.file = tracking_uri.removeprefix("sqlite:///").removesuffix("mlflow.db") + "noted"
        self.note(["client", tracking_uri])
    def note(self, what):
        with open(self.file, "a") as file:
            file.write(json.dumps(what) + "\\n")
    def get_experiment_by_name(self, name):
        return None
    def create_experiment(self, name):
        return "7"
    def create_run(self, experiment, run_name):
        self.note(["run", experiment, run_name])
        return SimpleNamespace(info=SimpleNamespace(run_id="r1"))
    def log_batch(self, run, metrics=(), params=()):
        assert len(params) <= 100
        self.note(["batch", run, [vars(m) for m in metrics], [vars(p) for p in params]])
    def set_terminated(self, run):
        self.note(["end", run])
"""

ENTITIES = """
class Metric:
    def __init__(self, key, value, timestamp, step):
        self.key, self.value, self.step = key, value, step
class Param:
    def __init__(self, key, value):
        self.key, self.value = key, value
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes a package of some files to be imported in this test alone."""

    def make(name: str, **files: str) -> None:
        folder = tmp_path / "packages" / name
        folder.mkdir(parents=True)
        for stem, text in files.items():
            (folder / f"{stem}.py").write_text(text)
            monkeypatch.delitem(sys.modules, name if stem == "__init__" else f"{name}.{stem}", raising=False)
        monkeypatch.syspath_prepend(folder.parent)

    return make


def noted(folder: Path) -> list[list[object]]:
    return [json.loads(line) for line in (folder / "noted").read_text().splitlines()]


def metrics(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_weights_and_biases_gets_what_tensorboard_gets(tmp_path: Path, package: Callable[..., None]) -> None:
    """A run that goes on is the same run of W&B."""
    package("wandb", __init__=WANDB)
    folder = tmp_path / "mine"
    folder.mkdir()
    both = (*SAVING, "train.loggers=[tensorboard,wandb]", "train.eval_every=1")
    train_here(folder, *both, "train.steps=6")
    train_here(folder, *both, "train.steps=10", "resume=auto")
    (init, *logs, finish) = noted(folder)[: noted(folder).index(["finish"]) + 1]
    again = next(entry for entry in noted(folder)[len(logs) + 2 :] if entry[0] == "init")
    assert finish == ["finish"]
    given = init[1]
    assert isinstance(given, dict)
    assert (given["project"], given["name"], given["resume"]) == ("hybridpar", "mine", "allow")
    assert given["config"]["train"]["steps"] == 6
    assert again[1]["id"] == given["id"]  # type: ignore[index]
    losses = {e[1]: e[2]["loss"] for e in noted(folder) if e[0] == "log" and "loss" in e[2]}  # type: ignore[index, operator]
    assert [losses[step] for step in range(10)] == metrics(folder)
    shown = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert {"loss", "lr", "samples_per_s", "test_loss", "test_accuracy"} <= set(shown.Tags()["scalars"])
    assert [e.value for e in shown.Scalars("loss")] == pytest.approx(metrics(folder))
    names = {name for e in noted(folder) if e[0] == "log" for name in e[2]}  # type: ignore[attr-defined]
    assert names == set(shown.Tags()["scalars"])


def test_mlflow_gets_parameters_once_and_all_metrics(tmp_path: Path, package: Callable[..., None]) -> None:
    package("mlflow", __init__=MLFLOW, entities=ENTITIES)
    folder = tmp_path / "mine"
    folder.mkdir()
    train_here(folder, *SAVING, "train.loggers=[mlflow]", "train.steps=6")
    train_here(folder, *SAVING, "train.loggers=[mlflow]", "train.steps=10", "resume=auto")
    entries = noted(folder)
    assert entries[0] == ["client", f"sqlite:///{folder}/mlflow.db"]
    assert [e[1:] for e in entries if e[0] == "run"] == [["7", "mine"]]
    batches = [e for e in entries if e[0] == "batch"]
    parameters = {p["key"]: p["value"] for b in batches for p in b[3]}  # type: ignore[attr-defined]
    assert (parameters["train.steps"], parameters["optimizer.name"]) == ("6", "SGD")
    losses = {m["step"]: m["value"] for b in batches for m in b[2] if m["key"] == "loss"}  # type: ignore[attr-defined]
    assert [losses[step] for step in range(10)] == metrics(folder)
    assert entries.count(["end", "r1"]) == 2
    assert not (folder / "tensorboard").exists()


def test_a_logger_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Before anything is begun, and by the doctor."""
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else there(name))
    config = compose(["train.loggers=[tensorboard,wandb]", f"run.dir={tmp_path}/run"])
    with pytest.raises(ConfigError, match=r"train\.loggers: wandb is not installed; pip install wandb"):
        check_config(config)
    assert "wandb is not installed" in [f.what for f in _packages(config) if f.status == "wrong"]


def test_a_logger_is_one_of_three_and_given_once() -> None:
    with pytest.raises(ConfigError, match=r"train\.loggers\[0\].*'tensorboard', 'wandb', 'mlflow'"):
        compose(["train.loggers=[tensorbored]"])
    with pytest.raises(ConfigError, match=r"train\.loggers: \['wandb', 'wandb'\] must name each one once"):
        compose(["train.loggers=[wandb,wandb]"])
