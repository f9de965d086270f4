"""CPU quotas per rank: a cgroup each, so that one machine stands for several devices of known speed.

A rank's share does not depend on what the others do: an idle rank lends nothing, as a device of its own would not.
A memory limit stands for the memory of the rank's device.
Versions 1 (``cpu.cfs_quota_us``) and 2 (``cpu.max``) of Linux control groups; needs root.

Run as a script, by torchrun in place of the worker: joins the group of ``RANK`` and becomes the command::

    torchrun --nproc-per-node 4 scripts/bench/cgroups.py GROUPS -m hybridpar train ...
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

PERIOD_US = 10_000
"""Short, so that a rank never stands still for longer than a small computation takes."""
LEAST_QUOTA_US = 1000
"""The kernel refuses smaller ones."""
_VARIABLE = "HYBRIDPAR_BENCH_CGROUPS"
_MEMORY_LIMITS = ("memory.max", "memory.limit_in_bytes", "memory.memsw.limit_in_bytes")
"""Of version 2, of version 1, and of version 1 with swap; the last one can only be set after the second."""
REMOVAL_S = 10.0
"""A killed process leaves its group within this time."""


class CgroupError(Exception):
    """There is no controller to use, or no right to; says what is missing and what would help."""


class Cgroups:
    """One cgroup per rank below the root of the CPU controller; a context manager that removes them.

    Args:
        cores: seconds of a core per second, for every rank; unequal ones make unequal devices.
        root: of the CPU controller's hierarchy; None: where it is mounted.
        memory_bytes: what a rank may use before the kernel kills it; None: no limit, and no memory controller
            is needed.

    Raises CgroupError, having made nothing, where the machine has no such controller or refuses.
    """

    def __init__(self, cores: Sequence[float], root: Path | None = None, memory_bytes: int | None = None) -> None:
        quotas_us = [round(c * PERIOD_US) for c in cores]
        if not quotas_us or min(quotas_us) < LEAST_QUOTA_US:
            least = LEAST_QUOTA_US / PERIOD_US
            raise CgroupError(f"cores: {list(cores)} must be one number per rank, each at least {least}")
        self._base = (root or controller_root()) / f"hybridpar-{os.getpid()}"
        self.folders = [group_of(self._base, rank) for rank in range(len(quotas_us))]
        self.memory_folders: list[Path] = []
        """Of the ranks whose memory is limited: with version 2 the same as ``folders``."""
        if memory_bytes is not None:
            base = controller_root("memory") / self._base.name
            self.memory_folders = [group_of(base, rank) for rank in range(len(quotas_us))]
        made = False
        try:
            for folder, quota_us in zip(self.folders, quotas_us, strict=True):
                _make(folder, quota_us)
            for folder in self.memory_folders:
                _limit_memory(folder, memory_bytes or 0)
            made = True
        except OSError as e:
            raise CgroupError(
                f"cannot make a cgroup with a limit: {e}; run as root on a machine whose controllers may "
                "be written to (in a container: a privileged one)"
            ) from e
        finally:
            if not made:
                self.close()

    @property
    def environment(self) -> dict[str, str]:
        """What a command needs that calls :func:`join_own`."""
        return {_VARIABLE: str(self._base)}

    @property
    def entry(self) -> list[str]:
        """What torchrun starts in place of Python: the rest of its command line is Python's own."""
        return [str(Path(__file__).resolve()), str(self._base)]

    def admit(self, rank: int, pid: int, *, late: bool) -> None:
        """Move a process that was just started into its rank's groups; ``late``: not into that of the quota yet.

        Memory counts from the start, as it stays with the group that a process was in when it took it.
        """
        folders = [*self.memory_folders[rank : rank + 1], *([] if late else self.folders[rank : rank + 1])]
        for folder in folders:
            (folder / "cgroup.procs").write_text(str(pid))

    def out_of_memory(self) -> list[int]:
        """Return the ranks of which the kernel killed a process for its memory."""
        return [rank for rank, folder in enumerate(self.memory_folders) if _killed(folder)]

    def close(self) -> None:
        """Kill what still runs inside and remove the groups; may be called twice.

        Raises CgroupError where a group cannot be emptied.
        """
        for folder in (*self.folders, *self.memory_folders):
            deadline_s = time.monotonic() + REMOVAL_S
            while folder.exists():
                for pid in _members(folder):
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                try:
                    folder.rmdir()
                except OSError as e:
                    if time.monotonic() > deadline_s:
                        raise CgroupError(f"{folder} cannot be removed: {e}; remove it by rmdir") from e
                    time.sleep(0.05)

    def __enter__(self) -> Cgroups:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def controller_root(controller: str = "cpu", mounts: Path = Path("/proc/self/mounts")) -> Path:
    """Return where a controller is mounted; version 1 wins where both are.

    Raises CgroupError where there is none.
    """
    unified = None
    for line in mounts.read_text().splitlines():
        _, folder, kind, options, *_ = line.split()
        if kind == "cgroup" and controller in options.split(","):
            return Path(folder)
        controllers = Path(folder) / "cgroup.controllers"
        if kind == "cgroup2" and controllers.exists() and controller in controllers.read_text().split():
            unified = Path(folder)
    if unified is None:
        raise CgroupError(
            f"no {controller} controller of Linux control groups is mounted ({mounts}); use a machine that has one"
        )
    return unified


def group_of(base: Path, rank: int) -> Path:
    """Return the folder of a rank's group."""
    return base.with_name(f"{base.name}-rank{rank}")


def join_own() -> None:
    """Move this process, a worker, into its rank's group, where it was started with one."""
    if _VARIABLE in os.environ:
        join(group_of(Path(os.environ[_VARIABLE]), int(os.environ["RANK"])))


def join(folder: Path) -> None:
    """Move this process, with all its threads, into a group."""
    (folder / "cgroup.procs").write_text(str(os.getpid()))


def _make(folder: Path, quota_us: int) -> None:
    """Make a group with a quota."""
    _delegate(folder.parent, "cpu")
    folder.mkdir()
    if (folder / "cpu.max").exists():
        (folder / "cpu.max").write_text(f"{quota_us} {PERIOD_US}")
        return
    (folder / "cpu.cfs_period_us").write_text(str(PERIOD_US))
    (folder / "cpu.cfs_quota_us").write_text(str(quota_us))


def _limit_memory(folder: Path, limit_bytes: int) -> None:
    """Limit a group's memory, which with version 2 is the group that has the quota; swap is no way out."""
    _delegate(folder.parent, "memory")
    folder.mkdir(exist_ok=True)
    for name in _MEMORY_LIMITS:
        if (folder / name).exists():
            (folder / name).write_text(str(limit_bytes))
    if (folder / "memory.swap.max").exists():
        (folder / "memory.swap.max").write_text("0")


def _delegate(parent: Path, controller: str) -> None:
    """Let the children of a version 2 group use a controller."""
    own = parent / "cgroup.subtree_control"
    if own.exists() and controller not in own.read_text().split():
        own.write_text(f"+{controller}")


def _killed(folder: Path) -> bool:
    for name in ("memory.events", "memory.oom_control"):
        if (folder / name).exists():
            counts = dict(line.split() for line in (folder / name).read_text().splitlines())
            return int(counts.get("oom_kill", 0)) > 0
    return False


def _members(folder: Path) -> list[int]:
    return [int(word) for word in (folder / "cgroup.procs").read_text().split()]


def main() -> None:
    """Join the group of this rank and become Python with the given arguments."""
    base, *arguments = sys.argv[1:]
    join(group_of(Path(base), int(os.environ["RANK"])))
    os.execv(sys.executable, [sys.executable, "-u", *arguments])  # noqa: S606 - a command line, not a shell's


if __name__ == "__main__":
    main()
