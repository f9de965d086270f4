"""Who watches a device while layers run: a GPU's kernels by torch's profiler, its counters by NVML; or a CPU."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from hybridpar.monitor.gpm import MIN_WINDOW_S
from hybridpar.monitor.nvml import open_nvml
from hybridpar.monitor.record import GpuSample
from hybridpar.monitor.source import Unavailable
from hybridpar.profiling.bench import Mark
from hybridpar.profiling.study import DeviceUse
from hybridpar.profiling.watch import CpuWatch, Pass, Seen, Spans, Watch, number_of
from hybridpar.report.kernels import swept
from hybridpar.report.kineto import PREFIX, Range, gpu_kernels
from hybridpar.runtime.process import gpu_uuid

_MARK = f"{PREFIX}/mark/"
COUNTED_S = 2 * MIN_WINDOW_S
"""So long passes run for the device's counters."""
COUNTERS = tuple(field.name for field in fields(DeviceUse))


def watch_on(device: torch.device) -> Watch:
    """Return who watches a device."""
    return GpuWatch(device) if device.type == "cuda" else CpuWatch()


class GpuWatch:
    """Watches one GPU of this process."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._uuid = device, gpu_uuid(device)
        self.sources: dict[str, str] = {}
        self._gaps: dict[str, None] = {}

    @property
    def gaps(self) -> tuple[str, ...]:
        """What stays unknown and why."""
        return tuple(self._gaps)

    def layers(self, run: Pass, count: int, passes: int) -> list[Seen]:
        """Trace passes, and sum up the kernels that each layer launched."""
        clock, spans = _Markers(), list[Spans]()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as made:
            for _ in range(passes):
                spans.append(run(clock))
            torch.cuda.synchronize(self._device)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            made.export_chrome_trace(str(path))
            trace = json.loads(path.read_text(encoding="utf-8"))
        found = seen_in(trace, spans, count)
        self._note("kernels are in no trace: torch's profiler reaches no CUPTI", any(s.busy_s for s in found))
        known = any(s.occupancy is not None for s in found)
        self._note("occupancy is unknown: the trace's kernels do not tell it", known)
        self.sources |= {"utilisation": "kineto"} | ({"occupancy": "kineto"} if known else {})
        return found

    def device(self, run: Callable[[], object]) -> dict[str, float | None]:
        """Run passes for ``COUNTED_S`` between two readings of GPM."""
        opened = open_nvml([self._uuid])
        if isinstance(opened, Unavailable):
            self._gaps[f"the GPU's counters are unknown: {opened.reason}"] = None
            return {}
        try:
            opened.read(time.time())
            began_s = time.perf_counter()
            while time.perf_counter() - began_s < COUNTED_S:
                run()
                torch.cuda.synchronize(self._device)
            samples = [s for s in opened.read(time.time()) if isinstance(s, GpuSample)]
        finally:
            opened.close()
        self._gaps |= dict.fromkeys(opened.gaps)
        found = {name: getattr(s, name) for s in samples for name in COUNTERS}
        if any(value is not None for value in found.values()):
            self.sources["device"] = "gpm"
        return found

    def _note(self, gap: str, fine: bool) -> None:
        if not fine:
            self._gaps[gap] = None


class _Markers:
    """Marks are annotations in the trace, by number."""

    def __init__(self) -> None:
        self._count = 0

    def mark(self) -> Mark:
        with record_function(f"{_MARK}{self._count}"):
            self._count += 1
        return float(self._count - 1)


def seen_in(trace: Mapping[str, Any], passes: Sequence[Spans], count: int) -> list[Seen]:
    """Return what each layer's kernels did, per pass.

    A kernel is of the layer between whose marks it was launched, on whatever thread: autograd has one of its own.
    """
    events = [e for e in trace.get("traceEvents", ()) if e.get("ph") == "X"]
    named = (e for e in events if e.get("cat") == "user_annotation" and e["name"].startswith(_MARK))
    at_us = {int(e["name"].removeprefix(_MARK)): float(e["ts"]) for e in named}
    ranges = sorted(
        Range(at_us[number_of(begin)], at_us[number_of(end)], str(number // 2), "pass")
        for spans in passes
        for number, (begin, end) in enumerate(spans)
    )
    kernels = list(gpu_kernels(events, ranges))
    end_s = max((k.end_s for k in kernels), default=0.0)
    _, stages = swept(kernels, min((k.start_s for k in kernels), default=0.0), end_s)
    found = []
    for number in range(count):
        use = stages.get(str(number))
        if use is None:
            found.append(Seen(0.0))
        else:
            found.append(Seen(use.busy_s / len(passes), None, use.occupancy, use.below_half))
    return found
