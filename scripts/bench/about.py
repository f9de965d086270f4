"""What a figure was measured on: machine, software, commit."""

from __future__ import annotations

import platform
import re
import subprocess
from pathlib import Path

import torch

_ROOT = Path(__file__).resolve().parents[2]


def machine() -> str:
    """Return cores, memory and system of this machine."""
    cpu = re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    memory = re.search(r"^MemTotal:\s*(\d+)", Path("/proc/meminfo").read_text(), re.MULTILINE)
    cores = torch.multiprocessing.cpu_count()
    named = cpu.group(1) if cpu else platform.machine()
    size = f", {int(memory.group(1)) / 2**20:.0f} GiB" if memory else ""
    return f"{cores} cores of {named}{size}, {platform.system()} {platform.release()}"


def software() -> str:
    """Return the commit of this tree, and the versions of Python and torch."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=_ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    return f"hybridpar {commit or 'without git'}, Python {platform.python_version()}, torch {torch.__version__}"
