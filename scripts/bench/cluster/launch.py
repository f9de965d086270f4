"""Processes on the hosts of a setting: one per rank, each in its host's network and in its own cgroup."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from scripts.bench.cgroups import Cgroups
from scripts.bench.children import ROOT, LaunchFailedError, environment, told
from scripts.bench.cluster.setting import ALONE_CORES, Setting
from scripts.launch.namespaces import INTERFACE, Hosts

PORT = 29500
"""Of the store on the first host, whose ports nobody else has."""
GRACE_S = 5.0
"""Where a rank failed, the others get so long to tell what they saw of it."""
KILLED = "killed"
"""What an error begins with, of a rank that took more memory than its device has."""
PAUSE_S = 0.05
"""Between two looks at the ranks."""


def on_hosts(
    setting: Setting,
    arguments: Sequence[str],
    log: Path,
    timeout_s: float,
    *,
    alone: bool = False,
    late: bool = False,
) -> None:
    """Run ``python ARGUMENTS`` as every rank of a setting, with its links, cores and memory.

    ``alone``: as one process with a core and no memory limit. ``late``: the command itself joins its quota
    (``cgroups.join_own``), so that only what follows is slow. Output goes to ``log``, with the rank before its
    suffix. Raises LaunchFailedError where a rank fails or ``timeout_s`` is over, HostsError and CgroupError where
    there can be no such hosts. No rank, no network and no cgroup outlives the call.
    """
    world, hosts = (1, 1) if alone else (setting.world, setting.hosts)
    cores = [ALONE_CORES] if alone else [setting.cores] * world
    memory_bytes = None if alone or setting.memory_mb is None else setting.memory_mb * 10**6
    links = _rate(setting.gbit_per_s), _rate(setting.inside_gbit_per_s)
    log.parent.mkdir(parents=True, exist_ok=True)
    with Hosts(hosts, *links) as network, Cgroups(cores, memory_bytes=memory_bytes) as cgroups:
        logs = [log.with_suffix(f".{rank}{log.suffix}") for rank in range(world)]
        with _started(network, cgroups, arguments, logs, world // hosts, late=late) as ranks:
            failed = _wait(ranks, time.monotonic() + timeout_s)
            hungry = cgroups.out_of_memory()
        if hungry:
            rank, limit = hungry[0], setting.memory_mb
            raise LaunchFailedError(f"{KILLED}: rank {rank} took more memory than {limit} MB (see {logs[rank]})")
        if failed is not None:
            raise LaunchFailedError(_why(failed, ranks[failed].returncode, logs[failed], timeout_s))


@contextmanager
def _started(
    network: Hosts,
    cgroups: Cgroups,
    arguments: Sequence[str],
    logs: Sequence[Path],
    ranks_per_host: int,
    *,
    late: bool,
) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Start a process per rank; kill what is left of them at the end."""
    ranks: list[subprocess.Popen[bytes]] = []
    try:
        for rank, log in enumerate(logs):
            host, local = divmod(rank, ranks_per_host)
            with log.open("wb") as output:
                child = subprocess.Popen(
                    [*network.entry(host), sys.executable, "-u", *arguments],
                    cwd=ROOT,
                    env=_environment(network, cgroups, rank, len(logs), local, ranks_per_host),
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
            ranks.append(child)
            cgroups.admit(rank, child.pid, late=late)
        yield ranks
    finally:
        for child in ranks:
            child.kill()
            child.wait()


def _environment(
    network: Hosts, cgroups: Cgroups, rank: int, world: int, local: int, ranks_per_host: int
) -> dict[str, str]:
    """Return what torchrun would tell a rank, and where its cgroup is."""
    return {
        **environment(),
        **cgroups.environment,
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(local),
        "LOCAL_WORLD_SIZE": str(ranks_per_host),
        "GROUP_RANK": str(rank // ranks_per_host),
        "MASTER_ADDR": network.address(0),
        "MASTER_PORT": str(PORT),
        "GLOO_SOCKET_IFNAME": INTERFACE,
    }


def _wait(ranks: Sequence[subprocess.Popen[bytes]], deadline_s: float) -> int | None:
    """Wait until all ranks ended; return the first that failed or, at the deadline, one that goes on."""
    failed = None
    while True:
        left = [n for n, child in enumerate(ranks) if child.poll() is None]
        bad = [n for n, child in enumerate(ranks) if child.returncode]
        if bad and failed is None:
            failed, deadline_s = bad[0], min(deadline_s, time.monotonic() + GRACE_S)
        if not left:
            return failed
        if time.monotonic() > deadline_s:
            return left[0] if failed is None else failed
        time.sleep(PAUSE_S)


def _why(rank: int, code: int | None, log: Path, timeout_s: float) -> str:
    """Say what a rank failed with."""
    if code is None:
        return f"no end after {timeout_s:.0f} s; {told(log)}"
    if code < 0:
        name = signal.Signals(-code).name
        return (
            f"rank {rank} was ended by {name} (SIGKILL: mostly the machine's memory does not suffice; see {log})"
        )
    return f"rank {rank} ended with {code}; {told(log)}"


def _rate(gbit_per_s: float | None) -> str | None:
    return None if gbit_per_s is None else f"{gbit_per_s:g}gbit"
