"""What runs is the program: every action and every operation, bytes included; and what a failure says."""

import random
import threading
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hybridpar.errors import DataError
from hybridpar.model.deferred import defer
from hybridpar.model.trace import trace
from hybridpar.planning.check import check
from hybridpar.planning.compile import compile as compile_program
from hybridpar.planning.plan import Recipe, Segment, Stage
from hybridpar.runtime.executor import ActionError
from tests.support.counting import Counting, expected_log
from tests.support.plans import make_plan, random_plan, random_samples
from tests.support.threads import run_ranks
from tests.support.training import Case, make_case, make_executor, run_step, small_vgg, whole_model

LAYERS = 16


@cache
def case_of(samples, dropout=0.4, max_norm=None):
    base = make_case(dropout=dropout, samples=1)
    return Case(base.source, base.traced, 2, (samples, samples), max_norm)


CHAIN = case_of(1).traced.chain


def three_stages(ways=("row", "column", "row"), clipping=True):
    front = Stage("front", 2, (Segment((0, 4), (1, 0), (2.0, 1.0)),))
    middle = Stage("middle", 3, (Segment((4, 6), (2,)), Segment((6, 7), (3, 1))))
    tail = Stage("tail", 5, (Segment((7, LAYERS), (2, 0, 3), (1.0, 2.0, 1.0)),), ways)
    return make_plan(CHAIN, front, middle, tail, world=4, bucket_bytes=1, recipe=Recipe(clipping=clipping))


def front_and_tail(ways=("column", "row", "column")):
    front = Stage("front", 3, (Segment((0, 9), (0, 1, 2)),))
    return make_plan(CHAIN, front, Stage("tail", 4, (Segment((9, LAYERS), (0, 1, 2)),), ways), world=3)


def data_parallel():
    return make_plan(CHAIN, Stage("front", 2, (Segment((0, LAYERS), (2, 1, 0)),)), world=3, bucket_bytes=1000)


def pipeline():
    cuts = [(0, 4), (4, 9), (9, LAYERS)]
    segments = tuple(Segment(c, (r,)) for c, r in zip(cuts, (1, 0, 1), strict=True))
    return make_plan(CHAIN, Stage("middle", 2, segments), world=2, order="fill_drain")


def single():
    return make_plan(CHAIN, Stage("front", 4, (Segment((0, LAYERS), (0,)),)), world=1)


PLANS = [three_stages, front_and_tail, data_parallel, pipeline, single]


def observed_run(plan, case, programs):
    """Run the programs one after the other; return per rank the actions, the communications and the metrics."""

    def body(rank, communicators):
        executor = make_executor(case, plan, rank, Counting(communicators))
        runs = []
        for step, program in enumerate(programs):
            seen, times = [], []

            def observe(of, action, start, end, program=program, seen=seen, times=times):
                assert of is program
                seen.append(action)
                times.append((start, end))

            executor.observer, executor.communicators.log = observe, []
            metrics = run_step(case, program, rank, executor, step)
            assert all(a <= b for a, b in times)
            assert times == sorted(times)
            runs.append((seen, executor.communicators.log, metrics))
        return runs

    return run_ranks(plan, body)


def assert_executed(programs, per_rank):
    for rank, runs in enumerate(per_rank):
        for program, (seen, log, _) in zip(programs, runs, strict=True):
            assert tuple(seen) == program.actions[rank]
            assert log == expected_log(program, rank)


@pytest.mark.parametrize("make", PLANS)
@pytest.mark.parametrize("samples", [13, 7, 1])
def test_actions_and_bytes_are_the_programs(make, samples):
    plan = make()
    programs = [compile_program(plan, CHAIN, samples, mode) for mode in ("train", "evaluate")]
    for program in programs:
        check(program)
    assert_executed(programs, observed_run(plan, case_of(samples, max_norm=0.3), programs))


def test_actions_and_bytes_of_random_programs():
    dice = random.Random(21)  # noqa: S311
    for _ in range(12):
        plan = random_plan(CHAIN, dice)
        samples = random_samples(plan, dice)
        programs = [compile_program(plan, CHAIN, samples, mode) for mode in ("train", "evaluate")]
        assert_executed(programs, observed_run(plan, case_of(samples, max_norm=0.3), programs))


def test_every_operation_is_in_the_log_of_all_its_ranks():
    program = compile_program(three_stages(), CHAIN, 13, "train")
    per_rank = observed_run(program.plan, case_of(13), [program])
    seen = {(index, rank) for rank, [(_, log, _)] in enumerate(per_rank) for _, index, _ in log}
    assert seen == {(o.index, r) for o in program.operations if len(o.ranks) > 1 for r in o.ranks}


def hits(logits, labels, count):
    return logits.topk(min(count, logits.shape[1]), dim=1).indices.eq(labels[:, None]).any(dim=1).sum().item()


def evaluate_everywhere(case, plan, samples):
    """Evaluate the first batch; the reference is the whole model in one process."""
    program = compile_program(plan, case.traced.chain, samples, "evaluate")
    check(program)

    def body(rank, communicators):
        return run_step(case, program, rank, make_executor(case, plan, rank, communicators))

    x, y = case.data[0]
    with torch.no_grad():
        logits = whole_model(case).eval()(x)
    expected = F.cross_entropy(logits, y, reduction="sum").item()
    for metrics in run_ranks(plan, body):
        assert metrics.loss_sum == pytest.approx(expected, rel=1e-12)
        assert metrics.weight == samples
        assert (metrics.top1, metrics.top5) == (hits(logits, y, 1), hits(logits, y, 5))


@pytest.mark.parametrize("make", PLANS)
@pytest.mark.parametrize("samples", [13, 6, 2, 1])
def test_evaluation_equals_a_single_process(make, samples):
    """Whole and last partial batches, dropout off, every sample once."""
    evaluate_everywhere(case_of(samples, dropout=0.4), make(), samples)


@pytest.mark.parametrize("ways", [("column", "row", "row"), ("row", "column", "column")])
def test_evaluation_of_both_ends_of_a_sharded_tail(ways):
    evaluate_everywhere(case_of(13), front_and_tail(ways), 13)


@pytest.mark.parametrize("classes", [3, 5])
def test_evaluation_with_few_classes(classes):
    """With at most five classes every sample is among the best five, padding notwithstanding."""
    source = defer(lambda: small_vgg(classes=classes))
    case = Case(source, trace(source.module, (2, 6, 6), "few"), 1, (9,))
    front = Stage("front", 3, (Segment((0, 9), (0, 1, 2)),))
    tail = Stage("tail", 4, (Segment((9, LAYERS), (0, 1, 2)),), ("column", "row", "column"))
    evaluate_everywhere(case, make_plan(case.traced.chain, front, tail, world=3, global_batch=9), 9)


def test_evaluation_leaves_parameters_and_gradients_alone():
    plan, case = front_and_tail(), case_of(13)
    program = compile_program(plan, CHAIN, 13, "evaluate")

    def body(rank, communicators):
        executor = make_executor(case, plan, rank, communicators)
        owned = [o.tensor for modules in executor.blocks.values() for o in modules.owned]
        before = [t.detach().clone() for t in owned]
        run_step(case, program, rank, executor)
        assert all(torch.equal(a, b) for a, b in zip(owned, before, strict=True))
        assert all(t.grad is None or not t.grad.any() for t in owned)

    run_ranks(plan, body)


class Breaks(nn.Module):
    """Raises in its n-th call."""

    def __init__(self, call):
        super().__init__()
        self.left = call

    def forward(self, x):
        self.left -= 1
        if self.left < 0:
            raise ValueError("the device fell over")
        return x


@pytest.mark.parametrize("make", [three_stages, front_and_tail])
def test_a_failing_action_is_named_and_nobody_hangs(make):
    """Rank 2 fails in its micro-batch 1 and its connections go; the others end with errors of their own."""
    plan, case = make(), case_of(13)
    program = compile_program(plan, CHAIN, 13, "train")
    errors, ended = {}, threading.Barrier(plan.world)
    forwards = [a for a in program.actions[2] if a.kind == "forward" and a.micro_batch == 1]
    block = forwards[0].block
    position = program.positions[program.blocks[block].position]

    def body(rank, communicators):
        executor = make_executor(case, plan, rank, communicators)
        if rank == 2:
            executor.blocks[block].layers.append(Breaks(1))
        try:
            run_step(case, program, rank, executor)
        except Exception as e:  # noqa: BLE001 - looked at below
            errors[rank] = e
            if rank == 2:
                for group, _ in communicators._groups.values():
                    group.abort()
        ended.wait(60)

    run_ranks(plan, body, timeout_s=2)
    assert errors.keys() == set(range(plan.world))
    assert all(isinstance(e, ActionError) for e in errors.values())
    assert isinstance(errors[2].__cause__, ValueError)
    text = str(errors[2])
    assert text.startswith(f"rank 2 failed in 'forward {position.name} (")
    assert text.endswith("micro-batch 1': the device fell over")
    for rank, error in errors.items():
        assert str(error).startswith(f"rank {rank} failed in '")


def test_labels_beyond_the_classes_are_refused_by_value():
    plan, case = single(), case_of(13)
    program = compile_program(plan, CHAIN, 13, "train")

    def body(rank, communicators):
        executor = make_executor(case, plan, rank, communicators)
        executor.run(program, 0, 0, case.data[0][0], case.data[0][1] + 5)

    with pytest.raises(DataError, match="the model has 7 classes"):
        run_ranks(plan, body)


def test_a_reader_without_a_batch_is_told():
    plan, case = single(), case_of(13)
    program = compile_program(plan, CHAIN, 13, "train")

    def body(rank, communicators):
        make_executor(case, plan, rank, communicators).run(program, 0, 0, None, None)

    with pytest.raises(DataError, match="rank 0 reads samples of this step but got no batch"):
        run_ranks(plan, body)
