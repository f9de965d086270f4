"""The probe's transport over torch.distributed: gloo on CPUs, NCCL on GPUs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F

import hybridpar
from hybridpar.cluster.topology import Collective
from hybridpar.cluster.transport import ACK_BYTES, What

T = TypeVar("T")

_ITEM_BYTES = 4
_CPU_SIZES = (256, (1, 32, 28, 28), 2**20)
_CUDA_SIZES = (2048, (16, 64, 112, 112), 2**24)
"""Rows of a square product, input of a convolution, elements of a sum: about a third of the time each."""


def versions() -> dict[str, str]:
    """Return what the measured times depend on: this package, torch, and the backend of the default group."""
    return {"hybridpar": hybridpar.__version__, "torch": str(torch.__version__), "backend": dist.get_backend()}


class TorchTransport:
    """One rank's transport on ``device``; needs the default process group of all ranks."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self._groups: dict[tuple[int, ...], Any] = {}
        self._buffers: dict[tuple[str, int], torch.Tensor] = {}
        self._kernel = _Kernel(device)

    def now(self) -> float:
        """Return the seconds of this process's monotonic clock."""
        return time.perf_counter()

    def gather(self, value: T) -> list[T]:
        """Return every rank's picklable value."""
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def open(self, groups: Sequence[tuple[int, ...]]) -> None:
        """Make the process groups."""
        for group in groups:
            if group not in self._groups:
                self._groups[group] = dist.new_group(list(group))

    def messages(self, source: int, target: int, payload_bytes: int, count: int) -> None:
        """Send messages and wait for the answer to each."""
        payload, ack = self._buffer("message", payload_bytes), self._buffer("ack", ACK_BYTES)
        for _ in range(count):
            if self.rank == source:
                dist.send(payload, target)
                dist.recv(ack, target)
            else:
                dist.recv(payload, source)
                dist.send(ack, source)
        self._synchronize()

    def collective(self, operation: Collective, ranks: tuple[int, ...], payload_bytes: int, count: int) -> None:
        """Run collectives one after the other."""
        for i in range(count):
            self._start(operation, ranks, payload_bytes, i).wait()
        self._synchronize()

    def start(self, what: What, ranks: tuple[int, ...], payload_bytes: int, count: int) -> _Pending:
        """Start messages or collectives."""
        return _Pending([self._start(what, ranks, payload_bytes, i) for i in range(count)], self.device)

    def compute(self, count: int) -> None:
        """Run the kernel; on a GPU wait for its stream, which communication does not use."""
        with torch.no_grad():
            for _ in range(count):
                self._kernel.run()
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def _start(self, what: What, ranks: tuple[int, ...], payload_bytes: int, turn: int) -> dist.Work:
        """Start one communication.

        The next broadcast comes from the rank before, which in a binomial tree is the last to receive, so that a
        row of broadcasts takes as long as each of them for itself.
        """
        n = len(ranks)
        work: dist.Work | None
        if what == "message":
            payload = self._buffer("message", payload_bytes)
            work = dist.isend(payload, ranks[1]) if self.rank == ranks[0] else dist.irecv(payload, ranks[0])
        elif what == "all_reduce":
            work = dist.all_reduce(self._buffer(what, payload_bytes), group=self._groups[ranks], async_op=True)
        elif what == "broadcast":
            work = dist.broadcast(
                self._buffer(what, payload_bytes), ranks[-turn % n], group=self._groups[ranks], async_op=True
            )
        else:
            share = max(_ITEM_BYTES, payload_bytes // n)
            own = self._buffer(f"{what}.own", share)
            parts = [self._buffer(f"{what}.{i}", share) for i in range(n)]
            if what == "all_gather":
                work = dist.all_gather(parts, own, group=self._groups[ranks], async_op=True)
            else:
                work = dist.reduce_scatter(own, parts, group=self._groups[ranks], async_op=True)
        assert work is not None, "this rank is a member"
        return work

    def _buffer(self, name: str, size_bytes: int) -> torch.Tensor:
        """Return a tensor of zeros, which sums leave as they are."""
        key = (name, size_bytes)
        if key not in self._buffers:
            self._buffers[key] = torch.zeros(size_bytes // _ITEM_BYTES, device=self.device)
        return self._buffers[key]

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class _Pending:
    """Communication under way."""

    def __init__(self, works: Sequence[dist.Work], device: torch.device) -> None:
        self.works, self.device = works, device

    def wait(self) -> None:
        """Return when the data is there."""
        for work in self.works:
            work.wait()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class _Kernel:
    """A product, a convolution and a sum that memory bounds: what a layer's forward and backward are made of."""

    def __init__(self, device: torch.device) -> None:
        rows, image, elements = _CUDA_SIZES if device.type == "cuda" else _CPU_SIZES
        channels = image[1]
        self.matrix = torch.ones(rows, rows, device=device)
        self.product = torch.empty_like(self.matrix)
        self.image = torch.ones(image, device=device)
        self.weight = torch.ones(channels, channels, 3, 3, device=device)
        self.values = torch.ones(elements, device=device)
        self.sums = torch.empty_like(self.values)

    def run(self) -> None:
        """Compute once."""
        torch.mm(self.matrix, self.matrix, out=self.product)
        F.conv2d(self.image, self.weight, padding=1)
        torch.add(self.values, self.values, out=self.sums)
