"""Ample memory: no rank's peak exceeds what stands for it, and the usual ones are seen at once."""

from __future__ import annotations

from functools import cache
from itertools import islice

import pytest

from hybridpar.errors import PlanError
from hybridpar.planning.ample import ample, most_per_rank
from hybridpar.planning.compile import compile as compile_program
from hybridpar.planning.costs import Costs
from hybridpar.planning.program import Program
from hybridpar.planning.request import SHAPES, STAGES_OF
from hybridpar.planning.resident import peak_per_rank
from hybridpar.planning.workspaces import Workspaces
from tests.support.enumerate import Question, plans
from tests.support.instances import instance

EVERY, MOST = 11, 20
"""Of an instance's plans every so many, and at most so many."""


@cache
def programs(seed: int) -> tuple[Question, list[Program]]:
    """The problem of a seed, and programs of some of its plans."""
    question = instance(seed, 300).question
    every = (plan for shape in SHAPES for plan in plans(question, STAGES_OF[shape]))
    found = []
    for plan in islice(every, 0, EVERY * MOST, EVERY):
        try:
            found.append(compile_program(plan, question.chain, question.global_batch, "train"))
        except PlanError:
            continue
    return question, found


@pytest.mark.parametrize("host", [False, True])
@pytest.mark.parametrize("seed", [0, 13, 27, 40])
def test_no_peak_exceeds_what_stands_for_it(seed: int, host: bool) -> None:
    question, found = programs(seed)
    assert found
    for program in found:
        workspaces = Workspaces(question.profile, host=host)
        most = most_per_rank(program, workspaces)
        peaks = peak_per_rank(program, workspaces)
        assert all(peak <= above for peak, above in zip(peaks, most, strict=True)), program.plan
        assert max(most) <= 12 * max(peaks), "too far above to be of use"


def test_a_device_has_ample_memory_or_not() -> None:
    question, (program, *_) = programs(0)
    costs = Costs(question.profile, question.cluster)
    most = max(most_per_rank(program, costs.workspaces))
    assert ample(program, costs) == (question.cluster.device.memory_bytes >= most)
