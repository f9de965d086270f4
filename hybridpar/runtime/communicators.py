"""Communicators: the program's operations on torch process groups."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
import torch.distributed as dist

from hybridpar.planning.program import Operation
from hybridpar.runtime.scatter import Message

GATHERED_BYTES = 2**16
"""Up to which all ranks' parts of a sum on the CPU are gathered, and summed by every rank for itself.

gloo's all-reduce cuts even 8 bytes into two segments per rank and passes each twice around the ring. On 4 ranks
that share 2 cores a sum of 512 bytes took them 3 to 6 ms of CPU time together, to gather as much 2 to 4."""


class Pending(Protocol):
    """A started operation."""

    def wait(self) -> object:
        """Block until the operation is complete (on CUDA: order the current stream behind it)."""
        ...


class Communicators(Protocol):
    """Starts operations. Tensors are contiguous and stay alive until the wait."""

    completed: Callable[[Operation], None] | None
    """Called by any thread when a collective is complete, on CUDA with a stream that waits for it."""

    def send(self, operation: Operation, tensor: torch.Tensor) -> Pending:
        """Start sending ``tensor`` to ``operation.ranks[1]``."""
        ...

    def receive(self, operation: Operation, tensor: torch.Tensor) -> Pending:
        """Start receiving from ``operation.ranks[0]`` into ``tensor``."""
        ...

    def broadcast(self, operation: Operation, tensor: torch.Tensor) -> Pending:
        """Start giving ``tensor`` of the first of ``operation.ranks`` to the others, in place."""
        ...

    def all_reduce(self, operation: Operation, tensor: torch.Tensor) -> Pending:
        """Start summing ``tensor`` in place over ``operation.ranks``, of all plan replicas if it is ``across``."""
        ...

    def reduce_scatter(self, operation: Operation, messages: Sequence[Message]) -> Pending:
        """Start summing what all participants give, as ``all_reduce``; each gets the sum of its own piece."""
        ...

    def all_gather(self, operation: Operation, outputs: list[torch.Tensor], tensor: torch.Tensor) -> Pending:
        """Start collecting every rank's ``tensor`` into ``outputs``, in the order of ``operation.ranks``."""
        ...


class ProcessGroups:
    """Communicators over process groups that exist already.

    ``groups`` maps a communicator's name to its process group and its members in the group's order; groups that
    this rank is no member of may be missing. Operations number ranks in a plan replica, groups over all of them:
    ``first`` is this replica's first rank.
    """

    def __init__(self, groups: Mapping[str, tuple[dist.ProcessGroup, tuple[int, ...]]], first: int = 0) -> None:
        self._groups, self._first = dict(groups), first
        shared = sum(len(members) > 1 for _, members in self._groups.values())
        # A step's labels and metrics may be on their way at the same time; more than two sums make further ones.
        self._spare = [_buffer() for _ in range(2 * shared)]
        self.completed: Callable[[Operation], None] | None = None
        """Called by any thread when a collective is complete, on CUDA with a stream that waits for it."""

    def send(self, operation: Operation, tensor: torch.Tensor) -> Pending:
        """Start sending ``tensor`` to ``operation.ranks[1]``."""
        group, members = self._groups[operation.communicator]
        return group.send([tensor], members.index(self._first + operation.ranks[1]), 0)

    def receive(self, operation: Operation, tensor: torch.Tensor) -> Pending:
        """Start receiving from ``operation.ranks[0]`` into ``tensor``."""
        group, members = self._groups[operation.communicator]
        return group.recv([tensor], members.index(self._first + operation.ranks[0]), 0)

    def broadcast(self, operation: Operation, tensor: torch.Tensor) -> Pending:
        """Start giving the first rank's ``tensor`` to all of the communicator."""
        group, members = self._groups[operation.communicator]
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = members.index(self._first + operation.ranks[0]), 0
        return self._followed(operation, group.broadcast([tensor], options))

    def all_reduce(self, operation: Operation, tensor: torch.Tensor) -> Pending:
        """Start summing ``tensor`` in place over the communicator."""
        group, members = self._groups[operation.communicator]
        if tensor.device.type == "cpu" and len(members) * tensor.nbytes <= GATHERED_BYTES:
            buffer = self._spare.pop() if self._spare else _buffer()
            parts = buffer[: len(members) * tensor.nbytes].view(tensor.dtype).view(len(members), *tensor.shape)
            pending = self._followed(operation, group.allgather([list(parts)], [tensor]))
            return _Gathered(pending, parts, tensor, lambda: self._spare.append(buffer))
        return self._followed(operation, group.allreduce([tensor]))

    def reduce_scatter(self, operation: Operation, messages: Sequence[Message]) -> Pending:
        """Start summing pieces over the communicator, message by message."""
        group, _ = self._groups[operation.communicator]
        works = [group.reduce_scatter([arriving], [pieces]) for arriving, pieces in messages]
        return _All([*works[:-1], self._followed(operation, works[-1])])

    def all_gather(self, operation: Operation, outputs: list[torch.Tensor], tensor: torch.Tensor) -> Pending:
        """Start collecting every member's ``tensor`` into ``outputs``."""
        group, _ = self._groups[operation.communicator]
        return self._followed(operation, group.allgather([outputs], [tensor]))

    def close(self) -> None:
        """Let go of the process groups; nothing can be started any more."""
        self._groups.clear()

    def _followed(self, operation: Operation, work: dist.Work) -> dist.Work:
        """Tell of a collective's completion; that of a send or a receive no backend tells but to who waits."""
        completed = self.completed
        if completed is not None:
            work.get_future().add_done_callback(lambda _: completed(operation))
        return work


def _buffer() -> torch.Tensor:
    """Return the bytes of one sum's parts: kept, so that they are no part of what a step needs."""
    return torch.empty(GATHERED_BYTES, dtype=torch.uint8)


class _Gathered:
    """A sum whose parts are gathered; they are added in the order of the ranks, so that all have the same sum."""

    def __init__(
        self, pending: Pending, parts: torch.Tensor, target: torch.Tensor, done: Callable[[], None]
    ) -> None:
        self._pending, self._parts, self._target, self._done = pending, parts, target, done

    def wait(self) -> None:
        self._pending.wait()
        torch.sum(self._parts, 0, out=self._target)
        self._done()


class _All:
    """Several started messages as one."""

    def __init__(self, pendings: Sequence[Pending]) -> None:
        self._pendings = pendings

    def wait(self) -> None:
        for pending in self._pendings:
            pending.wait()
