"""How much of this machine the process may use: cores and memory, cut by its cgroups (v1 and v2)."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True)
class Limit:
    """An amount, and what sets it: processes with the same owner share it."""

    amount: float
    owner: str = ""
    """A cgroup's folder or a set of CPUs; empty: the whole machine."""


def usable_cores(root: Path = Path("/")) -> int:
    """Count the whole CPU cores this process may use; at least 1."""
    return max(1, math.floor(core_quota(root)))


def core_quota(root: Path = Path("/")) -> float:
    """CPU seconds per second that this process may use: its affinity mask, cut by its cgroups' quotas."""
    return cpu_limit(root).amount


def cpu_limit(root: Path = Path("/")) -> Limit:
    """Return the tightest of this process's affinity mask and its cgroups' CPU quotas, in cores."""
    mask = os.sched_getaffinity(0)
    limits = [Limit(float(len(mask)), f"cpus {sorted(mask)}" if len(mask) < (os.cpu_count() or 1) else "")]
    for folder in _cgroups(root, "cpu"):
        words = _words(folder / "cpu.max") or [
            *_words(folder / "cpu.cfs_quota_us"),
            *_words(folder / "cpu.cfs_period_us"),
        ]
        if len(words) == 2 and words[0] not in {"max", "-1"}:
            limits.append(Limit(int(words[0]) / int(words[1]), str(folder)))
    return min(limits, key=lambda limit: limit.amount)


def usable_memory_bytes(root: Path = Path("/")) -> int:
    """Bytes of RAM this process may still use: what the machine has available, cut by its cgroups' limits."""
    return int(memory_limit(root).amount)


def memory_limit(root: Path = Path("/")) -> Limit:
    """Return the tightest of the machine's available memory and this process's cgroups' limits, in bytes."""
    limits = [Limit(int(psutil.virtual_memory().available))]
    for folder in _cgroups(root, "memory"):
        words = _words(folder / "memory.max") or _words(folder / "memory.limit_in_bytes")
        if words and words[0] != "max":
            limits.append(Limit(int(words[0]), str(folder)))
    return min(limits, key=lambda limit: limit.amount)


def _cgroups(root: Path, controller: str) -> list[Path]:
    """Folders of this process's cgroups (v1 and v2) that may limit ``controller``, ancestors included."""
    folders = []
    for line in _lines(root / "proc/self/cgroup"):
        number, controllers, inner = line.split(":", 2)
        if number == "0":
            base = root / "sys/fs/cgroup"
        elif controller in controllers.split(","):
            base = root / "sys/fs/cgroup" / controller
        else:
            continue
        own = base / inner.lstrip("/")
        folders += [folder for folder in (own, *own.parents) if folder.is_relative_to(base)]
    return folders


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _words(path: Path) -> list[str]:
    return " ".join(_lines(path)).split()
