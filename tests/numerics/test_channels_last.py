"""Channels last in memory: what is computed, sent, counted and saved is what it is in the usual order."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import nn

from hybridpar.cluster.devices import DEVICES
from hybridpar.config import compose
from hybridpar.errors import ConfigError, PlanError, ProfileError
from hybridpar.model.deferred import defer
from hybridpar.model.order import channels_last, turn
from hybridpar.model.trace import trace
from hybridpar.optimizer_section import OptimizerConfig
from hybridpar.planner import prepare
from hybridpar.planning.compile import compile as compile_program
from hybridpar.planning.memory import memory
from hybridpar.planning.plan import Recipe
from hybridpar.planning.plan import validate as validate_plan
from hybridpar.profiling import strands
from hybridpar.profiling.analytic import estimate
from hybridpar.profiling.bench import Bench
from hybridpar.runtime.pieces import Stored, write
from scripts.bench.accuracy.live import LiveBytes
from tests.numerics.test_memory import Unseen, lasting
from tests.support.checkpoints import make_job
from tests.support.checkpoints import plan_of as plan_of_job
from tests.support.counting import Counting, counting_executor, expected_log, run_once
from tests.support.parity import BEFORE_POOL, MAX_NORM, PLACEMENTS, assert_same, reference, shape
from tests.support.parity import case_of as usual_case_of
from tests.support.parity import plan_of as usual_plan_of
from tests.support.rendezvous import run_strictly
from tests.support.threads import run_ranks
from tests.support.training import Case, assemble, make_case, make_executor, small_vgg


@cache
def traced(dropout: float):
    source = defer(lambda: small_vgg(dropout))
    return source, trace(source.module, (2, 6, 6), "small", memory_format="channels_last")


def case_of(dropout: float, samples=13, max_norm: float | None = None) -> Case:
    """The parity case with the weights of its convolutions turned; data and values are the same."""
    source, found = traced(dropout)
    usual = usual_case_of(dropout, samples, max_norm)
    return replace(usual, source=source, traced=found, data=[], steps=usual.steps)


def plan_of(*stages, **fields):
    plan = replace(usual_plan_of(*stages, **fields), chain=traced(0.4)[1].chain.fingerprint)
    validate_plan(plan, traced(0.4)[1].chain)
    return plan


SHAPES = [
    ((3, 0, 0), "own", 1),
    ((2, 1, 2), "own", 1),
    ((1, 2, 3), "shared", 1),
    ((3, 0, 2), "overlapping", 1),
    ((0, 2, 1), "own", 1),
    ((1, 1, 2), "own", 2),
]


@pytest.mark.parametrize("before_pool", [False, True])
@pytest.mark.parametrize(("degrees", "place", "replicas"), SHAPES)
def test_training_is_that_of_a_single_process(degrees, place, replicas, before_pool) -> None:
    """Images cross between stages whole, by samples and, with a tail that begins before a pool, by channels."""
    if before_pool and not (degrees[0] and degrees[2]):
        pytest.skip("nothing is cut before the pool")
    fields = {"tail_start": BEFORE_POOL} if before_pool else {}
    number = SHAPES.index((degrees, place, replicas))
    stages = shape(*degrees, PLACEMENTS[place], uneven=True, **fields)
    stages = [replace(s, recompute=s.kind == "front" and number % 2 == 1) for s in stages]
    clipping = number % 3 == 0
    plan = plan_of(
        *stages, replicas=replicas, bucket_bytes=(1, 2000)[number % 2], recipe=Recipe(clipping=clipping)
    )
    key = 0.4, 13, MAX_NORM if clipping else None
    assert_same(plan, case_of(*key), reference(key))


@pytest.mark.parametrize("number", range(6))
@pytest.mark.parametrize("before_pool", [False, True])
def test_execution_is_the_program(number, before_pool) -> None:
    """Actions, bytes of every message, and all storages that are alive after every action of a second step."""
    degrees, place, _ = SHAPES[min(number, 4)]
    case = case_of(0.4, (13,), 0.1 if number % 2 else None)
    fields = {"tail_start": BEFORE_POOL} if before_pool and degrees[0] and degrees[2] else {}
    stages = shape(*degrees, PLACEMENTS[place], uneven=number % 2 == 0, **fields)
    stages = [replace(s, recompute=s.kind == "middle" and number == 2) for s in stages]
    recipe = Recipe(clipping=case.max_norm is not None, optimizer_states=1)
    plan = plan_of(*stages, bucket_bytes=(1, 2000)[number % 2], recipe=recipe)
    program = compile_program(plan, case.traced.chain, 13, "train")

    def body(rank, endpoint):
        communicators = Counting(endpoint)
        executor = counting_executor(case, plan, rank, communicators)
        run_once(executor, case, program, rank)
        return executor.actions, communicators.log, tuple(executor.alive)

    def second(rank, endpoint):
        executor = make_executor(case, plan, rank, Unseen(endpoint))
        run_once(executor, case, program, rank)
        endpoint.step = 1
        alive = []
        executor.observer = lambda *_: alive.append(live.bytes())
        with LiveBytes(set(), lasting(executor)) as live:
            run_once(executor, case, program, rank)
        return tuple(alive)

    for rank, result in enumerate(run_strictly(plan.world, body)):
        assert not isinstance(result, BaseException), result
        actions, messages, saved = result
        assert actions == list(program.actions[rank])
        assert messages == expected_log(program, rank)
        assert saved == memory(program, rank).saved
    for rank, result in enumerate(run_strictly(plan.world, second)):
        assert not isinstance(result, BaseException), result
        assert result == memory(program, rank).alive


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.inner(x)


def imaging() -> nn.Module:
    """Of every kind of layer that images pass; the first ones see them before any weight has turned them."""
    return nn.Sequential(
        nn.BatchNorm2d(2),
        nn.ReLU(),
        nn.Conv2d(2, 4, 3, padding=1),
        Residual(),
        nn.GELU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 4, 3, groups=4, padding=1),
        nn.GroupNorm(2, 4),
        nn.Conv2d(4, 4, 1),
        nn.ConvTranspose2d(4, 3, 2),
        nn.AvgPool2d(2),
        nn.Dropout(0.2),
        nn.AdaptiveAvgPool2d(2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(3, 5),
    )


def test_layers_are_described_as_they_compute() -> None:
    found = trace(imaging(), (2, 8, 8), "imaging", memory_format="channels_last")
    x, described = torch.randn(3, 2, 8, 8), [layer.channels_last for layer in found.chain.layers]
    actual = []
    with torch.no_grad():
        for layer in turn(imaging()):
            x = layer(x)
            actual.append(channels_last(x))
    assert described == actual
    assert described[:3] == [False, False, True]
    assert described[-3:] == [False, False, False], "one position lies both ways; what is flat has no channels"
    usual = trace(imaging(), (2, 8, 8), "imaging").chain
    assert not any(layer.channels_last for layer in usual.layers)
    assert usual.fingerprint != found.chain.fingerprint
    flat = next(i for i, layer in enumerate(traced(0.4)[1].chain.layers) if layer.kind == "Flatten")
    assert not traced(0.4)[1].chain.layers[flat].aliases_input, "to flatten turned images is to copy them"
    assert usual_case_of().traced.chain.layers[flat].aliases_input


def test_layers_are_measured_in_that_order() -> None:
    found = trace(imaging(), (2, 8, 8), "imaging", memory_format="channels_last")
    chain, bench = found.chain, Bench(torch.device("cpu"), torch.float32, channels_last=True)
    ((strand, modules),) = strands.make({strands.whole(chain): list(found.modules)}, bench)
    x = strands.make_input(bench, strand, 2)
    for index, (layer, call) in enumerate(
        zip(chain.layers, strands.calls(bench, strand, modules, 2), strict=True)
    ):
        alone = strands.single(chain, index, (1.0,))[0]
        assert channels_last(strands.make_input(bench, alone, 2)) == channels_last(x)
        x = call(x)
        assert channels_last(x) == layer.channels_last
    assert {p.grad.stride() == p.stride() for m in modules for p in m.parameters()} == {True}


OPTIMIZERS = {
    "sgd": OptimizerConfig("SGD", 0.05, {"momentum": 0.9}),
    "adamw": OptimizerConfig("AdamW", 0.01, {"weight_decay": 0.1}),
    "foreach": OptimizerConfig("AdamW", 0.01, {"foreach": True}),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", ["data_parallel", "front_tail", "alone"])
def test_optimizers_go_through_parameters_and_gradients_in_one_order(tmp_path, kind, optimizer) -> None:
    """A fused step takes both by their bare memory; its state goes through a checkpoint bit for bit."""
    usual = make_case(steps=4, samples=(13, 13, 13, 9), dropout=0.3)
    turned = trace(usual.source.module, (2, 6, 6), "small", memory_format="channels_last")
    case = replace(usual, traced=turned, data=[])

    def trained(given, *, resumed):
        plan = plan_of_job(given, kind)

        def body(rank, groups):
            job = make_job(given, plan, rank, groups, OPTIMIZERS[optimizer])
            if resumed:
                job.state.restore(Stored(tmp_path, plan.world), same_plan=True)
                job.go_on(2, 26)
            losses = []
            for x, y in given.data[job.steps :]:
                losses.append(job.step((x, y), samples=len(y)))
                if given is case and job.steps == 2:
                    write(tmp_path, rank, job.state.pieces())
            return losses[-2:], list(job.parameters.values())

        results = run_ranks(plan, body)
        return results[0][0], assemble([owned for _, owned in results])

    losses, parameters = trained(case, resumed=False)
    assert any(channels_last(p) for p in parameters.values())
    again, found = trained(case, resumed=True)
    assert again == losses
    usually, expected = trained(usual, resumed=False)
    assert losses == pytest.approx(usually, rel=1e-10)
    for name, value in parameters.items():
        assert torch.equal(value, found[name]), name
        assert (value - expected[name]).norm() <= 1e-10 * expected[name].norm(), name


def test_sharded_optimizer_state_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"train\.memory_format: channels_last .*optimizer\.sharding"):
        compose(["train.memory_format=channels_last", "optimizer.sharding=auto"])
    case = case_of(0.4)
    plan = replace(
        plan_of(*shape(3, 0, 0, PLACEMENTS["own"])), precision="float32", recipe=Recipe(sharding="zero1")
    )
    with pytest.raises(PlanError, match=r"recipe\.sharding: zero1 .*memory_format"):
        run_ranks(plan, lambda rank, groups: make_job(case, plan, rank, groups, engines=lambda *_: None))


def test_a_plan_or_a_profile_of_the_other_order_is_refused(tmp_path) -> None:
    usual, turned = usual_case_of().traced.chain, traced(0.0)[1].chain
    plan = usual_plan_of(*shape(2, 0, 1, PLACEMENTS["own"]))
    with pytest.raises(PlanError, match=r"plan\.chain: .* belongs to another model"):
        validate_plan(plan, turned)
    profile = estimate(usual, DEVICES["V100"])
    with pytest.raises(ProfileError):
        profile.check(turned)
    replace(profile, described=usual).save(tmp_path / "profile.json")
    config = compose(
        ["profile=from_file", f"profile.path={tmp_path / 'profile.json'}", "train.memory_format=channels_last"]
    )
    with pytest.raises(ProfileError, match=r"train\.memory_format=null, but here it is channels_last"):
        prepare(config, world=2)
