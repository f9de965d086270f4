"""Optimizer state in checkpoints: flat state is cut into fragments and joined; what does not fit is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from hybridpar.errors import CheckpointError
from hybridpar.model.trace import trace
from hybridpar.planning.plan import Plan, Segment, Stage
from hybridpar.runtime.fragment import Fragment, cut, join
from hybridpar.runtime.modules import Owned
from hybridpar.runtime.optimizer_state import ShardedState, WholeState
from hybridpar.runtime.pieces import Piece, Stored, write
from hybridpar.runtime.resume import check_cuts

PARAMETER = Owned("w", nn.Parameter(torch.zeros(3, 4)))
SCALE = Owned("scale", nn.Parameter(torch.zeros(())))


class Engine:
    """One that has the elements 5 to 9 of the parameter, and the scale behind a number of padding."""

    def __init__(self) -> None:
        self.loaded: Mapping[nn.Parameter, Fragment] = {}

    def fragments(self) -> dict[nn.Parameter, Fragment]:
        return {PARAMETER.tensor: Fragment(5, 4, 0), SCALE.tensor: Fragment(0, 1, 5)}

    def load(self, fragments: Mapping[nn.Parameter, Fragment]) -> None:
        self.loaded = fragments

    def step(self) -> None: ...


def stored(folder: Path, **tensors: torch.Tensor) -> Stored:
    """A checkpoint of the state of both parameters; what is given replaces or adds to that of the first."""
    state = {"step": torch.tensor(3.0), "momentum": torch.arange(12.0).reshape(3, 4)} | tensors
    pieces = {f"optimizer/{key}/w": Piece.whole(value) for key, value in state.items()}
    scale = {"optimizer/step/scale": torch.tensor(3.0), "optimizer/momentum/scale": torch.tensor(7.0)}
    write(folder, 0, pieces | {name: Piece.whole(value) for name, value in scale.items()})
    return Stored(folder, 1)


def test_what_is_joined_is_cut_the_same() -> None:
    state = {"step": torch.tensor(2.0), "momentum": torch.tensor([1.0, 2.0, 3.0, 0.0, 4.0, 0.0]), "none": None}
    places = [Fragment(7, 3, 0), Fragment(0, 1, 4)]
    joined = join([cut(place, state, torch.Size([6])) for place in places], torch.empty(6, requires_grad=True))
    assert joined.keys() == {"step", "momentum"}
    assert joined["step"].item() == 2.0
    assert torch.equal(joined["momentum"], state["momentum"])
    assert not joined["momentum"].requires_grad


def test_no_fragments_are_joined_to_no_state() -> None:
    assert join([], torch.empty(6)) == {}
    assert join([Fragment(0, 2, 0)], torch.empty(6)) == {}


@pytest.mark.parametrize(
    ("value", "said"), [(torch.zeros(2), r"of shape \[2\]"), (4, "int")], ids=["tensor", "number"]
)
def test_state_that_cannot_be_cut_is_refused(value: object, said: str) -> None:
    with pytest.raises(CheckpointError, match=f"the optimizer's rows is {said}, which .* cannot cut"):
        cut(Fragment(0, 3, 0), {"rows": value}, torch.Size([6]))


@pytest.mark.parametrize(
    "other",
    [
        Fragment(0, 1, 3, {"momentum": torch.ones(1)}, {"step": torch.tensor(3.0)}),
        Fragment(0, 1, 3, {"momentum": torch.ones(1)}),
        Fragment(0, 1, 3),
    ],
    ids=["other step", "no step", "nothing"],
)
def test_fragments_of_different_states_are_not_joined(other: Fragment) -> None:
    first = Fragment(0, 3, 0, {"momentum": torch.ones(3)}, {"step": torch.tensor(2.0)})
    with pytest.raises(CheckpointError, match=r"has momentum, step=2\.0 as .* sharded state is one for all"):
        join([first, other], torch.empty(6))


@pytest.mark.parametrize("flat", [False, True])
def test_sharded_state_takes_its_part_of_any_form(tmp_path: Path, flat: bool) -> None:
    value = torch.arange(12.0).reshape((12,) if flat else (3, 4))
    engine = Engine()
    ShardedState(engine, {"w": (3, 4), "scale": ()}).restore(stored(tmp_path, momentum=value), [PARAMETER, SCALE])
    found, scale = engine.loaded[PARAMETER.tensor], engine.loaded[SCALE.tensor]
    assert torch.equal(found.elements["momentum"], torch.arange(5.0, 9.0))
    assert torch.equal(scale.elements["momentum"], torch.tensor([7.0]))
    assert found.scalars["step"] == scale.scalars["step"] == torch.tensor(3.0)


def test_state_that_no_fragment_can_have_is_refused(tmp_path: Path) -> None:
    """As of Adafactor, which keeps sums over rows and columns."""
    origin = stored(tmp_path, row_var=torch.ones(3, 1))
    with pytest.raises(CheckpointError, match=r"row_var/w has the shape \[3, 1\], .* a parameter \[3, 4\] cannot"):
        ShardedState(Engine(), {"w": (3, 4), "scale": ()}).restore(origin, [PARAMETER, SCALE])


@pytest.mark.parametrize(("dim", "start", "size"), [(None, 0, (3, 4)), (0, 1, (2, 4)), (1, 1, (3, 2))])
def test_a_slice_takes_its_part_of_flat_state(
    tmp_path: Path, dim: int | None, start: int, size: tuple[int, int]
) -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    owned = Owned("w", nn.Parameter(torch.zeros(size)), dim, start)
    optimizer = torch.optim.Adam([owned.tensor])
    origin = stored(tmp_path, exp_avg=whole.flatten(), exp_avg_sq=whole.flatten())
    WholeState(optimizer, {"w": (3, 4)}).restore(origin, [owned])
    expected = whole if dim is None else whole.narrow(dim, start, size[dim])
    assert torch.equal(optimizer.state[owned.tensor]["exp_avg"], expected)
    assert optimizer.state[owned.tensor]["step"].item() == 3.0


@pytest.mark.parametrize(("shape", "fits"), [((3, 4), True), ((12,), True), ((1,), True), ((3, 1), False)])
def test_state_that_a_plan_would_cut_but_cannot_is_refused_before_a_training(
    tmp_path: Path, shape: tuple[int, ...], fits: bool
) -> None:
    """As of Adafactor: it once came as far as the first step, where a row's state met a slice."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))
    chain = trace(model, (4,), "two").chain
    name = chain.layers[1].parameters[0].name
    state = {f"optimizer/row_var/{name}": torch.zeros(shape), f"parameter/{name}": torch.zeros(3, 4)}
    write(tmp_path, 0, {key: Piece.whole(value) for key, value in state.items()})
    found: Any = SimpleNamespace(folder=tmp_path, manifest=SimpleNamespace(ranks=1))
    front, tail = Stage("front", 1, (Segment((0, 1), (0, 1)),)), Segment((1, 2), (0, 1))
    plan = Plan("two", chain.fingerprint, 2, 4, "float32", (front, Stage("tail", 1, (tail,), ("column",))))
    if fits:
        check_cuts(found, plan, chain)
        return
    with pytest.raises(CheckpointError, match=r"row_var .* \[3, 1\], of which the plan's tail cannot have a part"):
        check_cuts(found, plan, chain)
    check_cuts(found, replace(plan, stages=(Stage("front", 1, (Segment((0, 2), (0, 1)),)),)), chain)
