"""What a layer keeps for its backward, and what its passes need beyond that while they run."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import nn

from hybridpar.host import give_back_freed_memory, keep_freed_memory, trim_freed_memory
from hybridpar.model.copies import tensors
from hybridpar.model.footprint import storage_id
from hybridpar.profiling.bench import Bench
from hybridpar.profiling.strands import Call

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESOLUTION_BYTES = 1 << 20
"""The system counts resident pages per CPU and adds them up now and then: less than this is noise: 0."""


@dataclass(frozen=True)
class Bytes:
    """Of one layer at one size; see the fields of ``LayerProfile``."""

    saved: int
    forward: int
    backward: int


class Gauge(Protocol):
    """Reads memory."""

    source: Literal["cuda allocator", "resident high-water mark"]

    def read(self) -> tuple[int, int]:
        """Return the bytes in use now, and their peak since the last read."""
        ...

    def measuring(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which reads are exact."""
        ...


class CudaGauge:
    """The caching allocator's own figures."""

    source: Literal["cuda allocator", "resident high-water mark"] = "cuda allocator"

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def read(self) -> tuple[int, int]:
        """Return the allocated bytes and their peak since the last read."""
        found = torch.cuda.memory_allocated(self._device), torch.cuda.max_memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        return found

    @contextlib.contextmanager
    def measuring(self) -> Iterator[None]:
        """Nothing to prepare."""
        yield


class ResidentGauge:
    """Resident memory of the process and its high-water mark (proc(5): VmRSS, VmHWM, clear_refs).

    It sees what every library allocates, touched pages only. While it measures, the C library gives freed memory
    back to the system, so that what is resident is what is in use.
    """

    source: Literal["cuda allocator", "resident high-water mark"] = "resident high-water mark"

    @staticmethod
    def works() -> bool:
        """Whether this system has such a mark, can forget it, and has a C library that gives memory back."""
        try:
            _CLEAR.write_text("5")
            works = "VmHWM" in _STATUS.read_text() and give_back_freed_memory()
        except OSError:
            return False
        keep_freed_memory()
        return works

    def read(self) -> tuple[int, int]:
        """Return the resident bytes and their peak since the last read."""
        peak = _status_bytes("VmHWM")
        # Even a large block is taken from a hole in the heap where one fits, and stays resident when it is freed.
        trim_freed_memory()
        found = _status_bytes("VmRSS"), peak
        _CLEAR.write_text("5")
        return found

    @contextlib.contextmanager
    def measuring(self) -> Iterator[None]:
        """Have freed memory given back, and kept again afterwards, as in a run."""
        give_back_freed_memory()
        try:
            yield
        finally:
            keep_freed_memory()


def _status_bytes(name: str) -> int:
    (line,) = (line for line in _STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def find_gauge(bench: Bench) -> Gauge | None:
    """Return what can read the device's memory; None where nothing can."""
    if bench.on_gpu:
        return CudaGauge(bench.device)
    return ResidentGauge() if ResidentGauge.works() else None


def watched_pass(
    gauge: Gauge, modules: Sequence[nn.Module], layers: Sequence[Call], x: torch.Tensor, resolution: int
) -> list[Bytes]:
    """Bytes of each layer, in one pass forward and backward like a timed one; less than ``resolution`` is 0."""
    saved, forward = list[int](), list[int]()
    reached: dict[int, tuple[int, int]] = {}
    gradient_bytes: dict[int, int] = {}

    def watch(index: int, x: torch.Tensor) -> None:
        def note(gradient: torch.Tensor) -> None:
            gradient_bytes[index] = gradient.nbytes
            reached[index] = gauge.read()

        if x.requires_grad:
            x.register_hook(note)  # type: ignore[no-untyped-call]

    with gauge.measuring():
        for i, (module, layer) in enumerate(zip(modules, layers, strict=True)):
            watch(i, x)
            before, _ = gauge.read()
            with _kept(module, x) as kept:
                y = layer(x)
            after, peak = gauge.read()
            kept.pop(storage_id(y), None)
            saved.append(sum(kept.values()))
            forward.append(peak - max(before, after))
            x = y
            del y
        watch(len(layers), x)
        if x.requires_grad:
            torch.autograd.backward([x], [torch.rand_like(x)])
    backward = [0] * len(layers)
    for begin, end in itertools.pairwise(sorted(reached, reverse=True)):
        backward[begin - 1] = reached[end][1] - reached[begin][0] - gradient_bytes[end]
    if 0 not in reached and reached:  # the first layer makes no gradient of its input: its end is the pass's
        backward[min(reached) - 1] = gauge.read()[1] - reached[min(reached)][0]
    return [
        Bytes(s, *(n if n >= resolution else 0 for n in (f, b)))
        for s, f, b in zip(saved, forward, backward, strict=True)
    ]


@contextlib.contextmanager
def _kept(module: nn.Module, x: torch.Tensor) -> Iterator[dict[int, int]]:
    """Bytes of each storage that is saved within, apart from the input's, the parameters' and the buffers'."""
    apart = {storage_id(x)} | {storage_id(t) for t in tensors(module)}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if storage_id(tensor) not in apart:
            kept[storage_id(tensor)] = tensor.untyped_storage().nbytes()
        return tensor.detach()  # an output that its own node kept would be held for good

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept
