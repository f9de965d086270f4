"""Margin losses over sharded cosines equal a plain single process."""

from __future__ import annotations

import math
from functools import cache, partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hybridpar.errors import ConfigError, PlanError
from hybridpar.model.deferred import defer
from hybridpar.model.linear import CosineLinear, GatheringCosine
from hybridpar.model.trace import trace
from hybridpar.planning.compile import compile as compile_program
from hybridpar.planning.memory import memory
from hybridpar.planning.plan import Plan, Segment, Stage, validate
from hybridpar.planning.sharding import best_sharding
from hybridpar.runtime.cross_entropy import CrossEntropy, torch_loss
from hybridpar.runtime.loss import Logits, check_mixes
from hybridpar.runtime.margin import ArcFace, CosFace, Margin
from hybridpar.sections import LossConfig, MarginConfig
from tests.support.counting import counting_executor, run_once
from tests.support.parity import (
    BATCH,
    assert_same,
    overlapping_ranks,
    own_ranks,
    plan_of,
    shape,
    shared_ranks,
)
from tests.support.threads import run_ranks
from tests.support.training import Case, make_executor, run_step, small_vgg, train_single, whole_model

CLASSES, STEPS = 7, 5
WEIGHTS = (0.5, 2.0, 0.0, 1.25, 3.0, 0.7, 1.0)
MARGINS: dict[str, Margin] = {
    "arcface": ArcFace(8.0, 0.5),
    "wide arcface": ArcFace(8.0, 2.2),  # most angles pass pi
    "cosface": CosFace(16.0, 0.35),
    "scale alone": CosFace(10.0, 0.0),
}
PLANS = {
    "front": (3, 0, 0),
    "pipeline": (0, 2, 1),
    "front and tail": (2, 0, 3),
    "three stages": (2, 1, 2),
    "three stages, whole tail": (2, 1, 1),
    "three stages, three shards": (1, 2, 3),
}


def recognition(dropout: float = 0.2) -> nn.Module:
    """The small VGG under cosines."""
    model = small_vgg(dropout)
    assert isinstance(model, nn.Sequential)
    model[-1] = CosineLinear(9, CLASSES)
    return model


@cache
def small() -> Any:
    source = defer(recognition)
    return source, trace(source.module, (2, 6, 6), "small")


def plain_target(margin: Margin, cosine: torch.Tensor) -> torch.Tensor:
    """What the papers say, in autograd's hands."""
    if isinstance(margin, CosFace):
        return cosine - margin.margin
    assert isinstance(margin, ArcFace)
    angle = cosine.acos()
    beyond = angle + margin.margin > math.pi
    return torch.where(beyond, cosine - margin.margin * math.sin(margin.margin), (angle + margin.margin).cos())


def plain(cosines: torch.Tensor, labels: torch.Tensor, *, margin: Margin, **options: Any) -> torch.Tensor:
    one_hot = F.one_hot(labels.clamp(min=0), cosines.shape[1]).bool()
    return F.cross_entropy(
        torch.where(one_hot, plain_target(margin, cosines), cosines) * margin.scale, labels, **options
    )


@cache
def case_of(name: str, smoothing: float = 0.0, weighted: bool = False) -> Any:
    margin, weights = MARGINS[name], torch.tensor(WEIGHTS, dtype=torch.float64) if weighted else None
    criterion = partial(plain, margin=margin, label_smoothing=smoothing, weight=weights)
    loss = CrossEntropy(smoothing, WEIGHTS if weighted else None, margin=margin)
    case = Case(*small(), STEPS, (BATCH,) * STEPS, loss=loss, criterion=criterion)
    for _, labels in case.data:
        labels[2:5] = -100
    return case, train_single(case)


@pytest.mark.parametrize("options", [(0.0, False), (0.2, True)], ids=["plain", "smoothed and weighted"])
@pytest.mark.parametrize("name", MARGINS)
@pytest.mark.parametrize("degrees", PLANS.values(), ids=PLANS.keys())
def test_training_is_that_of_a_single_process(
    degrees: tuple[int, int, int], name: str, options: tuple[float, bool]
) -> None:
    number = sum(degrees) + list(MARGINS).index(name)
    place = (own_ranks, shared_ranks, overlapping_ranks)[number % 3]
    ways = (("column", "row", "column"), ("row", "column", "column"))[number % 2]
    stages = shape(*degrees, place, uneven=number % 2 == 1, ways=ways)
    assert_same(plan_of(*stages, bucket_bytes=1), *case_of(name, *options))


@pytest.mark.parametrize("degrees", [(2, 0, 2), (2, 0, 0)], ids=str)
def test_plan_replicas(degrees: tuple[int, int, int]) -> None:
    assert_same(plan_of(*shape(*degrees, shared_ranks), replicas=2), *case_of("arcface"), gloo=True)


@pytest.mark.parametrize("degrees", [(2, 0, 3), (2, 1, 1)], ids=str)
def test_evaluations_have_the_margin_in_the_loss_and_not_in_accuracies(degrees: tuple[int, int, int]) -> None:
    case, _ = case_of("arcface")
    plan = plan_of(*shape(*degrees, own_ranks))
    program = compile_program(plan, case.traced.chain, BATCH, "evaluate")
    x, y = case.data[0]
    with torch.no_grad():
        cosines = whole_model(case).eval()(x)
    counted = y != -100
    best = (cosines.argmax(1) == y)[counted].sum().item()
    for m in run_ranks(plan, lambda r, c: run_step(case, program, r, make_executor(case, plan, r, c))):
        assert m.loss == pytest.approx(case.criterion(cosines, y).item(), rel=1e-12)
        assert (m.samples, m.top1) == (counted.sum(), best)


@pytest.mark.parametrize("degrees", [(2, 0, 2), (1, 1, 3), (2, 0, 0)], ids=str)
def test_saved_bytes_are_exact(degrees: tuple[int, int, int]) -> None:
    """The head keeps its input and its cosines."""
    case, _ = case_of("arcface")
    plan = plan_of(*shape(*degrees, own_ranks), bucket_bytes=64)
    program = compile_program(plan, case.traced.chain, BATCH, "train")

    def count(rank: int, groups: Any) -> list[int]:
        executor = counting_executor(case, plan, rank, groups)
        run_once(executor, case, program, rank)
        return executor.alive

    for rank, alive in enumerate(run_ranks(plan, count)):
        assert alive == list(memory(program, rank).saved)


def test_gradients_stay_finite_where_a_target_is_met_exactly() -> None:
    for dtype in (torch.float32, torch.float64):
        values = torch.tensor([[1.0, 0.0, -1.0], [0.0, -1.0, 1.0]], dtype=dtype)
        loss = CrossEntropy(margin=ArcFace())
        logits = Logits(values, torch.tensor([0, 1]), 0, 3, whole=True)
        outcome = loss.combine(logits, [loss.score(logits, train=True)], torch.tensor(2.0).double(), train=True)
        assert outcome.gradient is not None
        assert outcome.gradient.isfinite().all()
        assert outcome.loss_sum.isfinite()


# The layer


@pytest.mark.parametrize("frozen", [False, True])
def test_the_layer_that_gathers_is_that_of_autograd(*, frozen: bool) -> None:
    layer = CosineLinear(6, 5).double().requires_grad_(not frozen)
    own = GatheringCosine(layer.weight.detach().clone()).requires_grad_(not frozen)
    for n in (1, 3, 2):
        x = torch.rand(n, 6, dtype=torch.float64).requires_grad_()
        z = x.detach().clone().requires_grad_()
        layer(x).sin().sum().backward()
        own(z).sin().sum().backward()
        torch.testing.assert_close(x.grad, z.grad, rtol=1e-13, atol=1e-13)
        if not frozen:
            torch.testing.assert_close(layer.weight.grad, own.weight.grad, rtol=1e-13, atol=1e-13)
    assert (own.weight.grad is None) == frozen


def test_autocast_leaves_cosines_alone() -> None:
    own, x = GatheringCosine(torch.rand(5, 6)), torch.rand(3, 6).bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = own(x)
    assert y.dtype == torch.float32
    assert torch.equal(y, own(x.detach()))
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.bfloat16


# What does not go


def test_a_plan_with_rows_is_refused() -> None:
    chain = small()[1].chain
    tail = Stage("tail", 5, (Segment((9, 16), (0, 1)),), ("column", "row", "row"))
    front = Stage("front", 5, (Segment((0, 9), (0, 1)),))
    plan = Plan("small", chain.fingerprint, 2, BATCH, "float64", (front, tail), bucket_bytes=64)
    with pytest.raises(PlanError, match=r"tail\.sharding: .* gives 15 rows.* use column there"):
        validate(plan, chain)


def test_the_planner_gives_cosines_columns() -> None:
    chain = small()[1].chain
    for allowed in (("column", "row"), ("row",), ("row", "column")):
        assert best_sharding(chain, 9, 2, allowed).modes[-1] == "column"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ArcFace(margin=4.0), "margin from 0 to below 3.142"),
        (lambda: CosFace(scale=0.0), "scale must be above 0"),
        (lambda: MarginConfig("arcface", size=3.5), r"loss\.margin\.size: 3.5"),
        (lambda: MarginConfig(scale=-1.0), r"loss\.margin\.scale"),
        (lambda: check_mixes(CrossEntropy(margin=ArcFace())), r"data\.mixup"),
    ],
)
def test_what_does_not_fit_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_margin_needs_cosines() -> None:
    source = defer(small_vgg)
    chain = trace(source.module, (2, 6, 6), "plain").chain
    with pytest.raises(ConfigError, match=r"plain ends in 15 \(Linear\); end it in hybridpar\.CosineLinear"):
        CrossEntropy(margin=CosFace()).check_plan(plan_of(*shape(2, 0, 2, own_ranks)), chain)


@pytest.mark.parametrize("name", ["arcface", "cosface"])
def test_the_single_process_of_verify_has_the_margin(name: Any) -> None:
    config = LossConfig(margin=MarginConfig(name, 8.0, 0.4), label_smoothing=0.1)
    cosines = F.normalize(torch.randn(6, CLASSES, dtype=torch.float64)).requires_grad_()
    labels = torch.tensor([0, 3, -100, 6, 1, 2])
    margin = (ArcFace if name == "arcface" else CosFace)(8.0, 0.4)
    expected = plain(cosines, labels, margin=margin, label_smoothing=0.1)
    torch.testing.assert_close(torch_loss(config, CLASSES)(cosines, labels), expected, rtol=1e-12, atol=0)
