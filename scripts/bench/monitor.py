"""What the monitor costs: CPU seconds of the sampler over wall seconds, its start apart, and a step's look at it.

`python -m scripts.bench.monitor [seconds]`; on a machine that does nothing else meanwhile. It watches the GPUs of
the node, if there are any, and RANKS processes that sleep, each with WORKERS of its own, like ranks with loaders.
The goal is GOAL of one core.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hybridpar.monitor.record import HostSample, read
from hybridpar.monitor.sampler import Monitor, start
from scripts.bench.about import machine, software

GOAL = 0.005
SECONDS = 60.0
RANKS, WORKERS = 8, 4
LOOKS = 10_000
_RANK = (
    "import subprocess, sys, time\n"
    f"workers = [subprocess.Popen(['sleep', '1000000']) for _ in range({WORKERS})]\n"
    "print(flush=True)\n"
    "sys.stdin.read()\n"
    "for worker in workers: worker.kill()\n"
)


@contextmanager
def ranks() -> Iterator[dict[int, int]]:
    """Have processes that stand for ranks; yields their ids by rank."""
    command = [sys.executable, "-c", _RANK]
    processes = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(RANKS)]
    try:
        for process in processes:
            assert process.stdout is not None
            process.stdout.readline()
        yield {rank: process.pid for rank, process in enumerate(processes)}
    finally:
        for process in processes:
            process.communicate()


def look_s(monitor: Monitor) -> float:
    """Return the CPU seconds that the training takes per step to ask for news."""
    began_s = time.process_time()
    for _ in range(LOOKS):
        monitor.news()
    return (time.process_time() - began_s) / LOOKS


def main() -> None:
    """Sample for a while and print what that took."""
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else SECONDS
    print(f"{machine()}; {software()}")
    with tempfile.TemporaryDirectory() as folder, ranks() as pids:
        path = Path(folder, "monitor.jsonl")
        with start(path, pids=pids) as monitor:
            print(f"GPUs: {monitor.reason or 'sampled'}")
            time.sleep(seconds)
            step_s = look_s(monitor)
        records = list(read(path))
    hosts = [record for record in records if isinstance(record, HostSample)]
    first, last = hosts[0], hosts[-1]
    used_s, wall_s = (last.sampler_cpu_s or 0.0) - (first.sampler_cpu_s or 0.0), last.time_s - first.time_s
    print(f"start: {first.sampler_cpu_s:.3f} CPU s, the first tick included")
    print(f"then {len(hosts) - 1} ticks in {wall_s:.1f} s: {used_s / (len(hosts) - 1) * 1e3:.2f} ms of CPU each")
    print(f"sampler: {used_s / wall_s:.3%} of one core; goal {GOAL:.1%}; {len(records)} records")
    print(f"a step's look: {step_s * 1e6:.1f} us of CPU")


if __name__ == "__main__":
    main()
