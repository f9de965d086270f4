"""The simulated count of saved-tensor bytes equals what autograd really keeps, after every action."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes

from hybridpar.model.deferred import defer
from hybridpar.model.trace import trace
from hybridpar.planning.blocks import Modes
from hybridpar.planning.compile import compile as compile_program
from hybridpar.planning.memory import memory
from hybridpar.planning.plan import Plan, Recipe, Segment, Stage, validate
from hybridpar.planning.program import Program
from hybridpar.runtime.communicators import Pending, ProcessGroups
from hybridpar.runtime.executor import Executor
from hybridpar.train_section import LossScale
from scripts.bench.accuracy.live import LiveBytes
from tests.support.counting import (
    assert_execution_is_the_program,
    counting_executor,
    run_once,
)
from tests.support.parity import COMBINED, PLACEMENTS, case_of, plan_of, shape
from tests.support.plans import make_plan
from tests.support.rendezvous import Endpoint, run_strictly
from tests.support.threads import run_ranks
from tests.support.training import Case, make_case, make_executor, small_gpt


def shapes() -> list[tuple[str, tuple[Stage, ...], int]]:
    front = Stage("front", 2, (Segment((0, 3), (0, 1), (2.0, 1.0)),))
    whole = Stage("front", 4, (Segment((0, 16), (0, 1)),))
    middle = Stage("middle", 3, (Segment((3, 5), (2,)), Segment((5, 7), (3,))))
    shared = Stage("middle", 3, (Segment((3, 5), (0, 1)), Segment((5, 7), (1,))))
    early = (Segment((7, 16), (0, 1, 2, 3)),)
    return [
        ("data parallel, one bucket per layer", (whole,), 2),
        ("own ranks, columns then rows", (front, middle, Stage("tail", 6, early, ("column", "row", "column"))), 4),
        ("own ranks, rows", (front, middle, Stage("tail", 5, early, ("row", "row", "row"))), 4),
        ("own ranks, columns", (front, middle, Stage("tail", 13, early, ("column", "column", "column"))), 4),
        (
            "shared ranks",
            (front, shared, Stage("tail", 4, (Segment((7, 16), (1, 0)),), ("row", "column", "row"))),
            2,
        ),
        ("one shard", (front, shared, Stage("tail", 4, (Segment((7, 16), (1,)),))), 2),
    ]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(("name", "stages", "world"), shapes(), ids=[s[0] for s in shapes()])
def test_saved_bytes_are_exact(name: str, stages: tuple[Stage, ...], world: int, dropout: float) -> None:
    del name
    case = make_case(dropout=dropout, steps=1)
    plan = Plan(
        "small", case.traced.chain.fingerprint, world, 13, "float64", stages, bucket_bytes=64, recipe=Recipe()
    )
    validate(plan, case.traced.chain)
    program = compile_program(plan, case.traced.chain, 13, "train")
    counted = run_ranks(plan, lambda rank, groups: _count(case, plan, program, rank, groups))
    for rank, alive in enumerate(counted):
        assert alive == list(memory(program, rank).saved)
        assert not alive or alive[-1] == 0


def _count(case: Case, plan: Plan, program: Program, rank: int, groups: ProcessGroups) -> list[int]:
    executor = counting_executor(case, plan, rank, groups)
    run_once(executor, case, program, rank)
    return executor.alive


@pytest.mark.parametrize(
    ("degrees", "placement"), COMBINED, ids=["-".join(map(str, d)) + f"-{p}" for d, p in COMBINED]
)
def test_execution_is_the_program_over_the_parity_matrix(degrees: tuple[int, int, int], placement: str) -> None:
    """One training step: actions in order, bytes of every message, saved bytes after every action."""
    number = COMBINED.index((degrees, placement))
    _assert_execution_is_the_program(number, shape(*degrees, PLACEMENTS[placement], uneven=number % 5 < 2))


@pytest.mark.parametrize("chosen", [("front",), ("middle",), ("tail",), ("front", "middle", "tail")], ids="-".join)
@pytest.mark.parametrize("degrees", [(1, 0, 1), (2, 1, 2), (1, 2, 1), (3, 2, 3)], ids=str)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_execution_is_the_program_with_recomputation(
    chosen: tuple[str, ...], degrees: tuple[int, int, int], placement: str
) -> None:
    stages = [replace(s, recompute=s.kind in chosen) for s in shape(*degrees, PLACEMENTS[placement])]
    for number in (0, 1):
        _assert_execution_is_the_program(number, stages)


def _assert_execution_is_the_program(number: int, stages: list[Stage]) -> None:
    case = case_of(0.4 * (number % 2), (13,))
    plan = plan_of(*stages, bucket_bytes=(1, 2000)[number % 2])
    assert_execution_is_the_program(case, plan, 13)


@pytest.mark.parametrize("norm", [None, 0.1])
@pytest.mark.parametrize(("degrees", "placement"), COMBINED[::3], ids=str)
def test_live_bytes_are_exact(degrees: tuple[int, int, int], placement: str, norm: float | None) -> None:
    """Bytes of all storages that torch makes and frees in a second step: gradients and momenta come and stay."""
    number = COMBINED.index((degrees, placement))
    scaling = LossScale() if number % 4 == 3 else None
    case = replace(case_of(0.4 * (number % 2), (13,)), max_norm=norm, scaling=scaling, data=[])
    stages = shape(*degrees, PLACEMENTS[placement], uneven=number % 5 < 2)
    stages = [replace(s, recompute=s.kind == "front" and number % 4 == 1) for s in stages]
    plan = plan_of(*stages, bucket_bytes=(1, 2000)[number % 2])
    plan = replace(plan, recipe=Recipe(norm is not None, optimizer_states=1, scaling=scaling is not None))
    _assert_live_bytes(case, plan)


@pytest.mark.parametrize("ways", [("column",), ("row",)], ids="-".join)
def test_live_bytes_with_labels_per_token_are_exact(ways: Modes) -> None:
    """Embedding and a block, the other block and a norm, and a sharded head over (samples, tokens, features)."""
    source = defer(small_gpt)
    case = Case(source, trace(source.module, (5,), "gpt", "int"), 2, (13, 13))
    stages = (
        Stage("front", 2, (Segment((0, 2), (0, 1)),)),
        Stage("middle", 3, (Segment((2, 4), (1,)),)),
        Stage("tail", 5, (Segment((4, 5), (1, 2, 0), (2.0, 1.0, 1.0)),), ways),
    )
    plan = make_plan(case.traced.chain, *stages, world=3, recipe=Recipe(optimizer_states=1))
    _assert_live_bytes(case, plan)


def _assert_live_bytes(case: Case, plan: Plan) -> None:
    program = compile_program(plan, case.traced.chain, 13, "train")

    def body(rank: int, endpoint: Endpoint) -> list[int]:
        executor = make_executor(case, plan, rank, Unseen(endpoint))
        run_once(executor, case, program, rank)
        endpoint.step = 1
        alive: list[int] = []
        executor.observer = lambda *_: alive.append(live.bytes())
        with LiveBytes(set(), lasting(executor)) as live:
            run_once(executor, case, program, rank)
        return alive

    for rank, result in enumerate(run_strictly(plan.world, body)):
        assert not isinstance(result, BaseException), result
        assert result == list(memory(program, rank).alive)


def lasting(executor: Executor) -> Iterator[torch.Tensor]:
    """What an executor holds between two steps."""
    for modules in executor.blocks.values():
        for tensor in (*modules.parameters(), *modules.buffers()):
            yield from (tensor,) if tensor.grad is None else (tensor, tensor.grad)
    yield from (b.flat for b in executor.updater._buckets.values() if b.flat is not None)
    for optimizer in executor.updater.optimizers.values():
        for state in optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, torch.Tensor))


class Unseen:
    """Communicators whose own tensors no mode sees."""

    def __init__(self, inner: Endpoint) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Callable[..., Pending]:
        def call(*arguments: object) -> Pending:
            with _disable_current_modes():
                return getattr(self.inner, name)(*arguments)  # type: ignore[no-any-return]

        return call


def test_recomputation_needs_less_memory() -> None:
    """Of a front that keeps two chunks in flight: inputs instead of all that its layers save."""
    chain = case_of().traced.chain
    middle = Stage("middle", 3, (Segment((0, 9), (0,)), Segment((9, 16), (1,))))
    plain, again = (
        memory(compile_program(plan_of(replace(middle, recompute=r)), chain, 13, "train"), 0)
        for r in (False, True)
    )
    assert max(again.saved) < max(plain.saved) / 3
    assert again.peak < plain.peak
    assert again.peak > again.persistent + max(s + m for s, m in zip(again.saved, again.moving, strict=True))
    assert not any(plain.transient)
