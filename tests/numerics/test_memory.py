"""The simulated count of saved-tensor bytes equals what autograd really keeps, after every action."""

from __future__ import annotations

import pytest
import torch

from hybridpar.planning.compile import compile as compile_program
from hybridpar.planning.memory import memory
from hybridpar.planning.plan import Plan, Recipe, Segment, Stage, validate
from hybridpar.planning.program import Action, Program
from hybridpar.runtime.communicators import ProcessGroups
from hybridpar.runtime.executor import Executor, Key, _Step
from tests.support.threads import run_ranks
from tests.support.training import Case, make_case, make_executor

Storages = dict[int, int]


class CountingExecutor(Executor):
    """Notes the storages that every forward pass keeps, and the total alive after every action."""

    def watch(self) -> None:
        self.kept: dict[Key, Storages] = {}
        self.alive: list[int] = []
        self.batch_storage = 0
        self.observer = self._count

    def _forward(self, state: _Step, key: Key) -> None:
        storages: Storages = {}
        parameters = {p.untyped_storage().data_ptr() for m in self.blocks.values() for p in m.parameters()}
        batch = set() if state.batch is None else {state.batch.untyped_storage().data_ptr()}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters | batch:
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            super()._forward(state, key)
        if key in state.saved:
            pack(state.saved[key][0])
            self.kept[key] = storages

    def _backward(self, state: _Step, key: Key) -> None:
        super()._backward(state, key)
        del self.kept[key]

    def _count(self, program: Program, action: Action, start_s: float, end_s: float) -> None:
        del program, action, start_s, end_s
        together: Storages = {}
        for storages in self.kept.values():
            together |= storages
        self.alive.append(sum(together.values()))


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
    executor = make_executor(case, plan, rank, groups)
    executor.__class__ = CountingExecutor
    assert isinstance(executor, CountingExecutor)
    executor.watch()
    x, y = case.data[0]
    index = [i for a, b in program.reads(rank) for i in range(a, b)]
    executor.run(program, 0, 0, x[index] if index else None, y[index] if index else None)
    return executor.alive
