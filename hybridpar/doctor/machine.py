"""The machine under a rank: cores and threads, shared memory, file descriptors, the run's folder."""

from __future__ import annotations

import math
import os
import resource
import shutil
from pathlib import Path

from hybridpar.cluster.limits import Limit
from hybridpar.doctor.finding import Finding, note, ok, wrong
from hybridpar.report.text import in_bytes, plural

LEAST_SHARED_BYTES = 1 << 30
"""Of /dev/shm, for a node's loader workers and NCCL. Docker gives 64 MiB by default."""
LEAST_FREE_BYTES = 1 << 30
"""Where a run writes."""
_OWN_FILES, _FILES_PER_PEER = 256, 16
"""File descriptors of a process, and of its connections to one other rank (one per communicator of the two)."""


def check_cores(limit: Limit, threads: int, ranks: int, *, cpu: bool) -> Finding:
    """Compare the threads of each of a node's ranks with the cores that this process may use (``limit``)."""
    cores = f"{limit.amount:g} cores" + (f" ({limit.owner})" if limit.owner else "")
    what = f"{cores}, {plural(ranks, 'rank')} with {plural(threads, 'thread')} each"
    most = max(1, math.ceil(limit.amount))
    if cpu and threads > most:
        return wrong("cores", f"{what}: they take turns", f"set OMP_NUM_THREADS={most}")
    if cpu and ranks * threads > most:
        return note(
            "cores", f"{what}: the ranks share cores", "start fewer ranks per node where they compute on CPUs"
        )
    return ok("cores", what)


def check_memory(limit: Limit) -> Finding:
    """Tell how much memory is left."""
    owner = f" ({limit.owner})" if limit.owner else ""
    return ok("memory", f"{in_bytes(limit.amount)} available{owner}")


def check_shared_memory(*, needed: bool, path: Path = Path("/dev/shm")) -> Finding:  # noqa: S108 - looks at its size
    """Look at the size of the shared memory; ``needed``: by loader workers, or by several GPUs of a node."""
    if not path.is_dir():
        return note("shared memory", f"no {path}; loader workers and NCCL need it", "mount a tmpfs there")
    size = shutil.disk_usage(path)
    what = f"{in_bytes(size.free)} of {in_bytes(size.total)} free in {path}"
    if size.free >= LEAST_SHARED_BYTES:
        return ok("shared memory", what)
    remedy = "give the container more: docker run --shm-size=8g, or an emptyDir with medium: Memory"
    if needed:
        return wrong("shared memory", f"{what}, too little for loader workers and NCCL", remedy)
    return note("shared memory", f"{what}, too little for data.workers and for several GPUs", remedy)


def check_files(world: int, limit: int | None = None) -> Finding:
    """Compare the limit of open files with what connections to all other ranks take."""
    if limit is None:
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OWN_FILES + _FILES_PER_PEER * (world - 1)
    if limit == resource.RLIM_INFINITY or limit >= wanted:
        shown = "no limit of" if limit == resource.RLIM_INFINITY else f"{limit}"
        return ok("open files", f"{shown} file descriptors")
    what = f"{limit} file descriptors, but {world} ranks may take {wanted}"
    return wrong("open files", what, f"raise the limit before the launch: ulimit -n {max(4096, wanted)}")


def check_run_dir(path: Path) -> Finding:
    """Look whether a run can write into ``path``, which need not exist, and how much room there is."""
    there = next(p for p in (path, *path.parents) if p.exists())
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        return wrong(
            "run folder", f"{path} cannot be made or written in {there}", "give another one by run.dir=..."
        )
    free = shutil.disk_usage(there).free
    what = f"{in_bytes(free)} free for {path}"
    if free < LEAST_FREE_BYTES:
        return wrong("run folder", f"{what}, too little for checkpoints", "free some, or give another run.dir")
    return ok("run folder", what)
