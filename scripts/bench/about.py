"""What a figure was measured on: machine, software, commit."""

from __future__ import annotations

import hashlib
import platform
import re
import subprocess
from pathlib import Path

import torch

_ROOT = Path(__file__).resolve().parents[2]
_CODE = ("hybridpar", "models", "conf", "scripts/bench")


def machine() -> str:
    """Return cores, memory and system of this machine."""
    cpu = re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    memory = re.search(r"^MemTotal:\s*(\d+)", Path("/proc/meminfo").read_text(), re.MULTILINE)
    cores = torch.multiprocessing.cpu_count()
    named = cpu.group(1) if cpu else platform.machine()
    size = f", {int(memory.group(1)) / 2**20:.0f} GiB" if memory else ""
    return f"{cores} cores of {named}{size}, {platform.system()} {platform.release()}"


def commit() -> str:
    """Return the commit of this tree, and whether it was changed since."""
    said = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=_ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    return said or "without git"


def code() -> str:
    """Return twelve digits that change with any file of this tree that is measured or measures."""
    found = hashlib.sha256()
    for path in sorted(p for part in _CODE for p in (_ROOT / part).rglob("*") if p.suffix in {".py", ".yaml"}):
        found.update(f"{path.relative_to(_ROOT)}\0".encode())
        found.update(path.read_bytes())
    return found.hexdigest()[:12]


def versions() -> str:
    """Return the versions of Python and torch."""
    return f"Python {platform.python_version()}, torch {torch.__version__}"


def software() -> str:
    """Return the commit of this tree, and the versions of Python and torch."""
    return f"hybridpar {commit()}, {versions()}"
