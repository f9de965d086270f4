"""Runs as the simulation would leave them, planned as a user asks, for what is advised about them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from hybridpar.config import Config, compose
from hybridpar.monitor.record import GpuSample, to_line
from hybridpar.planner import Shelf, Subject, make_plan
from hybridpar.planning.plan import Plan
from hybridpar.report.basis import Basis
from hybridpar.report.comparison import predict, programs_of
from hybridpar.report.history import Evaluations, Step, Steps
from hybridpar.report.run import Run
from tests.support.reports import summary_of
from tests.support.timing import records_of

ASKED = (
    "model=small_vgg",
    "model.options={width: 4, classifier_width: 32}",
    "cluster=v100_2x8",
    "cluster.nodes=[{devices: 2, count: 2}]",
    "train.global_batch=64",
)
SHELF = Shelf()


def planned(*overrides: str) -> tuple[Config, Subject, Plan]:
    """Plan as the command line does."""
    effort = [] if "plan=from_file" in overrides else ["plan.effort=quick"]
    config = compose([*ASKED, *effort, *overrides])
    subject = SHELF.prepare(config)
    return config, subject, make_plan(config, subject).plan


def simulated_run(folder: Path, *overrides: str) -> Run:
    """A run that went exactly as predicted, with its timeline."""
    config, subject, plan = planned(*overrides)
    (folder / "config.yaml").write_text(config.resolved)
    basis = Basis(subject.chain, subject.profile, subject.cluster)
    bare = Run(folder, plan, basis, Steps.of(()), Evaluations.of(()), None, ())
    courses = predict(programs_of(bare, basis), basis)
    assert plan.prediction is not None
    step_s = plan.prediction.step_s
    steps = Steps.of(Step(i, 1.0, plan.global_batch, step_s) for i in range(20))
    return replace(bare, steps=steps, timings=tuple(records_of(courses, plan)))


def summarised(run: Run, share: float) -> Run:
    """The run at its end, every rank having used a share of its memory."""
    assert run.basis is not None
    used = tuple(round(share * run.basis.cluster.memory_bytes(r)) for r in range(run.plan.world))
    return replace(run, summary=replace(summary_of(run.name, run.plan, 20), measured_memory_bytes=used))


def waiting_for_samples(run: Run, share: float, read_s: float | None) -> Run:
    """The run with reading ranks that wait for a share of a step as predicted; a core reads so many samples/s."""
    assert run.basis is not None
    assert run.steps.step_s is not None
    wait_s = share * run.steps.step_s
    timings = tuple(replace(r, steps=tuple(replace(s, input_s=wait_s) for s in r.steps)) for r in run.timings)
    profile = replace(run.basis.profile, loader_samples_per_s=read_s, data="digits")
    return replace(run, timings=timings, basis=replace(run.basis, profile=profile))


def on_gpus(run: Run) -> Run:
    """The run with a GPU for each rank, whose clock began 1000 s after the epoch."""
    timings = (replace(r, host="a", gpu=f"GPU-{r.rank}", epoch_s=1000.0) for r in run.timings)
    return replace(run, timings=tuple(timings))


def sampled(run: Run, **figures: Any) -> None:
    """Write ten samples of every GPU into the run's folder; of GPU i the i-th where figures are lists."""
    lines = []
    for rank in range(run.plan.world):
        own = {name: v[rank] if isinstance(v, list) else v for name, v in figures.items()}
        sources = dict.fromkeys(own, "gpm")
        lines += [
            to_line(GpuSample(2000.0 + i, "a", rank, f"GPU-{rank}", window_s=1.0, sources=sources, **own))
            for i in range(10)
        ]
    (run.folder / "monitor.jsonl").write_text("".join(lines))
