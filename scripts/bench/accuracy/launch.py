"""Commands on all ranks, each rank in its own cgroup."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from scripts.bench.cgroups import Cgroups
from scripts.bench.children import ROOT, LaunchFailedError, environment, told

_FAREWELL_S = 10.0
"""torchrun ends its workers within this time."""


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
    with log.open("w", encoding="utf-8") as output:
        child = subprocess.Popen(
            [sys.executable, *torchrun, *arguments],
            cwd=ROOT,
            env={**environment(), **cgroups.environment},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            code = child.wait(timeout_s)
        except subprocess.TimeoutExpired as e:
            raise LaunchFailedError(f"no end after {timeout_s:.0f} s; {told(log)}") from e
        finally:
            _end(child)
    if code:
        raise LaunchFailedError(f"exit code {code}; {told(log)}")


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
