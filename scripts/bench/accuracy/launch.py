"""Commands on all ranks, each rank in its own cgroup."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from scripts.bench.cgroups import Cgroups

ROOT = Path(__file__).resolve().parents[3]
_FAREWELL_S = 10.0
"""torchrun ends its workers within this time."""


class LaunchFailedError(Exception):
    """A command on the ranks failed or took too long; says where its output is."""


def on_ranks(
    arguments: Sequence[str], cores: Sequence[float], log: Path, timeout_s: float, *, late: bool = False
) -> None:
    """Run ``python ARGUMENTS`` under torchrun with one thread per rank, each in a cgroup that grants it ``cores``.

    ``late``: the command itself joins the group (``cgroups.join_own``), so that only what follows is slow.
    Output goes to ``log``. Raises LaunchFailedError, with the error that the output tells, where the command fails
    or exceeds ``timeout_s``, CgroupError where there can be no such cgroups. No rank outlives the call.
    """
    with Cgroups(cores) as cgroups:
        _run(arguments if late else [*cgroups.entry, *arguments], cgroups, log, timeout_s)


def _run(arguments: Sequence[str], cgroups: Cgroups, log: Path, timeout_s: float) -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={len(cgroups.folders)}"]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        **cgroups.environment,
    }
    with log.open("w", encoding="utf-8") as output:
        child = subprocess.Popen(
            [sys.executable, *torchrun, *arguments],
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            code = child.wait(timeout_s)
        except subprocess.TimeoutExpired as e:
            raise LaunchFailedError(f"no end after {timeout_s:.0f} s; {_told(log)}") from e
        finally:
            _end(child)
    if code:
        raise LaunchFailedError(f"exit code {code}; {_told(log)}")


def _end(child: subprocess.Popen[bytes]) -> None:
    """End torchrun, which ends its workers; what it leaves behind ends with the cgroups."""
    if child.poll() is not None:
        return
    child.send_signal(signal.SIGTERM)
    try:
        child.wait(_FAREWELL_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def _told(log: Path) -> str:
    """Return the line that names the error, and where the rest is."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    own = [line for line in lines if line.startswith("hybridpar:")]
    others = [line for line in lines if "Error" in line and "ChildFailedError" not in line]
    return f"{(own[:1] or others[-1:] or lines[-1:] or ['no output'])[0][:300]} (see {log})"
