"""Synchronised batch norms equal a single process that runs the same chunks through torch's own, in float64."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from functools import partial

import pytest
import torch

from hybridpar.errors import ProgramError
from hybridpar.model.shared_norm import SharedNorm
from hybridpar.model.trace import trace
from hybridpar.planning.blocks import positions
from hybridpar.planning.check import check
from hybridpar.planning.compile import compile as compile_program
from hybridpar.planning.memory import memory
from hybridpar.planning.plan import Plan, Recipe, Segment, Stage
from hybridpar.planning.program import Action, Program
from hybridpar.runtime.communicators import Communicators
from hybridpar.runtime.job import Job
from tests.support.counting import Counting, counting_executor, expected_log, run_once
from tests.support.norms import BATCH, STEPS, assert_chunks, case_of, near, plan_for
from tests.support.parity import RULES
from tests.support.plans import mutate, random_plan, random_replicated, random_samples
from tests.support.rendezvous import Endpoint, HangError, run_strictly
from tests.support.threads import run_ranks
from tests.support.training import Case, make_executor, run_step, train_rank, train_single
from tests.support.verifying import make_job, own_batch, verified

LAYERS = {"vgg_bn": 17, "resnet": 14}
"""Of the chains, and below cuts inside of them: behind a norm, and before the classifier."""
CUTS = {"vgg_bn": (2, 7, 12), "resnet": (4, 7, 10)}
WAYS = ("column", "row")
UNEVEN = (2.0, 1.0, 1.5)


def stages_of(name: str, shape: str) -> list[Stage]:
    """Shapes of plans: micro-batches that differ by stage, ragged last chunks."""
    (a, b, c), last = CUTS[name], LAYERS[name]
    return {
        "one rank": [Stage("front", 4, (Segment((0, last), (0,)),))],
        "front of 2": [Stage("front", 3, (Segment((0, last), (0, 1)),))],
        "front of 3": [Stage("front", 2, (Segment((0, last), (2, 0, 1), UNEVEN),))],
        "front and middle": [
            Stage("front", 2, (Segment((0, a), (0, 1)),)),
            Stage("middle", 3, (Segment((a, b), (2,)), Segment((b, last), (3,)))),
        ],
        "replicated middle": [
            Stage("front", 4, (Segment((0, a), (0,)),)),
            Stage("middle", 3, (Segment((a, b), (1, 2)), Segment((b, last), (2, 0)))),
        ],
        "front and tail": [
            Stage("front", 2, (Segment((0, c), (0, 1, 2), UNEVEN),)),
            Stage("tail", 5, (Segment((c, last), (2, 0)),), WAYS[: 2 if name == "resnet" else 1]),
        ],
        "three stages": [
            Stage("front", 3, (Segment((0, a), (0, 1), (1.0, 2.0)),)),
            Stage("middle", 2, (Segment((a, c), (1, 2)),)),
            Stage("tail", 7, (Segment((c, last), (0,)),)),
        ],
    }[shape]


SHAPES = [
    "one rank",
    "front of 2",
    "front of 3",
    "front and middle",
    "replicated middle",
    "front and tail",
    "three stages",
]
CASES = [(name, shape) for name in LAYERS for shape in SHAPES]


def stages_for(name: str, shape: str) -> list[Stage]:
    stages = stages_of(name, shape)
    if name == "vgg_bn" and shape == "front and tail":
        front, tail = (
            stages  # its classifier has a norm, which no tail can shard: the last linear alone is the tail
        )
        first, last = front.segments[0], tail.segments[0]
        return [
            replace(front, segments=(replace(first, layers=(0, 14)),)),
            replace(tail, segments=(replace(last, layers=(14, 17)),)),
        ]
    return stages


@pytest.mark.parametrize(("number", "name", "shape"), [(i, *c) for i, c in enumerate(CASES)], ids=str)
def test_every_shape_of_plan(number: int, name: str, shape: str) -> None:
    clipping, recompute = number % 2 == 0, number % 3 == 1
    norm = 0.3 if clipping else None
    case, plain = (case_of(name, max_norm=norm, synchronised=s) for s in (True, False))
    stages = [replace(s, recompute=recompute) for s in stages_for(name, shape)]
    fields = {"order": RULES[number // 2 % 2], "bucket_bytes": (1, 8 * 2**20)[number % 2]}
    plan = plan_for(case, *stages, recipe=Recipe(clipping=clipping), **fields)
    assert_chunks(plan, case, plain, gloo=number % 4 == 0)


@pytest.mark.parametrize("last", [1, 2, 5])
@pytest.mark.parametrize("shape", ["front of 3", "three stages"])
def test_replicas_without_samples_in_a_chunk_take_part(shape: str, last: int) -> None:
    samples = (BATCH, last) * 2
    case, plain = (case_of("resnet", samples, synchronised=s) for s in (True, False))
    plan = plan_for(case, *stages_for("resnet", shape), bucket_bytes=1)
    assert_chunks(plan, case, plain, gloo=last == 1)


@pytest.mark.parametrize("samples", [(BATCH,) * STEPS, (BATCH, 2, BATCH, 1), (BATCH, 5) * 2], ids=str)
@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("shares", [None, (1.0, 2.0, 0.5)])
def test_plan_replicas(samples: tuple[int, ...], joint: bool, shares: tuple[float, ...] | None) -> None:
    """With one chunk each they share statistics; with several each replica of the plan has its own."""
    case, plain = (case_of("resnet", samples, 0.3, synchronised=s) for s in (True, False))
    stages = [
        Stage("front", (4 if shares else 3) if joint else 2, (Segment((0, 5), (0, 1)),)),
        Stage("tail", 2, (Segment((5, LAYERS["resnet"]), (1,)),)),
    ]
    fields = {"replicas": 3, "replica_shares": shares, "bucket_bytes": 1}
    plan = plan_for(case, *stages, recipe=Recipe(clipping=True), **fields)
    assert_chunks(plan, case, plain, gloo=joint and shares is None)
    of_front = [o for o in programs(plan, case)[0].operations if o.communicator == "moments:front"]
    assert of_front
    assert all(o.across == joint for o in of_front)


def programs(plan: Plan, case: Case, samples: int = BATCH) -> list[Program]:
    found = [compile_program(plan, case.traced.chain, samples, "train", k) for k in range(plan.replicas)]
    for program in found:
        check(program)
    return found


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("replicas", [1, 2])
def test_one_chunk_is_training_on_whole_batches(name: str, replicas: int) -> None:
    """Whatever the split, it is what torch does in one process with the whole batch."""
    case, plain = (case_of(name, max_norm=0.3, synchronised=s) for s in (True, False))
    stages = [
        Stage("front", 5 if replicas == 1 else 3, (Segment((0, CUTS[name][1]), (0, 1, 2)),)),
        Stage("middle", BATCH // replicas, (Segment((CUTS[name][1], LAYERS[name]), (3,)),)),
    ]
    plan = plan_for(case, *stages, replicas=replicas, recipe=Recipe(clipping=True))
    single = train_single(plain)
    results = train_both(plan, case)
    for losses, _ in results:
        assert losses == pytest.approx(single.losses, rel=1e-10)
    for parameters in (own for _, own in results):
        for parameter_name, value in parameters.items():
            assert near(value, single.parameters[parameter_name]), parameter_name


def train_both(plan: Plan, case: Case) -> list[tuple[list[float], dict[str, torch.Tensor]]]:
    def body(rank: int, communicators: Communicators) -> tuple[list[float], dict[str, torch.Tensor]]:
        job, first, losses = make_job(case, plan, rank, communicators), 0, []
        for x, y in case.data:
            losses.append(job.step(own_batch(job, x, y, first)))
            first += len(x)
        return losses, {n: o.tensor.detach() for n, o in job.parameters.items()}

    return run_ranks(plan, body)


@pytest.mark.parametrize("frozen", [1, 2, 4, 6])
def test_frozen_layers_before_and_behind_norms(frozen: int) -> None:
    """Norms that give no gradient to what is before them meet in their forward only."""
    case, plain = (case_of("resnet", frozen=frozen, synchronised=s) for s in (True, False))
    plan = plan_for(case, *stages_for("resnet", "front and tail"), bucket_bytes=1)
    assert_chunks(plan, case, plain)
    moments = [o for o in programs(plan, case)[0].operations if o.content == "moments"]
    backward = sum(o.backward for o in moments)
    assert backward < len(moments) - backward


# Evaluation, and what else goes by statistics


@pytest.mark.parametrize("synchronised", [True, False])
@pytest.mark.parametrize("replicas", [1, 2])
def test_evaluation_and_state_have_the_statistics_that_are_documented(synchronised: bool, replicas: int) -> None:
    """Those of the single process, or the mean over the replicas, each with its own."""
    case = case_of("resnet", synchronised=synchronised)
    stages = [Stage("front", 2, (Segment((0, LAYERS["resnet"]), (0, 1)),))]
    plan = plan_for(case, *stages, replicas=replicas)

    def body(
        rank: int, communicators: Communicators
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], float]:
        job, first = make_job(case, plan, rank, communicators), 0
        for x, y in case.data:
            job.step(own_batch(job, x, y, first))
            first += len(x)
        own = running(job)
        loss = job.evaluate([case.data[0]]).loss
        return own, running(job), loss

    results = run_ranks(plan, body)
    before = [own for own, _, _ in results]
    for name in before[0]:
        mean = sum(own[name] for own in before) / len(before)
        assert all(near(after[name], mean) for _, after, _ in results)
        spread = max(float((own[name] - before[0][name]).abs().max()) for own in before)
        assert (spread == 0.0) == (synchronised and replicas == 1)
    assert len({loss for _, _, loss in results}) == 1


def running(job: Job) -> dict[str, torch.Tensor]:
    return {
        f"{block}.{name}": buffer.clone()
        for block, modules in job.blocks.items()
        for name, buffer in modules.named_buffers()
        if buffer.is_floating_point()
    }


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(("replicas", "micro_batch"), [(1, 2), (2, 2), (2, 4)])
def test_a_verification_agrees(name: str, replicas: int, micro_batch: int) -> None:
    """With chunks of several micro-batches, also over plan replicas, and with recomputation."""
    case = case_of(name, (BATCH, 6))
    a, last = CUTS[name][0], LAYERS[name]
    stages = [
        Stage("front", micro_batch, (Segment((0, a), (0, 1)),)),
        Stage("middle", 2, (Segment((a, last), (1, 2)),), recompute=True),
    ]
    ledger = verified(case, plan_for(case, *stages, replicas=replicas))
    assert ledger.first is None, ledger.first
    assert ledger.counts["statistics"] > 0


def test_a_norm_that_is_left_to_itself_is_found() -> None:
    """The test above would fail if ranks kept their statistics for themselves."""
    case = case_of("resnet", (BATCH,))

    def spoil(job: Job) -> None:
        for modules in job.blocks.values():
            for norm in modules.norms:
                norm.learn = partial(standard, norm)  # type: ignore[method-assign]

    plan = plan_for(case, *stages_for("resnet", "front of 2"))
    found = verified(case, plan, {1: spoil}).first
    assert found is not None
    assert (found.what, found.layer) == ("output", case.traced.chain.layers[1].name)


def standard(norm: SharedNorm, moments: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Statistics that nobody told."""
    del moments
    return torch.zeros(norm.num_features, dtype=torch.float64), torch.ones(norm.num_features, dtype=torch.float64)


def test_a_value_that_is_not_finite_is_found_without_another_message() -> None:
    """The layers run again one by one where it arose, on that rank alone."""
    case = case_of("resnet", (BATCH,))
    case = replace(case, data=[(x.clone(), y) for x, y in case.data])
    plan = plan_for(case, *stages_for("resnet", "front and middle"))

    def body(rank: int, communicators: Communicators) -> str:
        job = make_job(case, plan, rank, communicators)
        if rank == 2:
            with torch.no_grad():
                next(p for m in job.blocks.values() for p in m.parameters())[0] = math.inf
        x, y = case.data[0]
        job.step(own_batch(job, x, y, 0))
        return str(job.origin)

    named = run_ranks(plan, body)
    assert named[:2] == ["None", "None"]
    assert "whose weights are not finite" in named[2]


def test_under_autocast_figures_are_float32_and_a_split_agrees_up_to_roundings() -> None:
    source = case_of("resnet").source
    traced = trace(source.module, (2, 6, 6), "resnet", autocast="bfloat16")
    case = Case(source, traced, 2, (BATCH,) * 2, dtype=torch.float32)
    losses = []
    for ranks in ((0,), (0, 1)):
        stage = Stage("front", BATCH // len(ranks), (Segment((0, LAYERS["resnet"]), ranks),))
        plan = replace(plan_for(case, stage), precision="float32")
        sizes = {o.bytes for o in programs(plan, case)[0].operations if o.content == "moments"}
        assert sizes == (set() if len(ranks) == 1 else {(2 * 4 + 1) * 4, (2 * 6 + 1) * 4})

        def body(rank: int, endpoint: Endpoint, plan: Plan = plan) -> list[float]:
            return [m.loss for m in train_rank(case, plan, rank, make_executor(case, plan, rank, endpoint))]

        results = run_strictly(plan.world, body)
        assert all(r == results[0] for r in results)
        losses.append(results[0])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


# The program


@pytest.mark.parametrize(("number", "name", "shape"), [(i, *c) for i, c in enumerate(CASES)], ids=str)
def test_execution_is_the_program(number: int, name: str, shape: str) -> None:
    """Actions in order, bytes of every message, saved bytes after every action; with recomputation and without."""
    case = case_of(name, (BATCH,))
    stages = [replace(s, recompute=number % 2 == 1) for s in stages_for(name, shape)]
    plan = plan_for(case, *stages, bucket_bytes=(1, 2000)[number % 2])
    (program,) = programs(plan, case)

    def body(rank: int, endpoint: Endpoint) -> tuple[list[Action], list[object], list[int]]:
        communicators = Counting(endpoint)
        executor = counting_executor(case, plan, rank, communicators)
        run_once(executor, case, program, rank)
        return executor.actions, communicators.log, executor.alive

    for rank, result in enumerate(run_strictly(plan.world, body)):
        assert not isinstance(result, BaseException), result
        actions, messages, alive = result
        assert actions == list(program.actions[rank])
        assert messages == expected_log(program, rank)
        assert alive == list(memory(program, rank).saved)


def test_evaluation_tells_nobody_anything() -> None:
    case = case_of("resnet")
    plan = plan_for(case, *stages_for("resnet", "front of 3"))
    program = compile_program(plan, case.traced.chain, BATCH, "evaluate")
    assert all(o.content != "moments" for o in program.operations)


def test_bytes_are_two_figures_per_channel_and_a_count() -> None:
    case = case_of("resnet")
    plan = plan_for(case, *stages_for("resnet", "front of 2"))
    (program,) = programs(plan, case)
    moments = [o for o in program.operations if o.content == "moments"]
    channels = [4, 4, 4, 6, 6, 6, 6, 6]
    chunks = 3
    assert len(moments) == 2 * chunks * len(channels)
    assert [o.bytes for o in moments[: len(channels)]] == [(2 * c + 1) * 8 for c in channels]
    backward = [o for o in moments if o.backward][: len(channels)]
    assert [(o.kind, o.norm) for o in backward] == [("all_reduce", n) for n in reversed(range(len(channels)))]


CASE = case_of("resnet", (1,))
MUTANTS, PLANS = 60, 20


def random_programs(count: int, seed: int) -> list[Program]:
    dice = random.Random(seed)  # noqa: S311
    found = []
    while len(found) < count:
        plan = random_plan(CASE.traced.chain, dice)
        program = compile_program(plan, CASE.traced.chain, random_samples(plan, dice), "train")
        if any(o.content == "moments" for o in program.operations):
            found.append(program)
    return found


def outcome_of(program: Program) -> str:
    """Run a step on the strictest machine: right if it is what the unchanged program does."""
    plan = program.plan
    case = case_of("resnet", (program.samples,), 0.1 if plan.recipe.clipping else None)

    def body_of(run: Program) -> object:
        def body(rank: int, endpoint: Endpoint) -> dict[str, torch.Tensor]:
            executor = make_executor(case, plan, rank, endpoint)
            run_step(case, run, rank, executor)
            return {f"{b}.{n}": t.detach() for b, m in executor.blocks.items() for n, t in m.state_dict().items()}

        return body

    results = run_strictly(plan.world, body_of(program))
    failures = [r for r in results if isinstance(r, BaseException)]
    if not failures:
        unchanged = compile_program(plan, case.traced.chain, program.samples, "train")
        expected = run_strictly(plan.world, body_of(unchanged))
        same = all(near(own[n], t) for own, other in zip(results, expected, strict=True) for n, t in other.items())
        return "right" if same else "wrong"
    causes = [f.__cause__ or f for f in failures]
    return "hangs" if all(isinstance(c, HangError) for c in causes) else "fails"


def test_random_plans_pass_the_check_and_every_accepted_mutant_is_right() -> None:
    bases, dice = random_programs(PLANS, seed=31), random.Random(32)  # noqa: S311
    for program in bases:
        check(program)
        assert outcome_of(program) == "right"
    seen = {"accepted": 0, "broken": 0}
    for _ in range(MUTANTS):
        mutant, said = mutate(dice.choice(bases), dice)
        try:
            check(mutant)
        except ProgramError:
            seen["broken"] += outcome_of(mutant) != "right"
        else:
            seen["accepted"] += 1
            assert outcome_of(mutant) == "right", (said, mutant.plan, mutant.samples)
    assert min(seen.values()) > MUTANTS // 30, seen


def test_random_plan_replicas_finish_right_on_the_strictest_machine() -> None:
    """Replicas meet in norms where each has one chunk, whatever else their programs are; some have no samples."""
    dice, joint, without = random.Random(33), 0, 0  # noqa: S311
    while joint < 12:
        plan = random_replicated(CASE.traced.chain, dice)
        if not any(position.joint and position.meets for position in positions(plan)):
            continue
        samples = min(plan.global_batch, dice.choice((1, 2, 5, 99, 99)))
        norm = 0.1 if plan.recipe.clipping else None
        case, plain = (case_of("resnet", (samples,), norm, synchronised=s) for s in (True, False))
        assert_chunks(plan, case, plain)
        joint, without = joint + 1, without + any(a == b for a, b in plan.replica_samples(samples))
    assert without > 2
