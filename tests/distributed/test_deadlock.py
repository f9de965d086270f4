"""No program hangs, and the deadlock check knows which mutants would."""

import random
from collections import Counter
from functools import cache

import pytest
import torch

from hybridpar.errors import ProgramError
from hybridpar.planning.check import check
from hybridpar.planning.compile import compile as compile_program
from hybridpar.planning.program import Program
from tests.support.plans import mutate, random_plan, random_samples
from tests.support.rendezvous import HangError, run_strictly
from tests.support.threads import run_ranks
from tests.support.training import Case, assemble, make_case, make_executor, run_step, train_single

# Sizes: the whole module takes about 25 s on two cores.
PLANS, ON_GLOO, BASES, MUTANTS = 200, 40, 60, 400
MAX_NORM = 0.1
"""Low enough to clip in the first step."""
BASE = make_case(steps=1, samples=1)


@cache
def case_of(samples: int, max_norm: float | None) -> Case:
    return Case(BASE.source, BASE.traced, 1, (samples,), max_norm)


@cache
def reference(samples: int, max_norm: float | None):
    trained = train_single(case_of(samples, max_norm))
    return trained.losses[0], trained.parameters


def case_for(program: Program) -> Case:
    return case_of(program.samples, MAX_NORM if program.plan.recipe.clipping else None)


def random_programs(count: int, seed: int):
    dice = random.Random(seed)  # noqa: S311
    for _ in range(count):
        plan = random_plan(BASE.traced.chain, dice)
        yield compile_program(plan, BASE.traced.chain, random_samples(plan, dice), "train")


def body_of(program: Program):
    case = case_for(program)

    def body(rank, communicators):
        executor = make_executor(case, program.plan, rank, communicators)
        metrics = run_step(case, program, rank, executor)
        return metrics, [o for modules in executor.blocks.values() for o in modules.owned]

    return body


def is_right(program: Program, results) -> bool:
    """Every rank reports the single process's loss, and all parameters are updated as there."""
    case = case_for(program)
    loss, parameters = reference(program.samples, case.max_norm)
    total = pytest.approx(loss * program.samples, rel=1e-10)
    if any(metrics.loss_sum != total or metrics.weight != program.samples for metrics, _ in results):
        return False
    trained = assemble([owned for _, owned in results])
    return all(torch.allclose(trained[n], p, rtol=1e-10, atol=1e-12) for n, p in parameters.items())


def test_random_programs_pass_the_check_and_finish_right_on_the_strictest_machine():
    for program in random_programs(PLANS, seed=11):
        check(program)
        results = run_strictly(program.plan.world, body_of(program))
        failures = [r for r in results if isinstance(r, BaseException)]
        assert not failures, (program.plan, program.samples, failures)
        assert is_right(program, results), (program.plan, program.samples)


def test_random_programs_finish_right_on_gloo():
    for program in random_programs(ON_GLOO, seed=12):
        check(program)
        assert is_right(program, run_ranks(program.plan, body_of(program))), (program.plan, program.samples)


def outcome_of(program: Program) -> str:
    results = run_strictly(program.plan.world, body_of(program))
    failures = [r for r in results if isinstance(r, BaseException)]
    if not failures:
        return "right" if is_right(program, results) else "wrong"
    causes = [f.__cause__ or f for f in failures]
    return "hangs" if all(isinstance(c, HangError) for c in causes) else "fails"


def test_every_mutant_that_hangs_is_rejected_and_every_accepted_one_is_right():
    dice = random.Random(13)  # noqa: S311
    bases = [p for p in random_programs(BASES, seed=14) if p.plan.world > 1]
    counted: Counter[tuple[str, str]] = Counter()
    for _ in range(MUTANTS):
        mutant, said = mutate(dice.choice(bases), dice)
        try:
            check(mutant)
            verdict = "accepted"
        except ProgramError:
            verdict = "rejected"
        outcome = outcome_of(mutant)
        counted[verdict, outcome] += 1
        assert verdict == "rejected" or outcome == "right", (said, outcome, mutant.plan, mutant.samples)
    # The test has teeth: many mutants of each sort were seen.
    assert counted["accepted", "right"] > MUTANTS // 10, counted
    assert counted["rejected", "hangs"] > MUTANTS // 20, counted
