"""One rank of a task: makes a contestant, trains with it, writes down what it saw.

``python -m scripts.bench.cluster.worker TASK.json``, with torchrun's environment (RANK, WORLD_SIZE, MASTER_ADDR,
...), or without it as the only rank. A rank that fails writes its error and ends with code 1.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks: ranks are cores here

import torch
import torch.distributed as dist

from hybridpar.api import process
from hybridpar.runtime.memory import MemoryMeter
from hybridpar.runtime.process import Place
from scripts.bench.cgroups import join_own
from scripts.bench.cluster.contestants import find
from scripts.bench.cluster.task import Seen, Task
from scripts.bench.cluster.training import comparable_work_of, work_of

_COUNTERS = Path("/proc/self/net/dev")
"""Of the interfaces in this process's network namespace: proc(5)."""


def main() -> None:
    """Do the task of the command line."""
    task, seen = Task.load(Path(sys.argv[1])), Seen()
    torch.set_num_threads(1)
    try:
        run(task, seen)
    except Exception:  # noqa: BLE001 - whatever it was, it is this contestant's result
        seen.error = traceback.format_exc()
        sys.stderr.write(seen.error)
    seen.save(Path(task.out), Place.read(os.environ).rank)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1 if seen.error else 0)  # no clean-up, which could wait for a rank that waits for this one


def run(task: Task, seen: Seen) -> None:
    """Join the other ranks and train; notes in ``seen`` what is known so far."""
    process().join()
    work = comparable_work_of(task.setting) if task.losses else work_of(task.setting)
    meter = MemoryMeter(torch.device("cpu"))
    contestant = find(task.contestant)(work, **task.options)  # type: ignore[call-arg]
    join_own()  # starting up is not measured, and need not be slow
    shares = [contestant.step(*work.samples(step)) for step in range(max(task.losses, task.warm_up))]
    seen.losses = _summed(shares[: task.losses])
    before = _transferred()
    for step in range(len(shares), len(shares) + task.steps):
        images, labels = work.samples(step)
        dist.barrier()
        began_s, began_cpu_s = time.perf_counter(), time.process_time()
        contestant.step(images, labels)
        seen.step_s.append(time.perf_counter() - began_s)
        seen.cpu_s.append(time.process_time() - began_cpu_s)
    dist.barrier()
    after = _transferred()
    seen.bytes = {name: [b - a for a, b in zip(before[name], after[name], strict=True)] for name in after}
    seen.peak_bytes = meter.peak_bytes()
    dist.barrier()  # the first rank to end closes connections, and the store with it


def _summed(shares: list[float]) -> list[float]:
    """Return the sums over all ranks."""
    total = torch.tensor(shares, dtype=torch.float64)
    dist.all_reduce(total)
    return [float(loss) for loss in total]


def _transferred() -> dict[str, list[int]]:
    """Return the bytes that every interface has received and sent so far."""
    lines = [line.split(":") for line in _COUNTERS.read_text().splitlines() if ":" in line]
    return {name.strip(): [int(figures.split()[0]), int(figures.split()[8])] for name, figures in lines}


if __name__ == "__main__":
    main()
