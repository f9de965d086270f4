"""How long the report of a long run takes, and how large its page is.

``python -m scripts.bench.report RUN`` makes, from a run's folder, that of one with ``--steps`` steps (10^6) and a
``monitor.jsonl`` at its bound (32 MiB, ``--gpus`` GPUs), and times ``hybridpar report`` on it, in a process of its
own.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hybridpar.monitor.record import GpuSample, HostSample, RankSample, Record, Traffic, to_line
from hybridpar.monitor.settings import DEFAULT_MAX_BYTES

BEGIN_S, STEP_S = 1_800_000_000.0, 0.1
EVALUATIONS = 1000
"""Steps from one to the next."""


@dataclass(frozen=True)
class Extremes:
    """What must be seen in the report of a long run, each of one step or sample."""

    step: int
    loss: float
    step_s: float
    occupancy: float


def lengthen(run: Path, to: Path, steps: int, monitor_bytes: int, gpus: int) -> Extremes:
    """Make the folder of a run that went on for ``steps`` steps under the plan of another one."""
    to.mkdir(parents=True, exist_ok=True)
    for name in ("plan.json", "profile.json", "cluster.yaml", "summary.json"):
        if (run / name).exists():
            shutil.copy(run / name, to)
    for path in (run / "timeline").glob("rank*.json"):
        _place(path, to / "timeline" / path.name, gpus)
    plan = json.loads((run / "plan.json").read_text())
    extremes = Extremes(step=steps * 2 // 3, loss=123.0, step_s=7.5, occupancy=0.015625)
    with (to / "metrics.jsonl").open("w") as file:
        file.writelines(_steps(steps, plan["global_batch"], extremes))
    with (to / "evaluations.jsonl").open("w") as file:
        for step in range(EVALUATIONS, steps + 1, EVALUATIONS):
            reached = 0.9 * (1 - math.exp(-step / steps))
            file.write(json.dumps({"step": step, "epoch": 0, "loss": 1.0, "top1": reached, "top5": 1.0}) + "\n")
    _write_monitor(to / "monitor.jsonl", steps * STEP_S, monitor_bytes, gpus, plan["world"], extremes)
    return extremes


def _place(timeline: Path, to: Path, gpus: int) -> None:
    """Copy a rank's timeline as that of one on a GPU which the monitor samples."""
    data = json.loads(timeline.read_text())
    placed = {**data, "host": "node0", "gpu": f"GPU-{data['rank'] % gpus}"}
    placed["epoch_s"] = BEGIN_S - data["steps"][0]["start_s"]
    to.parent.mkdir(exist_ok=True)
    to.write_text(json.dumps(placed))


def _steps(steps: int, samples: int, extremes: Extremes) -> Iterator[str]:
    for step in range(steps):
        odd = step == extremes.step
        record = {
            "step": step,
            "epoch": 0,
            "loss": extremes.loss if odd else math.exp(-3 * step / steps) + 0.01 * math.sin(step),
            "lr": 0.01,
            "samples": samples,
            "step_s": extremes.step_s if odd else STEP_S * (1 + 0.05 * math.sin(step / 3)),
            "samples_per_s": samples / STEP_S,
            "time_s": BEGIN_S + STEP_S * (step + 1),
            "plan": "0" * 12,
            "loss_scale": None,
            "skipped": False,
        }
        yield json.dumps(record) + "\n"


def _write_monitor(
    path: Path, length_s: float, most_bytes: int, gpus: int, world: int, extremes: Extremes
) -> None:
    """Write as many ticks as fit, evenly over the run, as a log that was thinned has them."""
    tick_bytes = sum(len(to_line(record)) for record in _tick(BEGIN_S + length_s, 0.5, gpus, world)) + 200
    ticks = max(most_bytes // tick_bytes, 2)
    with path.open("w") as file:
        for tick in range(ticks):
            occupancy = extremes.occupancy if tick == ticks // 3 else 0.6 + 0.2 * math.sin(tick / 40)
            time_s = BEGIN_S + length_s * tick / (ticks - 1)
            file.writelines(to_line(record) for record in _tick(time_s, occupancy, gpus, world))


def _tick(time_s: float, occupancy: float, gpus: int, world: int) -> Iterator[Record]:
    for gpu in range(gpus):
        yield GpuSample(
            time_s,
            "node0",
            gpu,
            f"GPU-{gpu}",
            utilisation=0.98,
            graphics_activity=0.96,
            sm_activity=0.9,
            occupancy=0.96 * occupancy,
            occupancy_while_busy=occupancy,
            tensor_activity=0.3,
            dram_activity=0.4,
            memory_used_bytes=20 * 2**30 + gpu,
            memory_total_bytes=80 * 2**30,
            sources={"utilisation": "nvml", "occupancy": "gpm"},
        )
    moved = int((time_s - BEGIN_S) * 1e7)
    yield HostSample(
        time_s,
        "node0",
        window_s=0.5,
        cpus=16,
        cpu_cores=4 + math.sin(time_s / 100),
        memory_used_bytes=2**33,
        memory_total_bytes=2**37,
        network={name: Traffic(moved, moved, 1e7, 1e7) for name in ("lo", "eth0")},
        ranks=tuple(RankSample(rank, 100 + rank, 0.9, 0.1, 2**30) for rank in range(world)),
        sampler_cpu_s=0.001 * (time_s - BEGIN_S),
        sources={"cpu_cores": "psutil"},
    )


def main() -> None:
    """Make the run, report on it, and print what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the folder of any run")
    parser.add_argument("--steps", type=int, default=10**6)
    parser.add_argument("--gpus", type=int, default=8)
    given = parser.parse_args()
    measure(given.run, given.steps, given.gpus)
    from scripts.bench.about import machine, software  # noqa: PLC0415 - its torch would count as the child's memory

    print(f"{machine()}; {software()}")


def measure(run: Path, steps: int, gpus: int) -> None:
    """Print sizes and what the report took; a child's peak begins at its parent's memory."""
    with tempfile.TemporaryDirectory() as made:
        folder, page = Path(made, "run"), Path(made, "report.html")
        lengthen(run, folder, steps, DEFAULT_MAX_BYTES, gpus)
        sizes = {p.name: p.stat().st_size / 2**20 for p in sorted(folder.glob("*.jsonl"))}
        print(", ".join(f"{name} {size:.1f} MiB" for name, size in sizes.items()))
        began_s = time.monotonic()
        subprocess.run(
            [sys.executable, "-m", "hybridpar", "report", str(folder), f"out={page}"],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        took_s, used = time.monotonic() - began_s, resource.getrusage(resource.RUSAGE_CHILDREN)
        print(
            f"report of {steps} steps: {took_s:.1f} s ({used.ru_utime + used.ru_stime:.1f} s of CPU), "
            f"at most {used.ru_maxrss / 2**10:.0f} MiB resident, page {page.stat().st_size / 1e6:.2f} MB"
        )


if __name__ == "__main__":
    main()
