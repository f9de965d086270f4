"""Sums over ranks: small ones are gathered, and added by every rank in one order."""

import pytest
import torch

from hybridpar.planning.plan import Segment, Stage
from hybridpar.planning.program import Operation
from hybridpar.runtime.communicators import GATHERED_BYTES, ProcessGroups
from tests.support.plans import make_plan
from tests.support.threads import run_ranks
from tests.support.training import make_case

WORLD = 3
LARGEST = GATHERED_BYTES // WORLD // 8
"""Elements of the largest sum of float64 that is gathered."""


class Overheard:
    """A process group that notes which collectives it is asked for."""

    def __init__(self, group: torch.distributed.ProcessGroup) -> None:
        self.group = group
        self.asked: list[str] = []

    def __getattr__(self, name: str) -> object:
        self.asked.append(name)
        return getattr(self.group, name)


def summed(rank: int, communicators: ProcessGroups, elements: int) -> tuple[torch.Tensor, list[str]]:
    group, members = communicators._groups["control"]
    overheard = Overheard(group)
    communicators._groups["control"] = overheard, members  # type: ignore[assignment]
    own = torch.full((elements,), 0.1 * (rank + 1), dtype=torch.float64)
    operation = Operation(0, "all_reduce", "norm", "control", members, own.nbytes)
    communicators.all_reduce(operation, own).wait()
    return own, overheard.asked


@pytest.mark.parametrize(
    ("elements", "way"), [(1, "allgather"), (LARGEST, "allgather"), (LARGEST + 1, "allreduce")]
)
def test_small_sums_are_gathered_and_the_same_everywhere(elements: int, way: str) -> None:
    """gloo's all-reduce takes twice as many messages, however small the sum."""
    chain = make_case().traced.chain
    front = Stage("front", 1, (Segment((0, len(chain.layers)), tuple(range(WORLD))),))
    plan = make_plan(chain, front, world=WORLD, global_batch=WORLD)
    found = run_ranks(plan, lambda rank, communicators: summed(rank, communicators, elements))
    for total, asked in found:
        assert asked == [way]
        assert torch.equal(total, found[0][0])
        assert torch.allclose(total, torch.full_like(total, 0.6), rtol=1e-15)


def overlapping(communicators: ProcessGroups, rank: int) -> tuple[list[torch.Tensor], list[int]]:
    """Three sums on their way at the same time, twice; and the buffers that are spare after each round."""
    _, members = communicators._groups["control"]
    spare, own = [len(communicators._spare)], list[torch.Tensor]()
    for _ in range(2):
        own = [torch.full((2,), float(scale * (rank + 1)), dtype=torch.float64) for scale in (1, 10, 100)]
        operation = Operation(0, "all_reduce", "norm", "control", members, own[0].nbytes)
        for pending in [communicators.all_reduce(operation, tensor) for tensor in own]:
            pending.wait()
        spare.append(len(communicators._spare))
    return own, spare


def test_sums_on_their_way_at_the_same_time_have_buffers_of_their_own_which_are_kept() -> None:
    chain = make_case().traced.chain
    front = Stage("front", 1, (Segment((0, len(chain.layers)), tuple(range(WORLD))),))
    plan = make_plan(chain, front, world=WORLD, global_batch=WORLD)
    for own, spare in run_ranks(plan, lambda rank, communicators: overlapping(communicators, rank)):
        assert [tensor.tolist() for tensor in own] == [[6.0, 6.0], [60.0, 60.0], [600.0, 600.0]]
        first, second, third = spare
        assert second == third == max(first, 3)
