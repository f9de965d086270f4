"""Compressed gradients: against one process that compresses likewise, over plans; memory, checkpoints, warm-up."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hybridpar.cluster.describe import local
from hybridpar.planning.bound import Bounds
from hybridpar.planning.check import check
from hybridpar.planning.compile import compile as compile_program
from hybridpar.planning.compression import Compression
from hybridpar.planning.costs import Costs
from hybridpar.planning.memory import memory
from hybridpar.planning.plan import Recipe
from hybridpar.planning.simulate import step_time
from hybridpar.profiling.analytic import estimate
from hybridpar.runtime.job import Job
from hybridpar.runtime.pieces import Stored, write
from hybridpar.train_section import LossScale
from scripts.bench.accuracy.live import LiveBytes
from tests.numerics.test_memory import Unseen, lasting
from tests.support.counting import Counting, expected_log, run_once
from tests.support.parity import (
    assert_same,
    case_of,
    near,
    overlapping_ranks,
    own_ranks,
    plan_of,
    reference,
    shape,
    shared_ranks,
)
from tests.support.plans import random_plan, random_samples
from tests.support.rendezvous import run_strictly
from tests.support.threads import run_ranks
from tests.support.training import (
    MOMENTUM,
    RATE,
    SEED,
    assemble,
    make_case,
    make_executor,
    run_step,
    train_rank,
    whole_model,
)

STEPS, BATCH = 10, 13
EVERY = 0.01
"""A rate above which everything is compressed, even where it becomes larger."""
SHAPES = {
    "front": ((3, 0, 0), own_ranks, 1),
    "front and tail": ((2, 1, 2), overlapping_ranks, 1),
    "shared": ((2, 0, 3), shared_ranks, 1),
    "replicated middle": ((1, 1, 0), own_ranks, 1),
    "plan replicas": ((2, 1, 2), overlapping_ranks, 2),
    "three plan replicas": ((0, 1, 2), own_ranks, 3),
}


def low_rank(rank, **fields):
    return Compression("power_sgd", rank, **{"warmup_steps": 0, "min_rate": EVERY, **fields})


def make(name, compression, *, bucket_bytes=700, clipping=False):
    degrees, place, replicas = SHAPES[name]
    stages = shape(*degrees, place, replicas=2 if name == "replicated middle" else 1)
    recipe = Recipe(clipping=clipping, compression=compression)
    return plan_of(*stages, replicas=replicas, bucket_bytes=bucket_bytes, recipe=recipe)


def trained(plan, case):
    """Train everywhere; of every rank its parameters and the right factors that it began with."""

    def body(rank, groups):
        executor = make_executor(case, plan, rank, groups)
        kept = [entry for c in executor.updater.compressors.values() for entry in c.kept()]
        first = {(o.name, o.start): (o, tensor.clone()) for what, o, tensor in kept if what == "right"}
        metrics = train_rank(case, plan, rank, executor)
        return metrics, [o for modules in executor.blocks.values() for o in modules.owned], first

    return run_ranks(plan, body)


class Worker:
    """PowerSGD as the paper has it, of one slice of one gradient: the sum over all workers, compressed."""

    def __init__(self, of, right, feedback):
        self.of, self.right, self.feedback, self.error = of, right, feedback, 0.0

    def compress(self, gradient):
        part = gradient
        if self.of.dim is not None:
            part = gradient.narrow(self.of.dim, self.of.start, self.of.tensor.shape[self.of.dim])
        matrix = part.reshape(len(part), -1) + self.error
        basis = torch.linalg.svd(matrix @ torch.linalg.qr(self.right)[0], full_matrices=False)[0]
        self.right = matrix.T @ basis
        if self.feedback:
            self.error = matrix - basis @ self.right.T
        part.copy_((basis @ self.right.T).view_as(part))


def single(case, workers):
    """One process, whose gradients are compressed before every update."""
    model = whole_model(case)
    names = dict.fromkeys(n for per_layer in case.traced.names for n in per_layer.values())
    named = dict(zip(names, model.parameters(), strict=True))
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM)
    losses = []
    for x, y in case.data:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        for worker in workers:
            worker.compress(named[worker.of.name].grad)
        if case.max_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), case.max_norm)
        optimizer.step()
        losses.append(loss.item())
    return losses, {n: p.detach() for n, p in named.items()}


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("name", SHAPES)
def test_low_rank_equals_one_process_that_compresses_likewise(name, rank):
    """With and without error feedback, with and without clipping; several sizes of buckets."""
    feedback, clip = (rank + len(name)) % 2 == 0, 0.3 if rank == 2 else None
    compression, size = low_rank(rank, error_feedback=feedback), (1, 5000)[rank - 1]
    plan = make(name, compression, bucket_bytes=size, clipping=clip is not None)
    case = case_of(max_norm=clip)
    results = trained(plan, case)
    first = {key: value for _, _, own in results[: plan.replica_world] for key, value in own.items()}
    assert first
    losses, expected = single(case, [Worker(o, right, feedback) for o, right in first.values()])
    assert losses != pytest.approx(reference((0.0, BATCH, clip)).losses, rel=1e-6)
    assert [m.loss for m in results[0][0]] == pytest.approx(losses, rel=1e-10)
    values = assemble([owned for _, owned, _ in results[: plan.replica_world]])
    assert values.keys() == expected.keys()
    for parameter, value in expected.items():
        assert near(values[parameter], value), parameter


@pytest.mark.parametrize("name", SHAPES)
def test_full_rank_loses_nothing(name):
    case = case_of()
    assert_same(make(name, low_rank(1000)), case, reference((0.0, BATCH, None)), gloo=True)


@pytest.mark.parametrize("feedback", [False, True])
@pytest.mark.parametrize("name", ["front and tail", "plan replicas"])
def test_a_scaled_loss_changes_nothing_and_a_skipped_step_leaves_nothing_behind(name, feedback):
    """Of six steps the gradients of the fourth overflow: the others are those of a training without it."""
    plain, scaled = make_case(steps=6), make_case(steps=6)
    scaled.scaling = LossScale(init=2.0**24, growth_interval=2)
    scaled.data[3][0][4:7] *= 1e305
    del plain.data[3]
    plan = make(name, low_rank(2, error_feedback=feedback), clipping=True)
    plain.max_norm = scaled.max_norm = 0.3
    expected = trained(plan, replace(plain, samples=(BATCH,) * 5, steps=5))
    results = trained(replace(plan, recipe=replace(plan.recipe, scaling=True)), scaled)
    losses = [m.loss for m in results[0][0]]
    assert losses[:3] + losses[4:] == pytest.approx([m.loss for m in expected[0][0]], rel=1e-10)
    values, found = (assemble([o for _, o, _ in r[: plan.replica_world]]) for r in (expected, results))
    for parameter, value in values.items():
        assert near(found[parameter], value), parameter


@pytest.mark.parametrize("compression", [Compression("bfloat16"), low_rank(1), low_rank(2, error_feedback=False)])
@pytest.mark.parametrize("name", SHAPES)
def test_all_who_hold_a_parameter_hold_the_same_bits(name, compression):
    plan = make(name, compression)
    held = {}
    for _, owned, _ in trained(plan, case_of(samples=(BATCH, BATCH, 2))):
        for o in owned:
            held.setdefault((o.name, o.start), []).append(o.tensor)
    assert any(len(copies) > 1 for copies in held.values())
    for copies in held.values():
        assert all(torch.equal(copies[0], other) for other in copies)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_bfloat16_is_the_sum_of_rounded_gradients(ranks):
    """Each of n numbers is rounded to 8 bits, and so is each of n - 1 sums: relative errors of at most 2^-8 each
    (Higham, "Accuracy and Stability of Numerical Algorithms", section 4.2). Of two ranks it is one rounded sum."""
    case = case_of(samples=(BATCH,))
    replicas = 1 + ranks // 4
    plan = plan_of(*shape(ranks // replicas, 0, 0, own_ranks), replicas=replicas)
    plan = replace(plan, recipe=Recipe(compression=Compression("bfloat16")), bucket_bytes=700)

    def body(rank, groups):
        executor, before = make_executor(case, plan, rank, groups), {}
        compress = executor.updater.compress

        def noted(block):
            before[block] = executor.updater.bucket(block).clone()
            compress(block)

        executor.updater.compress = noted
        program = compile_program(plan, case.traced.chain, BATCH, "train", plan.locate(rank)[0])
        run_step(case, program, plan.locate(rank)[1], executor)
        return before, {block: executor.updater.bucket(block) for block in before}

    results = run_ranks(plan, body)
    assert len(results) == ranks
    for block, total in results[0][1].items():
        parts = torch.stack([before[block] for before, _ in results])
        error, most = (total - parts.sum(0)).abs(), ((1 + 2**-8) ** ranks - 1) * parts.abs().sum(0)
        assert (error <= most).all()
        assert error.max() > 0
        if ranks == 2:
            assert torch.equal(total, parts.bfloat16().float().sum(0).bfloat16().double())


def test_memory_and_messages_are_those_of_the_program():
    """Live bytes of a second step and the bytes of every sum, whatever is compressed how."""
    plain, scaled = case_of(samples=(BATCH,)), case_of(samples=(BATCH,))
    scaled.scaling = LossScale()
    kinds = (Compression("bfloat16"), plain), (low_rank(2), plain), (low_rank(1, error_feedback=False), plain)
    for number, (compression, case) in enumerate((*kinds, (low_rank(1), scaled))):
        plan = make("front and tail", compression, bucket_bytes=(700, 1, 5000, 700)[number])
        recipe = replace(plan.recipe, optimizer_states=1, scaling=case.scaling is not None)
        plan = replace(plan, recipe=recipe)
        program = compile_program(plan, case.traced.chain, BATCH, "train")

        def body(rank, endpoint, plan=plan, program=program, case=case):
            counting = Counting(endpoint)
            executor = make_executor(case, plan, rank, Unseen(counting))
            run_once(executor, case, program, rank)
            messages, endpoint.step = list(counting.log), 1
            alive = []
            executor.observer = lambda *_: alive.append(live.bytes())
            with LiveBytes(set(), everything(executor)) as live:
                run_once(executor, case, program, rank)
            return messages, alive

        for rank, result in enumerate(run_strictly(plan.world, body)):
            assert not isinstance(result, BaseException), result
            messages, alive = result
            assert messages == expected_log(program, rank)
            assert alive == list(memory(program, rank).alive)
        assert any(memory(program, rank).compression for rank in range(plan.world))


def everything(executor):
    yield from lasting(executor)
    for compressor in executor.updater.compressors.values():
        names = ["_low"] if hasattr(compressor, "_low") else ["_error", "_left", "_right"]
        yield from (getattr(compressor, name) for name in names)
        yield from (copy for _, copy in getattr(compressor, "_copies", ()))


@pytest.mark.parametrize("seed", range(12))
def test_random_plans_run_on_the_strictest_machine(seed):
    """They pass the check, hang nowhere, and no bound of the step time is above the simulated one."""
    dice = random.Random(seed)  # noqa: S311 - not for secrets
    chain = case_of().traced.chain
    plan = random_plan(chain, dice)
    compression = dice.choice((Compression("bfloat16"), low_rank(1), low_rank(2, min_rate=1.5)))
    plan = replace(plan, recipe=replace(plan.recipe, compression=compression))
    if dice.random() < 0.5 and plan.global_batch > 1:
        plan = replace(plan, replicas=2, world=2 * plan.world)
        if any(s.in_flight is not None for s in plan.stages):
            plan = replace(plan, stages=tuple(replace(s, in_flight=None) for s in plan.stages))
    smallest = max(1, plan.replica_batch)
    plan = replace(plan, stages=tuple(replace(s, micro_batch=min(s.micro_batch, smallest)) for s in plan.stages))
    samples = random_samples(plan, dice)
    programs = [compile_program(plan, chain, samples, "train", k) for k in range(plan.replicas)]
    for program in programs:
        check(program)
    costs = Costs(estimate(chain, local(plan.world).device, "float64"), local(plan.world))
    whole = compile_program(plan, chain, plan.global_batch, "train")
    assert Bounds(chain, costs).of(plan) <= step_time(whole, costs) * (1 + 1e-9)
    case = replace(case_of(samples=(samples,)), max_norm=1.0 if plan.recipe.clipping else None)

    def body(rank, endpoint):
        replica, place = plan.locate(rank)
        return run_step(case, programs[replica], place, make_executor(case, plan, rank, endpoint)).loss_sum

    losses = run_strictly(plan.world, body, plan.replica_world)
    assert all(isinstance(loss, float) for loss in losses), losses
    assert len(set(losses)) == 1


def job_of(plan, rank, groups):
    case = case_of()
    return Job(plan, case.traced, case.source, momentum, groups, rank=rank, seed=SEED), case.data[:6]


def momentum(parameters):
    return torch.optim.SGD(parameters, lr=RATE, momentum=MOMENTUM)


def tensors(job):
    return {name: o.tensor.detach().clone() for name, o in job.parameters.items()}


@pytest.mark.parametrize("name", ["front and tail", "plan replicas"])
def test_it_goes_on_from_a_checkpoint_bit_for_bit(tmp_path, name):
    plan = make(name, low_rank(1))

    def saving(rank, groups):
        job, data = job_of(plan, rank, groups)
        for batch in data[:3]:
            job.step(batch)
        write(tmp_path, rank, job.state.pieces())
        for batch in data[3:]:
            job.step(batch)
        return tensors(job)

    def resuming(rank, groups, *, same_plan=True):
        job, data = job_of(plan, rank, groups)
        job.state.restore(Stored(tmp_path, plan.world), same_plan=same_plan)
        job.go_on(3, 3 * BATCH)
        for batch in data[3:]:
            job.step(batch)
        return tensors(job)

    expected = run_ranks(plan, saving)
    for rank, values in enumerate(run_ranks(plan, resuming)):
        assert all(torch.equal(value, expected[rank][n]) for n, value in values.items())
    anew = run_ranks(plan, lambda rank, groups: resuming(rank, groups, same_plan=False))
    assert any(not torch.equal(value, expected[0][n]) for n, value in anew[0].items())


def test_another_plan_goes_on_and_compression_begins_anew(tmp_path):
    one, other = make("front and tail", low_rank(1)), make("front", low_rank(2))

    def saving(rank, groups):
        job, data = job_of(one, rank, groups)
        job.step(data[0])
        write(tmp_path, rank, job.state.pieces())

    def resuming(rank, groups):
        job, data = job_of(other, rank, groups)
        job.state.restore(Stored(tmp_path, one.world), same_plan=False)
        job.go_on(1, BATCH)
        (compressor, *_) = job._updater.compressors.values()
        assert not any(tensor.any() for what, _, tensor in compressor.kept() if what == "error")
        return job.step(data[1])

    run_ranks(one, saving)
    assert len(set(run_ranks(other, resuming))) == 1


def test_the_first_steps_are_not_compressed():
    plan = make("front and tail", low_rank(1, warmup_steps=2))
    exact = replace(plan, recipe=Recipe())

    def body(rank, groups, chosen=plan):
        job, data = job_of(chosen, rank, groups)
        contents = []
        for batch in data[:4]:
            contents.append({o.content for o in job.program().operations})
            job.step(batch)
            contents[-1].add(job.parameters["0.weight"].tensor.detach().sum().item() if rank == 0 else 0.0)
        return contents

    compressed, plain = run_ranks(plan, body)[0], run_ranks(exact, lambda r, g: body(r, g, exact))[0]
    assert compressed[:2] == plain[:2]
    assert [("left" in c, "bucket" in c) for c in compressed] == [(False, True)] * 2 + [(True, False)] * 2
    assert compressed[2] != plain[2]


@cache
def last_loss(compression):
    plan = make("front", compression)
    case = make_case(steps=60)
    case.data = [case.data[0]] * len(case.data)
    return trained(plan, case)[0][0][-1].loss


def test_training_converges_with_it():
    """The same batch again and again is learned nearly as well as with whole gradients."""
    start = reference((0.0, BATCH, None)).losses[0]
    whole = start - last_loss(None)
    assert whole > 0.2 * start
    for compression in (Compression("bfloat16"), low_rank(1)):
        assert start - last_loss(compression) > 0.9 * whole


def test_tensors_of_one_dim_and_those_that_would_grow_are_summed_as_they_are():
    compression = Compression("power_sgd", rank=2)
    assert compression.matrix((100,)) is None
    assert compression.matrix((8, 8)) is None
    assert compression.matrix((64, 32, 3, 3)) == (64, 288, 2)
    assert compression.sent_bytes((64, 32, 3, 3), 4) == (64 + 288) * 2 * 4
    assert compression.sent_bytes((8, 8), 4) == 256
    plan = make("front", Compression("power_sgd", rank=1, warmup_steps=0))
    program = compile_program(plan, case_of().traced.chain, BATCH, "train")
    contents = {o.content for o in program.operations}
    assert {"left", "right", "rest"} <= contents
