"""The memory that a device has to have: workspace in every action, and what a host's heap keeps."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hybridpar.model.chain import DRAWN_ELEMENTS, MADE_ELEMENTS, Chain
from hybridpar.planning import resident
from hybridpar.planning.compile import compile as compile_program
from hybridpar.planning.heap import Heap
from hybridpar.planning.memory import memory
from hybridpar.planning.plan import Segment, Stage
from hybridpar.planning.program import Program
from hybridpar.planning.resident import peak_per_rank
from hybridpar.planning.workspaces import MAPPED_BYTES, Workspaces
from tests.support.paper import SMALL, chain_of, front, linear, profile_of
from tests.support.plans import make_plan

PROFILE = profile_of(SMALL, 1.0, 1.0)
DEVICE = Workspaces(PROFILE, host=False)


def program_with(micro_batch: int, *ranks: int) -> Program:
    plan = make_plan(SMALL, front(micro_batch, *ranks, layers=(0, 3)), world=len(ranks), global_batch=4)
    return compile_program(plan, SMALL, 4, "train")


def test_a_single_backward_keeps_the_gradients_that_it_makes() -> None:
    """Of four samples, in the activation: its output (5 numbers each), the gradients of logits (2),
    output (5) and input (5), and that of the last layer's bias (2 numbers): its weight's is there."""
    program = program_with(4, 0)
    assert peak_per_rank(program, DEVICE)[0] - memory(program, 0).persistent == 8 * (4 * (5 + 2 + 5 + 5) + 2)


@pytest.mark.parametrize("gathers", [True, False])
def test_a_gradient_is_made_beside_the_one_it_is_added_to(*, gathers: bool) -> None:
    """Of two samples, in the last layer: all gradients are there, and the weight's (20 numbers) is made again.

    If it gathers in place, the most there is lives in the activation: as above.
    """
    last = linear("b", 5, 4)
    chain = Chain("wide", (*SMALL.layers[:2], last if gathers else replace(last, linear=None)))
    plan = make_plan(chain, front(2, 0, layers=(0, 3)), world=1, global_batch=4)
    program = compile_program(plan, chain, 4, "train")
    all_gradients = memory(program, 0).accumulated[-1]
    device = Workspaces(profile_of(chain, 1.0, 1.0), host=False)
    found = peak_per_rank(program, device)[0] - memory(program, 0).persistent
    assert found == all_gradients + 8 * (2 * (5 + 4 + 5 + 5) if gathers else 2 * (5 + 4 + 5) + 20)


@pytest.mark.parametrize("ranks", [(0,), (0, 1)])
def test_measured_workspace_counts_once(ranks: tuple[int, ...]) -> None:
    """A profile's backward holds the bias's gradient already; what it has beyond that comes on top."""
    gradient = SMALL.layers[0].parameters[1].count * 8
    layers = list(PROFILE.layers)

    def peak(beyond: int) -> int:
        layers[0] = replace(layers[0], backward_workspace_bytes=((float(gradient + beyond),),))
        measured = replace(
            PROFILE,
            micro_batches=PROFILE.micro_batches[:1],
            layers=tuple(replace(layer, forward_s=((1.0,),), backward_s=((1.0,),)) for layer in layers),
        )
        return peak_per_rank(program_with(2, *ranks), Workspaces(measured, host=False))[0]

    assert peak(0) == peak_per_rank(program_with(2, *ranks), DEVICE)[0]
    assert peak(10**6) - peak(5 * 10**5) == pytest.approx(5 * 10**5 * 2 / PROFILE.micro_batches[0], rel=0.6)


def test_the_code_of_libraries_takes_a_host_s_memory() -> None:
    program, measured = program_with(2, 0, 1), replace(PROFILE, library_bytes=17)
    for host, more in ((True, 17), (False, 0)):
        plain = peak_per_rank(program, Workspaces(PROFILE, host=host))
        assert peak_per_rank(program, Workspaces(measured, host=host)) == tuple(p + more for p in plain)


def test_what_the_heap_took_for_the_whole_chain_tells_what_it_takes_for_any_program() -> None:
    """The profile's own passes come out as measured; a device has no such heap."""
    program, sizes = program_with(2, 0, 1), PROFILE.micro_batches
    plain = Workspaces(PROFILE, host=True)
    taken = 10_000.0
    measured = replace(PROFILE, heap_bytes=(taken,) * len(sizes))
    host = Workspaces(measured, host=True)
    of_profile = resident._passing(host, SMALL, sizes[0])
    assert resident.heap_of(host, SMALL).at(sizes[0]) == (of_profile, taken - of_profile)
    more = peak_per_rank(program, host)[0] - peak_per_rank(program, plain)[0]
    (passing, _) = resident._Rank(program, 0, host).step()
    assert more == pytest.approx((taken - of_profile) * min(1.0, passing.small / of_profile), abs=1)
    assert more > 0
    assert peak_per_rank(program, Workspaces(measured, host=False)) == peak_per_rank(program, DEVICE)


def test_micro_batches_in_flight_share_their_holes() -> None:
    """Of a part of the chain there are fewer."""
    rank = resident._Rank(program_with(2, 0, 1), 0, workspaces := Workspaces(PROFILE, host=True))
    workspaces.heap = Heap([(2, 100.0, 130.0)])
    assert [rank._holes(passing) for passing in (0.0, 50.0, 100.0, 400.0)] == pytest.approx(
        [0.0, 15.0, 30.0, 30.0]
    )


def test_of_several_micro_batch_sizes_each_counts_by_the_bytes_it_makes() -> None:
    """A tail of few bytes with large micro-batches says little about the holes of the front's."""
    plan = make_plan(
        SMALL, front(2, 0, layers=(0, 2)), Stage("tail", 4, (Segment((2, 3), (0,)),)), world=1, global_batch=4
    )
    workspaces = Workspaces(PROFILE, host=True)
    workspaces.heap = Heap([(2, 10.0, 20.0), (4, 10.0, 60.0)])
    rank = resident._Rank(compile_program(plan, SMALL, 4, "train"), 0, workspaces)
    first, second = (
        sum(o.kept.inside(n, 8)) + (o.in_bytes + o.out_bytes) * n
        for o, n in zip(rank.books.own.values(), (2, 4), strict=True)
    )
    assert rank._holes(99.0) == pytest.approx((10 * first + 50 * second) / (first + second))


def test_a_heap_is_a_line_through_its_points() -> None:
    heap = Heap([(8, 20.0, 30.0), (2, 10.0, 40.0), (16, 40.0, 20.0)])
    assert [heap.at(n).holes for n in (1, 2, 5, 8, 12, 16, 99)] == [30.0, 30.0, 20.0, 10.0, 5.0, 0.0, 0.0]
    assert [heap.at(n).counted for n in (1, 5, 12)] == [10.0, 15.0, 30.0]
    assert (heap.most, Heap().most, Heap().at(7)) == (30.0, 0.0, (0.0, 0.0))


def test_a_host_s_backend_keeps_buffers_for_every_group_that_sums() -> None:
    """Of the sums of a front's gradients and figures; a device's memory has none of it."""
    for ranks, kept in (((0,), 0), ((0, 1), 1)):
        plan = make_plan(SMALL, Stage("front", 2, (Segment((0, 3), ranks),)), world=len(ranks), global_batch=4)
        program = compile_program(plan, SMALL, 4, "train")
        largest: dict[str, int] = {}
        for operation in program.operations:
            if operation.kind == "all_reduce" and not operation.alone:
                largest[operation.communicator] = max(operation.bytes, largest.get(operation.communicator, 0))
        assert resident.summing_bytes(program, 0) == 2 * sum(largest.values())
        assert bool(resident.summing_bytes(program, 0)) == bool(kept)


def test_a_host_needs_at_least_what_a_device_needs() -> None:
    for micro_batch in (1, 2):
        program = program_with(micro_batch, 0, 1)
        host = peak_per_rank(program, Workspaces(PROFILE, host=True))
        assert all(h >= d for h, d in zip(host, peak_per_rank(program, DEVICE), strict=True))


def test_a_host_holds_the_whole_parameter_while_it_cuts_a_slice() -> None:
    tail = Stage("tail", 4, (Segment((0, 3), (0, 1)),), ("column", "row"))
    plan = make_plan(SMALL, tail, world=2, global_batch=4)
    program = compile_program(plan, SMALL, 4, "train")
    (block, *_) = program.blocks
    # Slices of the first layer (9 and 3 numbers) and of the second (6), and the second's whole weight (10).
    assert DEVICE.building(SMALL, block, 0, 8) == 8 * (9 + 3 + 6 + 10)


def test_a_large_parameter_is_made_some_rows_after_the_other() -> None:
    chain = chain_of(8, DRAWN_ELEMENTS)
    tail = Stage("tail", 4, (Segment((0, 1), (0, 1)),), ("column",))
    program = compile_program(make_plan(chain, tail, world=2, global_batch=4), chain, 4, "train")
    (block,) = program.blocks
    assert DEVICE.building(chain, block, 0, 4) == 4 * (8 * DRAWN_ELEMENTS // 2 + MADE_ELEMENTS)


def test_blocks_are_large_from_the_library_s_threshold_on() -> None:
    host = Workspaces(PROFILE, host=True)
    assert host.split(MAPPED_BYTES - 1, MAPPED_BYTES) == (MAPPED_BYTES - 1, MAPPED_BYTES)
    assert DEVICE.split(MAPPED_BYTES - 1, MAPPED_BYTES) == (2 * MAPPED_BYTES - 1, 0)
