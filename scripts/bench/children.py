"""The processes that a bench starts: their environment, and what their output tells of a failure."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class LaunchFailedError(Exception):
    """A command on the ranks failed or took too long; says where its output is."""


def environment() -> dict[str, str]:
    """Return what every rank has: this tree's modules, one thread, no GPU."""
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }


def told(log: Path) -> str:
    """Return the line of an output that names the error, and where the rest is."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    own = [line for line in lines if line.startswith("hybridpar:")]
    others = [line for line in lines if "Error" in line and "ChildFailedError" not in line]
    return f"{(own[:1] or others[-1:] or lines[-1:] or ['no output'])[0][:300]} (see {log})"
