"""How much memory this rank's part of the job takes."""

from __future__ import annotations

import contextlib
from pathlib import Path

import psutil
import torch

from hybridpar.host import trim_freed_memory

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class MemoryMeter:
    """Peak memory since this object was made: of the GPU's allocator, or resident above the process's baseline."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        # What was freed before (a profile's passes, say) would serve this job, and not be seen as its own.
        trim_freed_memory()
        with contextlib.suppress(OSError):
            _CLEAR.write_text("5")  # Linux: forget the resident peak so far (proc(5), clear_refs)
        self._baseline_bytes = self._seen_bytes = _resident_bytes()

    def peak_bytes(self) -> int:
        """Return the peak in bytes. Where the system keeps no peak of its own: the greatest value at any call."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        self._seen_bytes = max(self._seen_bytes, _resident_bytes(), _resident_peak_bytes())
        return self._seen_bytes - self._baseline_bytes


def _resident_bytes() -> int:
    return int(psutil.Process().memory_info().rss)


def _resident_peak_bytes() -> int:
    with contextlib.suppress(OSError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0
