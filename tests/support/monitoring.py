"""What tests of the monitor share."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from hybridpar.monitor.record import Gap, GpuSample, HostSample, Record, read, to_line
from hybridpar.monitor.sampler import start
from hybridpar.monitor.settings import Options
from hybridpar.runtime.callback import Callback
from hybridpar.runtime.journal import StepRecord

UUIDS = ("GPU-00000000-aaaa", "GPU-11111111-bbbb", "GPU-22222222-cccc")
"""Of the stub NVML's GPUs."""
FAST = Options(interval_s=0.12)
WAIT_S = 60.0


def wait_for(what: Callable[[], Any]) -> Any:
    """Return what a function returns once that is true."""
    end = time.monotonic() + WAIT_S
    while time.monotonic() < end:
        if value := what():
            return value
        time.sleep(0.02)
    raise AssertionError("waited in vain")


def samples(path: Path) -> list[GpuSample]:
    return [r for r in read(path) if isinstance(r, GpuSample)] if path.exists() else []


def hosts(path: Path) -> list[HostSample]:
    return [r for r in read(path) if isinstance(r, HostSample)] if path.exists() else []


def gaps(path: Path) -> list[str]:
    return [r.reason for r in read(path) if isinstance(r, Gap)]


def write(path: Path, *records: Record) -> Path:
    path.write_text("".join(map(to_line, records)))
    return path


def record(
    path: Path, ticks: int, uuids: tuple[str, ...] | None = None, options: Options = FAST
) -> list[list[GpuSample]]:
    """Sample through the stub for some ticks; returns the samples of each."""
    width = 3 if uuids is None else len(uuids)
    with start(path, options, "auto", uuids) as monitor:
        assert monitor.reason is None
        wait_for(lambda: len(samples(path)) >= ticks * width)
    found = samples(path)
    return [found[i : i + width] for i in range(0, len(found), width)]


def is_alive(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


class Meddler(Callback):
    """Does something to the sampler after the first step; a training makes it from its name."""

    @staticmethod
    def deed(sampler: psutil.Process) -> None:
        raise NotImplementedError

    seen = 0
    """Process id of the sampler."""

    def on_step(self, record: StepRecord) -> None:
        if record.step == 0:
            (child,) = [c for c in psutil.Process().children() if "hybridpar.monitor.process" in c.cmdline()]
            Meddler.seen = child.pid
            Meddler.deed(child)
