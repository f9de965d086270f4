"""One rank of a measurement: trains a drawn plan for a few steps and writes down what it took.

Started by torchrun; joins the rank's cgroup before its first step.
``worker.py PLAN OUT WARM_UP STEPS ACTIONS OVERRIDE...``
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from hybridpar.config import Config, compose
from hybridpar.data import datasets
from hybridpar.planner import load_model
from hybridpar.planning.memory import memory
from hybridpar.planning.plan import Plan
from hybridpar.planning.program import Action, Program
from hybridpar.runtime.feed import Feed, StepBatch
from hybridpar.runtime.job import Job
from hybridpar.runtime.optimizer import make_factory
from hybridpar.runtime.process import Process
from hybridpar.schema import to_data
from scripts.bench.accuracy.live import LiveBytes, existing
from scripts.bench.accuracy.predict import label
from scripts.bench.cgroups import join_own
from scripts.bench.files import write_json

OBSERVED_STEPS = 2
"""Steps in which the actions are timed, after the timed steps."""

SETTLED_S = 0.005
"""After an action: the thread of a communication that is over still has to let go of its tensors."""


@dataclass(frozen=True)
class RankResult:
    """What one rank saw."""

    ends_s: tuple[float, ...]
    """When each step after the warm-up ended here, and first the warm-up itself; one clock for all processes."""
    cpu_s: float
    """This process's CPU seconds of the timed steps."""
    busy_cpu_s: float
    """CPU seconds of the whole machine meanwhile."""
    resident_bytes: int
    """Peak of the resident set above the baseline: model imported and traced, process groups connected."""
    live_bytes: int
    """Peak of the tensors alive between two actions."""
    actions_s: dict[str, float]
    """Seconds of a step by kind of action, as in the predictions; empty unless asked for."""


def measure(config: Config, plan_file: Path, out: Path, warm_up: int, steps: int, *, actions: bool) -> None:
    """Train, and write ``rankN.json`` and ``liveN.tsv``, the bytes of tensors alive after every action."""
    process = Process("cpu", config.train.timeout_s)
    traced, source = load_model(config)
    plan = Plan.load(plan_file, traced.chain)
    data = datasets.load(config.data, traced.chain.in_shape, traced.chain.classes).train
    communicators = process.connect(plan)
    before = existing()
    factory = make_factory(config.optimizer)
    job = Job(plan, traced, source, factory, communicators, rank=process.rank, device=process.device)
    feed = job.loader(data, drop_last=True)
    batches = _batches(feed)
    process.gather(None)
    join_own()  # starting up is not measured, and need not be slow
    for _ in range(warm_up):
        job.step(next(batches))
    ends_s, cpu_s, busy_s = [time.perf_counter()], time.process_time(), _busy_cpu_s()
    for _ in range(steps):
        job.step(next(batches))
        ends_s.append(time.perf_counter())
    cpu_s, busy_s = time.process_time() - cpu_s, _busy_cpu_s() - busy_s
    resident_bytes = job.memory_bytes()
    observed = _observed(job, batches) if actions else {}
    live = _live(job, batches, set(before))
    (out / f"live{process.rank}.tsv").write_text(_compared(job.program(), job.place, live))
    result = RankResult(tuple(ends_s), cpu_s, busy_s, resident_bytes, max(live), observed)
    write_json(out / f"rank{process.rank}.json", to_data(result))
    process.gather(None)
    process.close()


def _batches(feed: Feed) -> Iterator[StepBatch]:
    while True:
        yield from feed


def _busy_cpu_s() -> float:
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - times.iowait)


def _observed(job: Job, batches: Iterator[StepBatch]) -> dict[str, float]:
    """Return the seconds of a step by kind of action."""
    total: dict[str, float] = defaultdict(float)

    def note(program: Program, action: Action, start_s: float, end_s: float) -> None:
        total[label(program, action)] += (end_s - start_s) / OBSERVED_STEPS

    job.observe(note)
    for _ in range(OBSERVED_STEPS):
        job.step(next(batches))
    job.observe(None)
    return dict(total)


def _live(job: Job, batches: Iterator[StepBatch], apart: set[int]) -> list[int]:
    """Return the bytes of tensors alive after every action of a step."""
    seen: list[int] = []

    def note(program: Program, action: Action, start_s: float, end_s: float) -> None:
        del program, action, start_s, end_s
        time.sleep(SETTLED_S)
        seen.append(live.bytes())

    job.observe(note)
    with LiveBytes(apart) as live:
        job.step(next(batches))
    job.observe(None)
    return seen


def _compared(program: Program, rank: int, live: list[int]) -> str:
    """Return a line per action with the predicted and the measured bytes after it."""
    rows = zip(program.actions[rank], memory(program, rank).alive, live, strict=True)
    lines = [f"{counted}\t{seen}\t{program.describe(a)}" for a, counted, seen in rows]
    return "\n".join(["predicted\tmeasured\tafter", *lines, ""])


def main() -> None:
    """Measure what the command line says."""
    plan, out, warm_up, steps, actions, *overrides = sys.argv[1:]
    config = compose(overrides)
    measure(config, Path(plan), Path(out), int(warm_up), int(steps), actions=bool(int(actions)))


if __name__ == "__main__":
    main()
