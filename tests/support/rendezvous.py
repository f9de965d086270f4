"""The strictest machine in memory: unbuffered rendezvous, one queue per communicator; a hang is seen at once."""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from hybridpar.planning.check import queue_of
from hybridpar.planning.program import Operation
from hybridpar.runtime.scatter import Message
from tests.support.threads import in_threads

T = TypeVar("T")
Key = tuple[int, Hashable]
"""Step, and the replica and index of an operation, or what names one across replicas."""


class HangError(RuntimeError):
    """Every rank that has not ended waits for an operation that cannot complete."""


@dataclass
class _Open:
    operation: Operation
    ranks: tuple[int, ...]
    """Participants, over all replicas."""
    tensors: dict[int, list[torch.Tensor]] = field(default_factory=dict)


class Machine:
    """What the ranks share. An operation runs once it leads the queues of all its participants."""

    def __init__(self, world: int, width: int) -> None:
        self.world, self.width = world, width
        self.changed = threading.Condition()
        self.queues: dict[tuple[int, Hashable], deque[Key]] = defaultdict(deque)
        self.open: dict[Key, _Open] = {}
        self.complete: set[tuple[int, Key]] = set()
        self.blocked: dict[int, Key] = {}
        self.ended: set[int] = set()
        self.hangs = False

    def start(self, rank: int, key: Key, operation: Operation, tensors: list[torch.Tensor]) -> None:
        with self.changed:
            ranks = self.participants(rank, operation)
            self.open.setdefault(key, _Open(operation, ranks)).tensors[rank] = tensors
            queue = rank, queue_of(operation)
            self.queues[queue].append(key)
            self._settle(key)
            self.changed.notify_all()

    def participants(self, rank: int, operation: Operation) -> tuple[int, ...]:
        first = rank - rank % self.width
        firsts = range(0, self.world, self.width) if operation.across else (first,)
        return tuple(f + r for f in firsts for r in operation.ranks)

    def _settle(self, key: Key | None) -> None:
        while key is not None:
            opened = self.open[key]
            ranks, name = opened.ranks, queue_of(opened.operation)
            own = [self.queues[r, name] for r in ranks]
            if any(not q or q[0] != key for q in own):
                return
            _move(opened)
            for r, q in zip(ranks, own, strict=True):
                q.popleft()
                self.complete.add((r, key))
                if self.blocked.get(r) == key:
                    del self.blocked[r]
            del self.open[key]
            following = {q[0] for q in own if q}
            key = None
            for k in following:
                if key is None and self._leads(k):
                    key = k
                elif self._leads(k):
                    self._settle(k)

    def _leads(self, key: Key) -> bool:
        opened = self.open[key]
        own = [self.queues[r, queue_of(opened.operation)] for r in opened.ranks]
        return all(q and q[0] == key for q in own)

    def wait(self, rank: int, key: Key) -> None:
        with self.changed:
            if (rank, key) not in self.complete:
                self.blocked[rank] = key
                self._look()
            while (rank, key) not in self.complete:
                if self.hangs:
                    raise HangError(f"rank {rank} waits forever for operation {key[1]} of step {key[0]}")
                self.changed.wait()

    def end(self, rank: int) -> None:
        with self.changed:
            self.ended.add(rank)
            self._look()

    def _look(self) -> None:
        if self.blocked and len(self.blocked) + len(self.ended) == self.world:
            self.hangs = True
            self.changed.notify_all()


def _move(opened: _Open) -> None:
    operation, tensors = opened.operation, opened.tensors
    own = [tensors[r] for r in opened.ranks]
    if operation.kind in {"send", "broadcast"}:  # from the first one
        for t in own[1:]:
            t[0].copy_(own[0][0])
    elif operation.kind == "all_reduce":
        total = torch.stack([t[0] for t in own]).sum(0)
        for t in own:
            t[0].copy_(total)
    elif operation.kind == "reduce_scatter":  # what arrives, and a piece for every rank, message after message
        width = 1 + len(own)
        for at in range(0, len(own[0]), width):
            for index, t in enumerate(own):
                t[at].copy_(torch.stack([other[at + 1 + index] for other in own]).sum(0))
    else:
        for t in own:
            for place, source in zip(t[1:], own, strict=True):
                place.copy_(source[0])


class _Started:
    def __init__(self, machine: Machine, rank: int, key: Key) -> None:
        self._machine, self._rank, self._key = machine, rank, key

    def wait(self) -> None:
        self._machine.wait(self._rank, self._key)


class Endpoint:
    """One rank's communicators on the machine. Buffers hold NaN until they are filled."""

    def __init__(self, machine: Machine, rank: int) -> None:
        self._machine, self._rank, self.step = machine, rank, 0

    def _begin(self, operation: Operation, tensors: list[torch.Tensor]) -> _Started:
        replica = self._rank // self._machine.width
        key = self.step, operation.place if operation.across else (replica, operation.index)
        self._machine.start(self._rank, key, operation, tensors)
        return _Started(self._machine, self._rank, key)

    def send(self, operation: Operation, tensor: torch.Tensor) -> _Started:
        assert tensor.is_contiguous()
        return self._begin(operation, [tensor])

    def receive(self, operation: Operation, tensor: torch.Tensor) -> _Started:
        assert tensor.is_contiguous()
        return self._begin(operation, [tensor.fill_(float("nan"))])

    def broadcast(self, operation: Operation, tensor: torch.Tensor) -> _Started:
        return self._begin(operation, [tensor])

    def all_reduce(self, operation: Operation, tensor: torch.Tensor) -> _Started:
        return self._begin(operation, [tensor])

    def reduce_scatter(self, operation: Operation, messages: list[Message]) -> _Started:
        return self._begin(operation, [t for arriving, pieces in messages for t in (arriving, *pieces)])

    def all_gather(self, operation: Operation, outputs: list[torch.Tensor], tensor: torch.Tensor) -> _Started:
        for o in outputs:
            o.fill_(float("nan"))
        return self._begin(operation, [tensor, *outputs])


def run_strictly(
    world: int, body: Callable[[int, Endpoint], T], width: int | None = None
) -> list[T | BaseException]:
    """Run ``body(rank, endpoint)`` on every rank; an exception stands in the place of the result.

    ``width`` is the number of ranks of a plan replica, by default all.
    """
    machine = Machine(world, width or world)
    results: dict[int, T | BaseException] = {}

    def main(rank: int) -> None:
        try:
            results[rank] = body(rank, Endpoint(machine, rank))
        except BaseException as e:  # noqa: BLE001 - handed to the caller
            results[rank] = e
        finally:
            machine.end(rank)

    in_threads(main, world, timeout_s=60.0)
    return [results[r] for r in range(world)]
