"""Sampled classes: under every plan the same classes take part as in a single process, and train alike."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hybridpar.errors import ConfigError, PlanError
from hybridpar.model.deferred import defer
from hybridpar.model.keyed import KeyedDropout, Keys, keep_mask
from hybridpar.model.linear import CosineLinear, GatheringCosine, GatheringLinear
from hybridpar.model.trace import trace
from hybridpar.optimizer_section import OptimizerConfig
from hybridpar.planning.blocks import expected_share
from hybridpar.planning.compile import compile as compile_program
from hybridpar.planning.memory import memory
from hybridpar.planning.plan import Plan, Recipe, Segment, Stage
from hybridpar.planning.sharding import best_sharding
from hybridpar.runtime.cross_entropy import CrossEntropy
from hybridpar.runtime.elementwise import check_rowwise
from hybridpar.runtime.job import Job
from hybridpar.runtime.loss import check_mixes
from hybridpar.runtime.margin import ArcFace, CosFace
from hybridpar.runtime.pieces import Stored, write
from hybridpar.runtime.sampling import SampledHead
from hybridpar.sections import LossConfig
from tests.numerics.test_margin import plain
from tests.support.checkpoints import OPTIMIZERS, make_job
from tests.support.parity import RELATIVE, near, overlapping_ranks, own_ranks, shape, shared_ranks
from tests.support.plans import make_plan
from tests.support.rendezvous import run_strictly
from tests.support.threads import run_ranks
from tests.support.training import (
    SEED,
    Case,
    Trained,
    assemble,
    make_executor,
    per_token,
    run_step,
    small_gpt,
    small_vgg,
    train_rank,
    whole_model,
)

CLASSES, SHARE, BATCH = 29, 0.2, 13
SAMPLES = (BATCH, BATCH, BATCH, 7)
WEIGHTS = tuple(0.25 + (c % 5) for c in range(CLASSES))
SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.1)
ADAMW = partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1, fused=True)
PLANS = {
    "one rank": (1, 0, 0),
    "pipeline": (0, 2, 1),
    "front and two shards": (2, 0, 2),
    "front and three shards": (2, 0, 3),
    "three stages": (2, 1, 3),
    "three stages, whole tail": (2, 1, 1),
}


def with_cosines(dropout: float = 0.2) -> nn.Module:
    model = small_vgg(dropout)
    assert isinstance(model, nn.Sequential)
    model[-1] = CosineLinear(9, CLASSES)
    return model


MODELS = {"linear": lambda: small_vgg(0.2, CLASSES), "cosine": with_cosines}


@cache
def traced(model: str) -> Any:
    source = defer(MODELS[model])
    return source, trace(source.module, (2, 6, 6), model)


def taken_of(step: int, labels: torch.Tensor, share: float, classes: int = CLASSES) -> torch.Tensor:
    """Which classes take part, (classes,)."""
    drawn = keep_mask(Keys(SEED, step, torch.arange(classes)), -1, 1 - share, (1,))[:, 0]
    drawn[labels[labels != -100]] = True
    return drawn


def train_sampled(case: Case, share: float) -> Trained:
    """Plain PyTorch: logits of classes that do not take part are -inf, and their rows go back after the step."""
    model = whole_model(case)
    head = model[-1]
    optimizer = case.optimizer(model.parameters())
    losses, first = [], 0
    for step, (x, y) in enumerate(case.data):
        for d in (m for m in model.modules() if isinstance(m, KeyedDropout)):
            d.keys = Keys(SEED, step, torch.arange(len(x)) + first)
        taken = taken_of(step, y, share, case.traced.chain.classes)
        optimizer.zero_grad()
        loss = case.criterion(model(x).masked_fill(~taken, float("-inf")), y)
        loss.backward()
        if case.max_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), case.max_norm)
        before = {p: {k: v.clone() for k, v in rows_of(optimizer, p).items()} for p in head.parameters()}
        optimizer.step()
        for parameter, values in before.items():
            for key, value in rows_of(optimizer, parameter).items():
                value[~taken] = values[key][~taken] if key in values else 0.0
        losses.append(loss.item())
        first += len(x)
    per_layer = zip(model, case.traced.names, strict=True)
    names = dict.fromkeys(names[local] for layer, names in per_layer for local, _ in layer.named_parameters())
    return Trained(losses, dict(zip(names, (p.detach() for p in model.parameters()), strict=True)), {})


def rows_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
    """Return a parameter's values, and the state that has its shape."""
    state = {k: v for k, v in optimizer.state.get(parameter, {}).items() if torch.is_tensor(v)}
    return {"value": parameter.data, **{k: v for k, v in state.items() if v.shape == parameter.shape}}


def criterion_of(margin: Any, weights: torch.Tensor | None) -> Any:
    return (
        partial(F.cross_entropy, weight=weights)
        if margin is None
        else partial(plain, margin=margin, weight=weights)
    )


@cache
def case_of(name: str, share: float = SHARE) -> tuple[Case, Trained]:
    margins = {"arcface": ArcFace(8.0, 0.5), "cosface": CosFace(16.0, 0.35)}
    margin, weighted = margins.get(name), name == "weighted"
    weights = torch.tensor(WEIGHTS, dtype=torch.float64) if weighted else None
    source, model = traced("cosine" if margin else "linear")
    case = Case(
        source,
        model,
        len(SAMPLES),
        SAMPLES,
        max_norm=0.3 if name == "clipped" else None,
        loss=CrossEntropy(class_weights=WEIGHTS if weighted else None, margin=margin, sampled=share),
        criterion=criterion_of(margin, weights),
        optimizer=ADAMW if name == "adamw" else SGD,
    )
    for _, labels in case.data:
        labels[2:5] = -100
    return case, train_sampled(case, share)


def plan_for(case: Case, degrees: tuple[int, int, int], share: float = SHARE, **fields: Any) -> Plan:
    number = sum(degrees)
    place = (own_ranks, shared_ranks, overlapping_ranks)[number % 3]
    ways = (("column", "row", "column"), ("row", "column", "column"))[number % 2]
    stages = shape(*degrees, place, uneven=number % 2 == 1, ways=ways)
    if fields.pop("recompute", False):
        stages = [replace(s, recompute=True) for s in stages]
    world = 1 + max(r for s in stages for r in s.ranks)
    recipe = Recipe(sampling=share, clipping=case.max_norm is not None)
    return make_plan(
        case.traced.chain, *stages, world=world, global_batch=BATCH, bucket_bytes=64, recipe=recipe, **fields
    )


def train(case: Case, plan: Plan) -> Any:
    def body(rank: int, communicators: Any) -> Any:
        executor = make_executor(case, plan, rank, communicators)
        metrics = train_rank(case, plan, rank, executor)
        return metrics, [o for modules in executor.blocks.values() for o in modules.owned]

    results = run_strictly(plan.world, body, plan.replica_world)
    for r in results:
        if isinstance(r, BaseException):
            raise r
    return results


def assert_same(case: Case, plan: Plan, single: Trained, relative: float = RELATIVE) -> None:
    results = train(case, plan)
    for metrics, _ in results:
        assert [m.loss for m in metrics] == pytest.approx(single.losses, rel=relative)
    parameters = assemble([o for _, o in results])
    assert parameters.keys() == single.parameters.keys()
    for name, expected in single.parameters.items():
        assert near(parameters[name], expected), name


@pytest.mark.parametrize("name", ["plain", "weighted", "arcface", "cosface", "clipped", "adamw"])
@pytest.mark.parametrize("degrees", PLANS.values(), ids=PLANS.keys())
def test_training_is_that_of_a_single_process(degrees: tuple[int, int, int], name: str) -> None:
    case, single = case_of(name)
    assert_same(case, plan_for(case, degrees), single)


@pytest.mark.parametrize("degrees", [(2, 0, 3), (1, 0, 0)], ids=str)
@pytest.mark.parametrize("name", ["plain", "arcface"])
def test_shards_without_any_class_in_a_step_and_steps_without_others(
    degrees: tuple[int, int, int], name: str
) -> None:
    """With few labels and a tiny share some shards have no class at all."""
    case, _ = case_of(name)
    labels = torch.tensor([28, 27, 28, 0, -100])
    data = [(x, labels[torch.arange(len(x)) % 5] if i % 2 else y * 0 + 3) for i, (x, y) in enumerate(case.data)]
    few = replace(case, data=data)
    assert_same(few, plan_for(case, degrees, 1e-9), train_sampled(few, 1e-9))


@pytest.mark.parametrize("name", ["plain", "arcface"])
def test_recomputed_stages_have_the_same_classes(name: str) -> None:
    case, single = case_of(name)
    assert_same(case, plan_for(case, (2, 1, 2), recompute=True), single)


@pytest.mark.parametrize("shards", [1, 3])
def test_labels_per_token(shards: int) -> None:
    source = defer(small_gpt)
    model = trace(source.module, (5,), "gpt", "int")
    loss, criterion = CrossEntropy(sampled=SHARE), partial(per_token, F.cross_entropy)
    case = Case(source, model, 3, (2, 2, 1), loss=loss, criterion=criterion, optimizer=SGD)
    for _, labels in case.data:
        labels[:, 3:] = -100
    front = Stage("front", 1, (Segment((0, 4), (0, 1)),))
    tail = Stage("tail", 2, (Segment((4, 5), (1, 0, 2)[:shards]),), ("column",) * (shards > 1))
    recipe = Recipe(sampling=SHARE)
    plan = make_plan(model.chain, front, tail, world=max(2, shards), global_batch=2, recipe=recipe)
    assert not all(taken_of(i, y, SHARE, 11).all() for i, (_, y) in enumerate(case.data))
    assert_same(case, plan, train_sampled(case, SHARE))


@pytest.mark.parametrize("degrees", [(2, 0, 3), (1, 0, 0)], ids=str)
@pytest.mark.parametrize("name", ["plain", "arcface"])
def test_with_a_share_of_one_it_is_the_plain_loss(degrees: tuple[int, int, int], name: str) -> None:
    case, _ = case_of(name, 1.0)
    plan = plan_for(case, degrees, 1.0)
    full = replace(plan, recipe=replace(plan.recipe, sampling=None))
    for (sampled, own), (losses, other) in zip(train(case, plan), train(case, full), strict=True):
        assert [m.loss for m in sampled] == pytest.approx([m.loss for m in losses], rel=1e-13)
        for a, b in zip(own, other, strict=True):
            torch.testing.assert_close(a.tensor, b.tensor, rtol=1e-12, atol=1e-13)


def test_other_rows_and_their_state_stay_as_they_are() -> None:
    case, _ = case_of("plain")
    plan = plan_for(case, (1, 0, 0))

    def body(rank: int, communicators: Any) -> None:
        executor = make_executor(case, plan, rank, communicators)
        (modules,) = (m for m in executor.blocks.values() if m.head)
        assert modules.head is not None
        weight, (optimizer,) = modules.head.layer.weight, executor.updater.optimizers.values()
        seen = torch.zeros(CLASSES, dtype=torch.bool)
        for step, (x, y) in enumerate(case.data):
            before = weight.detach().clone()
            program = compile_program(plan, case.traced.chain, len(x), "train")
            run_step(case, program, rank, executor, step)
            taken = taken_of(step, y, SHARE)
            seen |= taken
            assert torch.equal((weight != before).any(1), taken)
            assert torch.equal((optimizer.state[weight]["momentum_buffer"] != 0).any(1), seen)
            assert modules.head.standing is None
            assert {p for g in optimizer.param_groups for p in g["params"]} >= {weight}
        assert not seen.all()

    run_ranks(plan, body)


@pytest.mark.parametrize("degrees", [(2, 0, 3), (2, 1, 1)], ids=str)
def test_evaluations_take_all_classes(degrees: tuple[int, int, int]) -> None:
    case, _ = case_of("plain")
    plan = plan_for(case, degrees)
    program = compile_program(plan, case.traced.chain, BATCH, "evaluate")
    x, y = case.data[0]
    with torch.no_grad():
        logits = whole_model(case).eval()(x)

    def body(rank: int, communicators: Any) -> Any:
        executor = make_executor(case, plan, rank, communicators)
        run_step(case, compile_program(plan, case.traced.chain, BATCH, "train"), rank, executor)
        fresh = make_executor(case, plan, rank, communicators)
        return run_step(case, program, rank, fresh)

    for m in run_ranks(plan, body):
        assert m.loss == pytest.approx(F.cross_entropy(logits, y).item(), rel=1e-12)
        assert m.top1 == (logits.argmax(1) == y).sum()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_resumed_job_goes_on_bit_for_bit(tmp_path: Path, optimizer: str) -> None:
    """Nothing of the draw is saved: it depends on the number of the step."""
    case, _ = case_of("arcface")
    plan = plan_for(case, (2, 0, 2))

    def finish(job: Job) -> tuple[list[float], dict[str, torch.Tensor]]:
        losses = [job.step(case.data[n], samples=SAMPLES[n]) for n in range(job.steps, case.steps)]
        return losses, {n: p.copied().tensor for n, p in job.state.pieces().items()}

    def whole(rank: int, groups: Any) -> Any:
        job = make_job(case, plan, rank, groups, optimizer, loss=case.loss)
        for n in range(2):
            job.step(case.data[n], samples=SAMPLES[n])
        write(tmp_path, rank, job.state.pieces())
        return finish(job)

    def resumed(rank: int, groups: Any) -> Any:
        job = make_job(case, plan, rank, groups, optimizer, loss=case.loss)
        job.state.restore(Stored(tmp_path, plan.world), same_plan=True)
        job.go_on(2, 2 * BATCH)
        return finish(job)

    expected, got = run_ranks(plan, whole), run_ranks(plan, resumed)
    for (losses, held), (again, found) in zip(expected, got, strict=True):
        assert losses == again
        assert held.keys() == found.keys()
        assert all(torch.equal(held[name], found[name]) for name in held)


def test_a_job_wants_the_share_of_its_plan() -> None:
    case, _ = case_of("plain")
    plan = plan_for(case, (1, 0, 0))
    with pytest.raises(PlanError, match=r"recipe\.sampling: 0.2, but the loss has sampled=None"):
        run_ranks(plan, lambda r, groups: make_job(case, plan, r, groups))
    rprop = OptimizerConfig("Rprop", 0.1)
    with pytest.raises(ConfigError, match=r"loss\.sampled: Rprop"):
        run_ranks(plan, lambda r, groups: make_job(case, plan, r, groups, rprop, loss=case.loss))


# The draw


def head(first: int, width: int) -> SampledHead:
    return SampledHead(GatheringLinear(torch.rand(width, 4), torch.rand(width)), first)


def test_what_is_drawn_depends_on_the_seed_the_step_and_the_class_alone() -> None:
    labels = torch.tensor([3, 3, 17, 55])
    whole, parts = head(0, 60), [head(0, 7), head(7, 30), head(37, 23)]
    draws = []
    for seed, step in ((1, 0), (1, 1), (2, 0)):
        for h in (whole, *parts):
            h.draw(seed, step, 0.3, labels)
        assert torch.equal(torch.cat([p.classes for p in parts]), whole.classes)
        assert set(labels.tolist()) <= set(whole.classes.tolist())
        draws.append(whole.classes.tolist())
    assert len({tuple(d) for d in draws}) == len(draws)


def test_the_share_is_kept_on_average() -> None:
    many, labels = SampledHead(GatheringCosine(torch.rand(20_000, 1)), 0), torch.arange(1000)
    counts = []
    for step in range(10):
        many.draw(0, step, 0.1, labels)
        counts.append(len(many.classes))
    assert sum(counts) / 10 == pytest.approx(1000 + 1900, rel=0.02)


# What the planner makes of it


@pytest.mark.parametrize("model", MODELS)
def test_memory_is_that_of_the_expected_classes(model: str) -> None:
    source, described = traced(model)
    del source
    chain = described.chain
    case, _ = case_of("plain" if model == "linear" else "arcface")
    plan = plan_for(case, (2, 0, 2))
    full = replace(plan, recipe=replace(plan.recipe, sampling=None))
    share, whole = expected_share(SHARE, BATCH, chain), chain.gathered[-1] * 8
    assert SHARE < share < 1
    for mode in ("train", "evaluate"):
        pairs = [
            [memory(compile_program(p, chain, BATCH, mode), r) for r in range(plan.world)] for p in (plan, full)
        ]
        if mode == "evaluate":
            assert pairs[0] == pairs[1]
        else:
            saved = sum(b.gradients - a.gradients for a, b in zip(*pairs, strict=True))
            assert saved == pytest.approx(whole * (1 - 2 * share), abs=64)


def test_the_planner_gives_sampled_heads_columns() -> None:
    chain = traced("linear")[1].chain
    for allowed in (("column", "row"), ("row",), ("row", "column")):
        assert best_sharding(chain, 9, 2, allowed, sampled=True).modes[-1] == "column"


# What does not go


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CrossEntropy(sampled=0.0), r"loss\.sampled: 0.0 must be above 0"),
        (lambda: CrossEntropy(0.1, sampled=0.5), r"loss\.label_smoothing: 0.1 is spread over all classes"),
        (lambda: LossConfig(sampled=1.5), r"loss\.sampled: 1.5"),
        (lambda: check_mixes(CrossEntropy(sampled=0.5)), r"data\.mixup"),
        (lambda: check_rowwise(partial(torch.optim.Rprop, lr=0.1)), "Rprop updates a parameter by more"),
        (lambda: check_rowwise(partial(torch.optim.Adafactor, lr=0.1)), "Adafactor updates a parameter by more"),
    ],
)
def test_what_does_not_fit_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize("kind", ["SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "Adadelta", "Adamax", "NAdam"])
def test_optimizers_that_update_rows(kind: str) -> None:
    check_rowwise(partial(getattr(torch.optim, kind), lr=0.1, weight_decay=0.1))


def test_plans_that_do_not_fit_are_refused() -> None:
    case, _ = case_of("plain")
    with pytest.raises(PlanError, match=r"recipe\.sampling: 0.2 .*several ranks hold"):
        plan_for(case, (2, 0, 0))
    with pytest.raises(PlanError, match=r"recipe\.sampling: 2 .*must be above 0"):
        plan_for(case, (1, 0, 0), share=2)
    chain, stages = case.traced.chain, shape(2, 0, 2, own_ranks, ways=("column", "row", "row"))
    with pytest.raises(PlanError, match="needs column, not row"):
        make_plan(chain, *stages, world=4, recipe=Recipe(sampling=SHARE))
