"""Training under autocast: messages and memory are the program's, the numbers those of a single process."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hybridpar.model.deferred import defer
from hybridpar.model.footprint import lowering
from hybridpar.model.keyed import KeyedDropout, Keys
from hybridpar.model.trace import trace
from hybridpar.planning.plan import Plan, Recipe, Segment, Stage, validate
from hybridpar.train_section import LossScale
from tests.support.counting import (
    assert_execution_is_the_program,
)
from tests.support.parity import PLACEMENTS, shape
from tests.support.threads import run_ranks
from tests.support.training import (
    MOMENTUM,
    RATE,
    SEED,
    Case,
    assemble,
    make_executor,
    small_vgg,
    train_rank,
    whole_model,
)

STEPS, SAMPLES = 5, 13
ROUNDOFF = {"bfloat16": 2.0**-9, "float16": 2.0**-12}
"""They have 8 and 11 significant bits."""
SCALING = {"bfloat16": None, "float16": LossScale(growth_interval=2)}


def normed():
    """Convolutions with batch norm, a residual block, and a linear head behind a layer norm."""

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())

        def forward(self, x):
            return x + self.inner(x)

    head = (nn.Flatten(), nn.LayerNorm(36), nn.Linear(36, 12), nn.GELU(), nn.Linear(12, 7), nn.Softplus())
    return nn.Sequential(nn.BatchNorm2d(2), nn.Conv2d(2, 4, 3, padding=1), Residual(), nn.MaxPool2d(2), *head)


def case_of(build, autocast="bfloat16", steps=STEPS):
    source = defer(build)
    traced = trace(source.module, (2, 6, 6), "small", autocast=autocast)
    case = Case(source, traced, steps, (SAMPLES,) * steps, dtype=torch.float32)
    case.scaling = SCALING.get(autocast)
    return case


def plan_of(case, *stages, **fields):
    chain = case.traced.chain
    world = 1 + max(r for s in stages for r in s.ranks)
    recipe = Recipe(scaling=case.scaling is not None)
    plan = Plan(chain.model, chain.fingerprint, world, SAMPLES, "float32", tuple(stages), recipe=recipe, **fields)
    validate(plan, chain)
    return plan


def stages_of_normed(tail):
    front = Stage("front", 4, (Segment((0, 2), (0, 1)),))
    middle = Stage("middle", 3, (Segment((2, 4), (2,)),))
    return front, replace(middle, segments=(Segment((2, 10), (2,)),)) if not tail else middle


SHAPES = [((2, 1, 2), "own"), ((1, 2, 3), "shared"), ((3, 0, 1), "overlapping"), ((3, 0, 0), "own")]
CASES = [
    *((lambda: small_vgg(0.3), shape(*degrees, PLACEMENTS[place], uneven=True), again, "bfloat16")
      for degrees, place in SHAPES for again in (False, True)),
    (normed, list(stages_of_normed(tail=False)), False, "bfloat16"),
    (normed, list(stages_of_normed(tail=False)), True, "bfloat16"),
    (lambda: small_vgg(0.3), shape(2, 1, 2, PLACEMENTS["own"], uneven=True), False, "float16"),
    (normed, list(stages_of_normed(tail=False)), False, "float16"),
]  # fmt: skip


@pytest.mark.parametrize(("build", "stages", "recompute", "autocast"), CASES)
@pytest.mark.parametrize("bucket", [1, 2000])
def test_execution_is_the_program(build, stages, recompute, autocast, bucket):
    """Actions, bytes of every message and what autograd keeps after every action, under autocast."""
    case = case_of(build, autocast, steps=1)
    if recompute:
        stages = [replace(s, recompute=True) for s in stages]
    plan = plan_of(case, *stages, bucket_bytes=bucket)
    assert_execution_is_the_program(case, plan, SAMPLES)


def trained(case, plan):
    """Losses, and all parameters put together, of a training under a plan."""

    def body(rank, communicators):
        executor = make_executor(case, plan, rank, communicators)
        metrics = train_rank(case, plan, rank, executor)
        return [m.loss for m in metrics], [o for modules in executor.blocks.values() for o in modules.owned]

    results = run_ranks(plan, body)
    return results[0][0], assemble([owned for _, owned in results]), assemble([o for _, o in results], "gradient")


def trained_alone(case, autocast):
    """Plain PyTorch: autocast around the forward of the whole batch, the loss in float32, scaled for float16."""
    settings = case.scaling or LossScale()
    scaler = torch.amp.GradScaler(
        "cpu", settings.init, growth_interval=settings.growth_interval, enabled=case.scaling is not None
    )
    model = whole_model(case)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM)
    losses = []
    for step, (x, y) in enumerate(case.data):
        for d in (m for m in model.modules() if isinstance(m, KeyedDropout)):
            d.keys = Keys(SEED, step, torch.arange(SAMPLES) + SAMPLES * step)
        optimizer.zero_grad()
        with lowering("cpu", autocast):
            logits = model(x)
        loss = F.cross_entropy(logits.to(case.dtype), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    names = dict.fromkeys(n for per_layer in case.traced.names for n in per_layer.values())
    moved = {n: (p.detach(), p.detach() - b) for n, p, b in zip(names, model.parameters(), before, strict=True)}
    return losses, moved


def apart(parameters, moved):
    """How far parameters are from others', relative to how far training moved those: all, as one vector."""
    distance = sum((parameters[n] - p).double().square().sum() for n, (p, _) in moved.items())
    return float(distance.sqrt() / sum(m.double().square().sum() for _, m in moved.values()).sqrt())


NEAR = 8
"""Roundings. Every activation and its gradient is rounded to 2^-9 of itself in bfloat16, 2^-12 in float16, and of
what a plan cuts in other pieces (a micro-batch's part of a gradient, summands of a sharded linear) each piece is:
some roundings more or fewer per layer, of which there are 16 here. They are independent, so that over all
parameters they add up to a few. A micro-batch that is lost moves the parameters by a tenth."""


@pytest.mark.parametrize("autocast", ROUNDOFF)
@pytest.mark.parametrize(("degrees", "place"), SHAPES)
def test_training_is_that_of_a_single_process(degrees, place, autocast):
    case, roundoff = case_of(lambda: small_vgg(0.3), autocast), ROUNDOFF[autocast]
    plan = plan_of(case, *shape(*degrees, PLACEMENTS[place], uneven=True), bucket_bytes=500)
    losses, parameters, gradients = trained(case, plan)
    expected, moved = trained_alone(case, getattr(torch, autocast))
    assert losses == pytest.approx(expected, rel=roundoff)
    assert apart(parameters, moved) < NEAR * roundoff
    assert {t.dtype for t in (*parameters.values(), *gradients.values())} == {torch.float32}
    exact = replace(case, dtype=torch.float64, data=[], scaling=None)
    exact.data = [(x.double(), y) for x, y in case.data]
    _, truth = trained_alone(exact, None)
    alone = apart({n: p for n, (p, _) in moved.items()}, truth)
    assert roundoff / 4 < apart(parameters, truth) < 2 * alone, (
        "as far from the truth as plain autocast, not nearer"
    )


def test_what_crosses_has_the_dtype_that_the_layer_gives():
    chain = case_of(normed, steps=1).traced.chain
    lowered = {layer.name: layer.lowered for layer in chain.layers}
    assert lowered == {"0": False, "1": True, "2": True, "3": True, "4": True, "5": True, "6": True, "7": True} | {
        "8": True, "9": False
    }  # fmt: skip
    assert chain.fingerprint != case_of(normed, None, steps=1).traced.chain.fingerprint
