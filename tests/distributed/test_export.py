"""What a training has learned leaves it as a plain state dict, and a training begins with one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from hybridpar.errors import CheckpointError, ConfigError
from hybridpar.model.deferred import defer
from hybridpar.model.trace import trace
from hybridpar.planner import load_model
from hybridpar.runtime import manifest as folders
from hybridpar.runtime.communicators import ProcessGroups
from hybridpar.runtime.export import export
from hybridpar.runtime.manifest import Manifest, Position, Subject
from hybridpar.runtime.pieces import write
from hybridpar.runtime.state import State
from hybridpar.schema import to_data
from tests.support.checkpoints import SAVING, batch_normed, make_job, normed_case, plan_of
from tests.support.command import run
from tests.support.runs import small, train_here
from tests.support.threads import run_ranks


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("kind", ["alone", "front_tail", "replicas"])
def test_a_plain_model_takes_what_any_plan_has_trained(tmp_path: Path, kind: str, suffix: str) -> None:
    case = normed_case()
    plan, home, out = plan_of(case, kind), tmp_path / "checkpoints", tmp_path / f"model{suffix}"
    folder = folders.partial(home, 2)
    folder.mkdir(parents=True)

    def body(rank: int, groups: ProcessGroups) -> tuple[dict[str, str], dict[str, Any]]:
        job = make_job(case, plan, rank, groups)
        for x, y in case.data[:2]:
            job.step((x, y), samples=len(y))
        write(folder, rank, job.state.pieces())
        held = {o.name: (o.dim, o.start, o.tensor.detach().clone()) for o in job.parameters.values()}
        return job.state.names(case.source.module), held

    results = run_ranks(plan, body)
    subject = Subject("normed", case.traced.chain.fingerprint, "float64", "SGD", 7, "none", 26)
    folders.commit(home, Manifest(Position(2, 0, 26), subject, plan.world, to_data(plan), results[0][0]))
    done = export(tmp_path, out)
    assert (done.step, done.unused) == (2, ())
    loaded = safetensors.torch.load_file(out) if suffix == ".safetensors" else torch.load(out, weights_only=True)
    model = batch_normed().double()
    model.load_state_dict(loaded, strict=True)
    whole = dict(model.named_parameters())
    for _, held in results:
        for name, (dim, start, tensor) in held.items():
            part = whole[name] if dim is None else whole[name].narrow(dim, start, tensor.shape[dim])
            assert torch.equal(part, tensor), name
    assert not torch.equal(model[1].running_mean, torch.zeros(4))
    assert not list(tmp_path.glob(".*"))


def test_a_run_is_exported_from_the_command_line_and_begun_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_here(tmp_path / "run", *SAVING)
    out = tmp_path / "model.safetensors"
    _, said = run(capsys, "export", str(tmp_path / "run"), f"out={out}")
    assert re.search(r"tensors of .*step-00000010 \(step 10\) saved to ", said)
    trained = safetensors.torch.load_file(out)
    _, source = load_model(small(f"model.weights={out}"))
    assert source.module.state_dict().keys() == trained.keys()
    for name, value in trained.items():
        assert torch.equal(source.materialize(name, 0), value), name
    once = ("train.steps=1", *SAVING)
    again = train_here(tmp_path / "again", f"model.weights={out}", *once)
    assert again.train_loss != pytest.approx(train_here(tmp_path / "anew", *once).train_loss, rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "takes a run's folder or a checkpoint's, out=FILE"),
        (("somewhere",), "takes a run's folder or a checkpoint's, out=FILE"),
        (("nowhere", "out=model.pt"), "nowhere holds no checkpoint; give the folder of"),
        (("nowhere", "out=model.onnx"), "out: model.onnx has none of the suffixes .safetensors, .pt, .pth"),
        (("nowhere", "out=none/model.pt"), "out: none/model.pt lies in no existing folder"),
    ],
)
def test_what_cannot_be_exported_is_said_in_one_line(
    arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _, err = run(capsys, "export", *arguments, code=2)
    assert said in err
    assert err.count("\n") == 1


def test_a_manifest_names_only_parameters_and_buffers(tmp_path: Path) -> None:
    case = normed_case()
    plan, home = plan_of(case, "alone"), tmp_path / "checkpoints"
    folder = folders.partial(home, 1)
    folder.mkdir(parents=True)

    def body(rank: int, groups: ProcessGroups) -> None:
        write(folder, rank, make_job(case, plan, rank, groups).state.pieces())

    run_ranks(plan, body)
    subject = Subject("normed", "", "float64", "SGD", 7, "none", 26)
    names = {"x": "generator/0/cpu"}
    folders.commit(home, Manifest(Position(1, 0, 13), subject, 1, to_data(plan), names))
    with pytest.raises(CheckpointError, match="generator/0/cpu names neither a parameter nor a buffer"):
        export(tmp_path, tmp_path / "model.pt")


def test_a_file_that_cannot_be_written_stays_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_here(tmp_path / "run", *SAVING)
    out = tmp_path / "model.pt"
    out.write_text("before")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(ConfigError, match=r"cannot write .*model.pt: No space left on device"):
        export(tmp_path / "run", out)
    assert out.read_text() == "before"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.pt", "run"]


def test_a_tied_parameter_is_written_under_each_of_its_names() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
            self.two.weight = self.one.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.two(self.one(x).relu())
            return y

    source = defer(Tied)
    traced = trace(source.module, (3,), "tied")
    state = State(traced, (), {}, {}, {}, 0, 0, 0, torch.device("cpu"))
    assert state.names(source.module) == {
        "one.weight": "parameter/one.weight",
        "two.weight": "parameter/one.weight",
    }
