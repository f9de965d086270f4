"""Compiled layers: results of plain ones, over plans; what stays as it is; what is refused."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import nn

from hybridpar.config import compose
from hybridpar.errors import ConfigError, PlanError
from hybridpar.model.deferred import defer
from hybridpar.model.trace import trace
from hybridpar.planning.plan import Segment, Stage
from hybridpar.report.dry_run import compiled as told
from hybridpar.runtime import compiled
from hybridpar.runtime.job import Job
from hybridpar.train_section import Compiling
from tests.support.parity import PLACEMENTS, case_of, near, own_ranks, plan_of, shape
from tests.support.plans import make_plan
from tests.support.threads import run_ranks
from tests.support.training import MOMENTUM, RATE, SEED, assemble

RAGGED = (13, 7, 2)
"""Samples of the steps: micro-batches of all sizes, one among them."""


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=RATE, momentum=MOMENTUM)


def trained(case, plan, compiling):
    """Losses of all steps, of an evaluation, and what every rank has then."""

    def body(rank, groups):
        job = Job(plan, case.traced, case.source, sgd, groups, rank=rank, seed=SEED, compiling=compiling)
        losses = [job.step(batch, samples=len(batch[1])) for batch in case.data]
        losses.append(job.evaluate([case.data[-1]]).loss)
        buffers = [b.clone() for modules in job.blocks.values() for b in modules.buffers()]
        return losses, list(job.parameters.values()), buffers

    return run_ranks(plan, body)


def assert_alike(case, plan, compiling):
    plain, other = trained(case, plan, None), trained(case, plan, compiling)
    assert other[0][0] == pytest.approx(plain[0][0], rel=1e-10)
    values, expected = (assemble([owned for _, owned, _ in results]) for results in (other, plain))
    assert values.keys() == expected.keys()
    for name, value in expected.items():
        assert near(values[name], value), name
    for (_, _, own), (_, _, theirs) in zip(other, plain, strict=True):
        assert all(near(a.double(), b.double()) for a, b in zip(own, theirs, strict=True))


@pytest.mark.parametrize(
    ("degrees", "place", "stages"),
    [
        ((2, 1, 2), "overlapping", None),
        ((1, 2, 0), "own", ("middle",)),
        ((2, 0, 2), "shared", ("front",)),
    ],
)
def test_compiled_layers_train_as_plain_ones(degrees, place, stages):
    """With keyed dropout, ragged micro-batches, recomputation and an evaluation, in float64."""
    case = case_of(0.4, RAGGED)
    made = shape(*degrees, PLACEMENTS[place])
    world = 1 + max(r for s in made for r in s.ranks)
    plan = make_plan(case.traced.chain, *made, world=world, bucket_bytes=700 if place == "shared" else 2**20)
    assert_alike(case, plan, Compiling(stages, "aot_eager"))


def normed():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 7),
    )


def normed_case(samples=RAGGED):
    case = case_of(0.0, samples)
    source = defer(normed)
    return type(case)(source, trace(source.module, (2, 6, 6), "normed"), len(samples), samples)


@pytest.mark.parametrize("recompute", [False, True])
def test_batch_norms_keep_their_statistics(recompute):
    case = normed_case()
    layers = len(case.traced.chain.layers)
    middle = Stage("middle", 4, (Segment((0, 3), (0,)), Segment((3, layers), (0,))), recompute=recompute)
    plan = make_plan(case.traced.chain, middle, world=1)
    assert_alike(case, plan, Compiling(None, "aot_eager"))


def test_every_run_of_layers_is_compiled_once_per_kind_of_pass_and_not_for_every_size():
    """Many blocks, more sizes than torch would compile one function for: none falls back to plain layers."""
    counts = []

    def backend(graph, inputs):
        counts.append(len(inputs))
        return graph.forward

    torch._dynamo.register_backend(backend, "counting")
    case = case_of(0.0, (13, 12, 11, 10, 9, 8, 7, 6, 5, 4))
    (front,) = shape(1, 0, 0, own_ranks)
    plan = plan_of(Stage("front", 13, front.segments))
    trained(case, plan, Compiling(None, "counting"))
    assert 3 <= len(counts) <= 4  # the first size, all others, and an evaluation or two


def test_linears_and_dropouts_stay_as_they_are_and_are_named():
    chain, plan = case_of(0.4, RAGGED).traced.chain, plan_of(*shape(2, 1, 2, own_ranks))
    text = told(plan, chain, ("tail",), "inductor")
    names = [layer.name for layer in chain.layers[plan.stages[-1].layers[0] :]]
    assert text.startswith(f"compiled by inductor: layers of tail; left as they are: {', '.join(names)}.")
    assert "left as they are" not in told(plan, chain, ("front",), "inductor")
    assert chain.compiled(0, len(chain.layers)) == ((0, 9),)
    assert chain.compiled(1, 3) == ()


def test_what_cannot_be_compiled_is_refused(monkeypatch):
    with pytest.raises(ConfigError, match=r"torch has no 'inductr'; choose among .*inductor"):
        compiled.check(Compiling(backend="inductr"), "cpu")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match="there is no no-such-compiler; install one"):
        compiled.check(Compiling(), "cpu")
    compiled.check(Compiling(backend="aot_eager"), "cpu")
    with pytest.raises(PlanError, match="the plan has no tail, only front; leave it out"):
        compiled.check_stages(Compiling(("tail",)), plan_of(*shape(2, 0, 0, own_ranks)))
    with pytest.raises(ConfigError, match=r"train\.compile"):
        compose(["train.compile=[head]"])


@pytest.mark.parametrize(
    ("compiling", "error", "said"),
    [
        (Compiling(backend="inductr"), ConfigError, "torch has no 'inductr'"),
        (Compiling(("tail",), "aot_eager"), PlanError, "the plan has no tail"),
    ],
)
def test_a_job_refuses_it_too(compiling, error, said):
    """From Python a stage that there is not was ignored, and a backend failed in the first step."""
    case, plan = case_of(0.0, RAGGED), plan_of(*shape(1, 0, 0, own_ranks))

    def body(rank, groups):
        with pytest.raises(error, match=said):
            Job(plan, case.traced, case.source, sgd, groups, rank=rank, compiling=compiling)

    run_ranks(plan, body)


def test_the_configuration_says_what_is_compiled():
    assert compose().train.compiling is None
    assert compose(["train.compile=true"]).train.compiling == Compiling()
    some = compose(["train.compile=[front,tail]", "train.compile_backend=eager"]).train.compiling
    assert some == Compiling(("front", "tail"), "eager")
    assert [some.has(kind) for kind in ("front", "middle", "tail")] == [True, False, True]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_trains_as_plain_layers_do():
    case = normed_case((13, 9))
    layers = len(case.traced.chain.layers)
    plan = make_plan(case.traced.chain, Stage("front", 5, (Segment((0, layers), (0, 1)),)), world=2)
    assert_alike(case, plan, Compiling())
