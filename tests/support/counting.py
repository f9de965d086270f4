"""What a rank really does while it runs a program: messages with their bytes, actions, storages kept."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch.autograd.graph import GradientEdge

from hybridpar.model.copies import tensors
from hybridpar.planning.compile import compile as compile_program
from hybridpar.planning.memory import Memory, memory
from hybridpar.planning.plan import Plan
from hybridpar.planning.program import Action, Program
from hybridpar.runtime.communicators import Communicators
from hybridpar.runtime.executor import Executor
from hybridpar.runtime.lookup import Key
from hybridpar.runtime.step import StepState
from tests.support.rendezvous import Endpoint, run_strictly
from tests.support.training import Case, make_executor

Storages = dict[int, int]


class CountingExecutor(Executor):
    """Notes the storages that every forward pass keeps, and the total alive after every action.

    ``within`` is what a second forward made on top of that, by action.
    """

    def start_counting(self) -> None:
        self.kept: dict[Key, Storages] = {}
        self.alive: list[int] = []
        self.within: list[int] = []
        self._again = 0
        self.actions: list[Action] = []
        self.batch_storage = 0
        self.observer = self._count

    def _forward(self, state: StepState, key: Key) -> None:
        with self._noting(state) as storages:
            super()._forward(state, key)
        if key in state.saved:
            self._note(state, storages, state.saved[key][0])
            for told in state.met.get(key, ()):
                self._note(state, storages, told)
            self.kept[key] = storages

    def _recompute(self, state: StepState, key: Key, x: torch.Tensor) -> GradientEdge | None:
        with self._noting(state) as storages:
            handle = self.blocks[key[0]].register_forward_hook(lambda _m, _x, y: self._note(state, storages, y))
            edge = super()._recompute(state, key, x)
            handle.remove()
        storages.pop(x.untyped_storage().data_ptr(), None)
        self._again = sum(storages.values())
        return edge

    def _note(self, state: StepState, storages: Storages, tensor: torch.Tensor) -> None:
        parameters = {t.untyped_storage().data_ptr() for m in self.blocks.values() for t in tensors(m)}
        batch = set() if state.batch is None else {state.batch.untyped_storage().data_ptr()}
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters | batch:
            storages[storage.data_ptr()] = storage.nbytes()

    @contextlib.contextmanager
    def _noting(self, state: StepState) -> Iterator[Storages]:
        """Collect the storages that autograd saves."""
        storages: Storages = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            self._note(state, storages, tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            yield storages

    def _backward(self, state: StepState, key: Key) -> None:
        super()._backward(state, key)
        del self.kept[key]

    def _count(self, program: Program, action: Action, start_s: float, end_s: float) -> None:
        del program, start_s, end_s
        self.actions.append(action)
        together: Storages = {}
        for storages in self.kept.values():
            together |= storages
        self.alive.append(sum(together.values()))
        self.within.append(self._again)
        self._again = 0


class Counting:
    """Notes what is handed to communicators: (way, operation, bytes)."""

    def __init__(self, inner):
        self.inner, self.log = inner, []

    def _note(self, way, operation, *tensors):
        sizes = {t.numel() * t.itemsize for t in tensors}
        assert len(sizes) == 1, "every part of a gather has the same size"
        self.log.append((way, operation.index, sizes.pop()))

    def send(self, operation, tensor):
        self._note("send", operation, tensor)
        return self.inner.send(operation, tensor)

    def receive(self, operation, tensor):
        self._note("receive", operation, tensor)
        return self.inner.receive(operation, tensor)

    def broadcast(self, operation, tensor):
        self._note("broadcast", operation, tensor)
        return self.inner.broadcast(operation, tensor)

    def all_reduce(self, operation, tensor):
        self._note("all_reduce", operation, tensor)
        return self.inner.all_reduce(operation, tensor)

    def reduce_scatter(self, operation, messages):
        sent = sum(t.numel() * t.itemsize for _, pieces in messages for t in pieces)
        self.log.append(("reduce_scatter", operation.index, sent))
        return self.inner.reduce_scatter(operation, messages)

    def all_gather(self, operation, outputs, tensor):
        assert len(outputs) == len(operation.ranks)
        self._note("all_gather", operation, tensor, *outputs)
        return self.inner.all_gather(operation, outputs, tensor)


def expected_log(program, rank):
    log = []
    for action in program.actions[rank]:
        if action.kind == "start":
            operation = program.operations[action.operation]
            way = operation.kind
            if way == "send" and operation.ranks[1] == rank:
                way = "receive"
            log.append((way, operation.index, operation.bytes))
    return log


def run_once(executor: Executor, case: Case, program: Program, rank: int) -> None:
    x, y = case.data[0]
    index = [i for a, b in program.reads(rank) for i in range(a, b)]
    executor.run(program, 0, 0, x[index] if index else None, y[index] if index else None)


def counting_executor(case: Case, plan: Plan, rank: int, communicators: Communicators) -> CountingExecutor:
    """Make a rank's executor, which counts from now on."""
    executor = make_executor(case, plan, rank, communicators)
    executor.__class__ = CountingExecutor
    assert isinstance(executor, CountingExecutor)
    executor.start_counting()
    return executor


def assert_execution_is_the_program(case: Case, plan: Plan, samples: int) -> None:
    """One training step: actions in order, bytes of every message, bytes kept after and within every action."""
    program = compile_program(plan, case.traced.chain, samples, "train")

    def body(rank: int, endpoint: Endpoint) -> tuple[list[Action], list[object], Memory]:
        communicators = Counting(endpoint)
        executor = counting_executor(case, plan, rank, communicators)
        run_once(executor, case, program, rank)
        counted = replace(memory(program, rank), saved=tuple(executor.alive), transient=tuple(executor.within))
        return executor.actions, communicators.log, counted

    for rank, result in enumerate(run_strictly(plan.world, body)):
        assert not isinstance(result, BaseException), result
        actions, messages, counted = result
        assert actions == list(program.actions[rank])
        assert messages == expected_log(program, rank)
        assert counted == memory(program, rank)
