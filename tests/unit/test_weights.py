"""Beginning with the weights of a file."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from hybridpar.errors import ModelError
from hybridpar.model.deferred import Part, Source, defer
from hybridpar.model.weights import Weights


class Net(nn.Module):
    """A tied weight, a batch norm and a buffer that is not saved."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        self.two.weight = self.one.weight
        self.norm, self.head = nn.BatchNorm1d(3), nn.Linear(3, classes)
        self.register_buffer("mask", torch.arange(3.0), persistent=False)


def source(classes: int = 4) -> Source:
    return defer(lambda: Net(classes))


def saved(path: Path, **changed: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Save a state dict of random numbers, with some entries changed, or left out where they are None."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        state = {
            name: torch.randn_like(t) if t.is_floating_point() else t for name, t in Net().state_dict().items()
        }
    state["two.weight"] = state["one.weight"].clone()
    for name, value in changed.items():
        key = name.replace("__", ".")
        state.pop(key, None)
        if value is not None:
            state[key] = value
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=path.suffix == ".pt")
    return state


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])
def test_every_tensor_comes_from_the_file(tmp_path: Path, suffix: str) -> None:
    """The last suffix stands for the old format of torch.save, which torchvision's files have."""
    path = tmp_path / f"model{suffix}"
    state = saved(path)
    weights = Weights(source(), path)
    for name, value in state.items():
        found = weights.materialize(name, 0, torch.float64)
        assert found.dtype == (torch.float64 if value.is_floating_point() else value.dtype)
        assert torch.equal(found, value.to(found.dtype)), name
    for part in (Part(0, 1, 3), Part(1, 0, 2)):
        cut = weights.materialize("head.weight", 0, torch.float64, part)
        assert torch.equal(cut, part.of(state["head.weight"]).double())
        assert torch.equal(weights.materialize("two.weight", 0, part=part), part.of(state["one.weight"]))
    assert torch.equal(weights.materialize("mask", 0, part=Part(0, 1, 2)), torch.ones(1))
    assert torch.equal(weights.materialize("mask", 0), torch.arange(3.0))
    weights.materialize("head.bias", 0).zero_()
    assert torch.equal(weights.materialize("head.bias", 0), state["head.bias"]), "nobody shares a value"


@pytest.mark.parametrize("lost", ["one__weight", "two__weight"])
def test_a_tied_weight_may_have_any_of_its_names(tmp_path: Path, lost: str) -> None:
    state = saved(tmp_path / "model.pt", **{lost: None})
    weights = Weights(source(), tmp_path / "model.pt")
    (value,) = (state[name] for name in ("one.weight", "two.weight") if name in state)
    for name in ("one.weight", "two.weight"):
        assert torch.equal(weights.materialize(name, 0), value)


def test_a_new_head_keeps_its_initial_values(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    state = saved(path)
    weights, plain = Weights(source(7), path, ["head.*"]), source(7)
    for name in ("head.weight", "head.bias"):
        assert torch.equal(weights.materialize(name, 5), plain.materialize(name, 5))
    assert torch.equal(weights.materialize("one.weight", 5), state["one.weight"])


@pytest.mark.parametrize(
    ("changed", "fresh", "said"),
    [
        ({"norm__bias": None}, (), "lacks norm.bias; give the weights of this model, or name in model.fresh"),
        ({"other": torch.ones(1)}, (), "has, but the model has not, other;"),
        (
            {"head__bias": torch.ones(9)},
            (),
            r"has head.bias in the shape \[9\], but the model needs \[4\]; set model.fresh=\[head.\*\]",
        ),
        (
            {},
            ("tail.*",),
            "model.fresh: tail.* matches no parameter of the model, whose last ones are .*head.bias",
        ),
    ],
)
def test_what_does_not_fit_is_named(
    tmp_path: Path, changed: dict[str, Any], fresh: tuple[str, ...], said: str
) -> None:
    saved(tmp_path / "model.pt", **changed)
    with pytest.raises(ModelError, match=said):
        Weights(source(), tmp_path / "model.pt", fresh)


class Hostile:
    """Unpickling this makes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return Path.touch, (self.target,)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_nothing_but_tensors_is_read(tmp_path: Path, suffix: str) -> None:
    path, trap = tmp_path / f"model{suffix}", tmp_path / "trap"
    contents: list[tuple[bytes, str]] = [
        (pickle.dumps({"a": Hostile(trap)}), "is not unpickled|cannot be read"),
        (b"", "cannot be read|is not unpickled"),
        (b"\x00" * 100, "cannot be read|is not unpickled"),
    ]
    for content, said in contents:
        path.write_bytes(content)
        with pytest.raises(ModelError, match=said):
            Weights(source(), path)
    assert not trap.exists()
    if suffix == ".pt":
        torch.save([torch.ones(1)], path)
        with pytest.raises(ModelError, match="holds no state dict of tensors"):
            Weights(source(), path)
    with pytest.raises(ModelError, match=r"there is no file .*none\.pt"):
        Weights(source(), tmp_path / "none.pt")
