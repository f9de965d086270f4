"""The random generators that a user's code draws from go on after a resume as if nothing had happened."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hybridpar.errors import CheckpointError
from hybridpar.runtime import randomness
from hybridpar.runtime.job import Job
from hybridpar.runtime.optimizer import make_factory
from hybridpar.runtime.own_loss import OwnLoss
from hybridpar.runtime.pieces import Stored, write
from tests.support.checkpoints import OPTIMIZERS, normed_case, plan_of
from tests.support.threads import run_ranks

CPU = torch.device("cpu")


def drawn() -> tuple[float, ...]:
    """From every generator; normal numbers come in pairs, of which one is held back."""
    return (*np.random.normal(size=3), np.random.rand(), random.gauss(), random.random(), float(torch.randn(())))  # noqa: S311


@pytest.fixture(autouse=True)
def _as_before():
    states = [f() for f in (torch.get_rng_state, np.random.get_state, random.getstate)]
    yield
    torch.set_rng_state(states[0])
    np.random.set_state(states[1])
    random.setstate(states[2])


def test_every_generator_goes_on_from_its_state():
    drawn()
    before = {kind: state.clone() for kind, state in randomness.states(CPU).items()}
    assert before.keys() == {"cpu", "numpy", "python"}
    expected = drawn()
    assert drawn() != expected
    for kind, state in before.items():
        randomness.restore(kind, state, CPU)
    assert drawn() == expected


def _changed(kind, place, value):
    state = randomness.states(CPU)[kind].clone()
    state[place] = value
    return state


@pytest.mark.parametrize("kind", ["numpy", "python"])
@pytest.mark.parametrize(("place", "value"), [(0, 2**32), (5, -1), (624, 625), (624, -1), (625, 2)])
def test_an_impossible_state_is_refused(kind, place, value):
    with pytest.raises(CheckpointError, match=f"state of the {kind} random generator is none: its words"):
        randomness.restore(kind, _changed(kind, place, value), CPU)


def test_a_state_of_another_form_is_refused():
    for kind in ("cpu", "numpy", "python"):
        with pytest.raises(CheckpointError, match=f"state of the {kind} random generator is none"):
            randomness.restore(kind, torch.zeros(3), CPU)


def noisy(logits, labels):
    """A loss that draws from all generators."""
    return F.cross_entropy(logits * (1 + 0.1 * sum(drawn())), labels, reduction="sum")


def test_a_loss_that_draws_goes_on_bit_for_bit(tmp_path):
    case = normed_case()
    plan = plan_of(case, "alone")

    def job_of(groups):
        factory = make_factory(OPTIMIZERS["sgd"])
        return Job(plan, case.traced, case.source, factory, groups, rank=0, loss=OwnLoss(noisy))

    def stopped(_, groups):
        job = job_of(groups)
        job.step(case.data[0])
        job.step(case.data[1])
        write(tmp_path, 0, job.state.pieces())
        return [job.step(case.data[2]), job.step(case.data[3], samples=9)]

    def resumed(_, groups):
        drawn()
        job = job_of(groups)
        job.state.restore(Stored(tmp_path, 1), same_plan=True)
        job.go_on(2, 26)
        return [job.step(case.data[2]), job.step(case.data[3], samples=9)]

    assert run_ranks(plan, stopped) == run_ranks(plan, resumed)
