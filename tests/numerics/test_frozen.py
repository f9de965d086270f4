"""Frozen parameters under a plan: torch's results, and neither passes nor messages that nobody needs."""

from dataclasses import replace
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hybridpar.cluster.describe import local
from hybridpar.errors import ModelError
from hybridpar.model.deferred import defer
from hybridpar.model.freeze import freeze
from hybridpar.model.trace import trace
from hybridpar.planner import load_model
from hybridpar.planning.blocks import blocks
from hybridpar.planning.check import check
from hybridpar.planning.compile import compile as compile_program
from hybridpar.planning.memory import memory
from hybridpar.planning.plan import Recipe
from hybridpar.planning.search import assess
from hybridpar.profiling.analytic import estimate
from hybridpar.runtime.export import export
from hybridpar.runtime.job import Job
from scripts.bench.accuracy.live import LiveBytes
from tests.numerics.test_memory import Unseen, lasting
from tests.support.counting import (
    assert_execution_is_the_program,
    run_once,
)
from tests.support.parity import MAX_NORM, near, overlapping_ranks, own_ranks, shape, shared_ranks
from tests.support.plans import make_plan
from tests.support.rendezvous import run_strictly
from tests.support.runs import small, train_here
from tests.support.threads import run_ranks
from tests.support.training import SEED, Case, assemble, make_executor, small_vgg, whole_model

STEPS, BATCH = 3, 13
FROZEN = {
    "front": ("0.*", "3.*"),
    "biases": ("*.bias",),
    "amid": ("5.*", "9.weight", "12.bias"),
    "all but the head": ("0.*", "3.*", "5.*", "9.*", "12.*"),
}


@cache
def case(which):
    def build():
        model = small_vgg()
        freeze(model, FROZEN[which])
        return model

    source = defer(build)
    return Case(source, trace(source.module, (2, 6, 6), "small"), STEPS, (BATCH,) * STEPS)


def optimizer(parameters):
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.1)


@cache
def reference(which, clipping):
    """Losses and parameters of torch's own loop; weight decay would move what is not frozen."""
    model = whole_model(case(which))
    own, losses = optimizer([p for p in model.parameters() if p.requires_grad]), []
    for x, y in case(which).data:
        own.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        if clipping:
            nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        own.step()
        losses.append(loss.item())
    names = dict.fromkeys(n for layer in case(which).traced.names for n in layer.values())
    return losses, dict(zip(names, (p.detach() for p in model.parameters()), strict=True))


def plan_of(which, *stages, **fields):
    world = (1 + max(r for s in stages for r in s.ranks)) * fields.get("replicas", 1)
    return make_plan(case(which).traced.chain, *stages, world=world, global_batch=BATCH, **fields)


@pytest.mark.parametrize("which", FROZEN)
@pytest.mark.parametrize(
    ("degrees", "place", "replicas", "clipping"),
    [
        ((1, 0, 0), own_ranks, 1, False),
        ((3, 0, 0), own_ranks, 1, True),
        ((0, 2, 1), own_ranks, 1, True),
        ((2, 1, 3), overlapping_ranks, 1, False),
        ((2, 0, 2), shared_ranks, 2, True),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_plan_trains_as_one_process_does(which, degrees, place, replicas, clipping):
    plan = plan_of(
        which, *shape(*degrees, place), replicas=replicas, recipe=Recipe(clipping=clipping), bucket_bytes=1
    )
    parts, (losses, parameters) = case(which), reference(which, clipping)

    def body(rank, communicators):
        job = Job(
            plan,
            parts.traced,
            parts.source,
            optimizer,
            communicators,
            rank=rank,
            seed=SEED,
            max_norm=MAX_NORM if clipping else None,
        )
        return [job.step(batch) for batch in parts.data], list(job.parameters.values())

    results = run_ranks(plan, body)
    for own, _ in results:
        assert own == pytest.approx(losses, rel=1e-10)
    trained = assemble([owned for _, owned in results[: plan.replica_world]])
    assert trained.keys() == parameters.keys()
    for name, expected in parameters.items():
        assert near(trained[name], expected), name


@pytest.mark.parametrize("which", FROZEN)
@pytest.mark.parametrize("degrees", [(2, 0, 0), (2, 1, 2), (0, 2, 1)], ids=str)
def test_programs_pass_the_check(which, degrees):
    plan = plan_of(which, *shape(*degrees, own_ranks), bucket_bytes=1)
    for mode in ("train", "evaluate"):
        check(compile_program(plan, case(which).traced.chain, BATCH, mode))


def test_nothing_goes_back_to_a_frozen_front():
    """Neither a backward of the front, nor a gradient sent to it, nor a bucket, nor room for any of them."""
    chain = case("front").traced.chain
    plan = plan_of("front", *shape(2, 0, 2, own_ranks), bucket_bytes=1)
    whole = shape(2, 0, 2, own_ranks)
    program = compile_program(plan, chain, BATCH, "train")
    assert chain.first_trained == 5
    cut = next(b for b in blocks(plan, chain) if b.backward)
    assert not cut.answers
    assert cut.layers[0] <= 5 < cut.layers[1]
    kinds = {(a.kind, a.block) for own in program.actions for a in own}
    assert ("backward", cut.index) in kinds
    for block in program.blocks[: cut.index]:
        assert ("forward", block.index) in kinds
        assert ("backward", block.index) not in kinds
    gradients = [o for o in program.operations if o.content == "gradient"]
    assert all((o.block or 0) >= cut.index for o in gradients)
    reduced = sum(o.bytes for o in program.operations if o.content == "bucket")
    assert reduced == 8 * sum(chain.trained[: whole[0].segments[0].layers[1]])
    trained = 8 * sum(chain.trained[: whole[0].segments[0].layers[1]])
    own = memory(program, 0)
    assert own.gradients == trained
    assert own.parameters == 8 * sum(layer.parameter_count for layer in chain.layers[:9])


@pytest.mark.parametrize("which", FROZEN)
@pytest.mark.parametrize(("degrees", "recompute"), [((2, 1, 2), False), ((2, 0, 3), True), ((1, 0, 0), False)])
def test_execution_is_the_program_and_its_memory(which, degrees, recompute):
    """Actions in order, messages, saved bytes after every action, and what lives within each."""
    stages = [replace(s, recompute=recompute) for s in shape(*degrees, own_ranks)]
    plan = plan_of(which, *stages, bucket_bytes=1)
    assert_execution_is_the_program(case(which), plan, BATCH)


@pytest.mark.parametrize("which", FROZEN)
def test_live_bytes_are_exact(which):
    """Of all storages that torch makes and frees in a second step, gradients and momenta among them."""
    plan = plan_of(which, *shape(2, 1, 2, own_ranks), bucket_bytes=1, recipe=Recipe(optimizer_states=1))
    program = compile_program(plan, case(which).traced.chain, BATCH, "train")

    def body(rank, endpoint):
        executor = make_executor(case(which), plan, rank, Unseen(endpoint))
        run_once(executor, case(which), program, rank)
        endpoint.step, alive = 1, []
        executor.observer = lambda *_: alive.append(live.bytes())
        with LiveBytes(set(), lasting(executor)) as live:
            run_once(executor, case(which), program, rank)
        return alive

    for rank, result in enumerate(run_strictly(plan.world, body)):
        assert not isinstance(result, BaseException), result
        assert result == list(memory(program, rank).alive)


def test_a_wholly_frozen_stage_only_runs_forward():
    """All but the head is frozen: the front's ranks have no backward and wait for no gradient."""
    chain = case("all but the head").traced.chain
    plan = plan_of("all but the head", *shape(2, 0, 2, own_ranks))
    program = compile_program(plan, chain, BATCH, "train")
    for rank in (0, 1):
        assert {a.kind for a in program.actions[rank]} <= {"load", "forward", "copy", "start", "wait", "update"}
        assert not any(memory(program, rank).saved)
        assert memory(program, rank).gradients == 0


def test_frozen_parameters_cost_the_planner_less():
    frozen, free = case("all but the head").traced.chain, trace(small_vgg(), (2, 6, 6), "small").chain
    assert free.frozen == ()
    assert frozen.fingerprint != free.fingerprint
    seconds = []
    for chain in (frozen, free):
        plan = make_plan(chain, *shape(2, 0, 2, own_ranks), world=4, global_batch=BATCH)
        cluster = local(4)
        profile = estimate(chain, cluster.device, "float64")
        seconds.append(assess(plan, chain, profile, cluster).prediction.step_s)
    assert seconds[0] < 0.8 * seconds[1]


def test_patterns_that_match_nothing_and_models_without_anything_to_train():
    with pytest.raises(ModelError, match=r"model.frozen: head.\* matches no parameter .* 0.weight"):
        freeze(small_vgg(), ["head.*"])
    source = defer(small_vgg)
    freeze(source.module, ["*"])
    traced = trace(source.module, (2, 6, 6), "small")
    plan = make_plan(traced.chain, *shape(1, 0, 0, own_ranks), world=1, global_batch=BATCH)
    with pytest.raises(ModelError, match="nothing would be trained"):
        run_ranks(plan, lambda rank, groups: Job(plan, traced, source, optimizer, groups, rank=rank))


def test_a_configured_training_keeps_and_exports_what_is_frozen(tmp_path):
    before = hybridpar_weights(small('model.frozen=["features.*"]'))
    train_here(tmp_path / "run", 'model.frozen=["features.*"]', "checkpoint.every=1", "train.steps=1")
    export(tmp_path / "run", tmp_path / "out.pt")
    after = torch.load(tmp_path / "out.pt", weights_only=True)
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert after[name].equal(value) == name.startswith("features."), name


def hybridpar_weights(config):
    source = load_model(config)[1]
    return {name: source.materialize(name, config.train.seed) for name in source.module.state_dict()}
