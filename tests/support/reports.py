"""A run as a report reads it, without a training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

from hybridpar.cluster.topology import Cluster, Device, Link, Node
from hybridpar.monitor.record import Record
from hybridpar.planning.compile import compile as compile_program
from hybridpar.planning.costs import Costs
from hybridpar.planning.plan import Plan, Segment, Stage
from hybridpar.planning.simulate import predict as predict_step
from hybridpar.profiling.analytic import estimate
from hybridpar.report.basis import Basis
from hybridpar.report.comparison import predict, programs_of
from hybridpar.report.course import Course, Timed
from hybridpar.report.history import Evaluated, Evaluations, Step, Steps
from hybridpar.report.recording import Recording
from hybridpar.report.run import Run
from hybridpar.report.summary import GpuUse, Summary
from hybridpar.report.thinning import Point
from tests.support.plans import make_plan
from tests.support.recordings import BEGIN_S, gpu_samples, host_samples, in_turns, uuid_of
from tests.support.timing import records_of
from tests.support.training import make_case

CHAIN = make_case().traced.chain
SLOWER = 1.5
"""Measured over predicted."""
STEP_S = 0.1
"""Of the training beside a recording."""


@cache
def basis() -> Basis:
    device = Device("paper", 2e9, {"float64": 1e9, "float32": 1e9}, 1e9, 1e-5)
    cluster = Cluster("paper", device, (Node(2),) * 2, {"node": Link(1e-5, 1e8), "rack": Link(3e-5, 2e7)})
    return Basis(CHAIN, estimate(CHAIN, device, "float64"), cluster)


def plan_of() -> Plan:
    """Front on ranks 0 and 1, middle on 2, tail on 1 and 3."""
    cut = CHAIN.tail_start
    front = Stage("front", 3, (Segment((0, 4), (0, 1)),))
    middle = Stage("middle", 4, (Segment((4, cut), (2,)),))
    tail = Stage("tail", 6, (Segment((cut, len(CHAIN.layers)), (1, 3)),), ("column", "row", "column"))
    plan = make_plan(CHAIN, front, middle, tail, world=4, global_batch=24, bucket_bytes=1)
    program = compile_program(plan, CHAIN, 24, "train")
    return replace(plan, prediction=predict_step(program, Costs(basis().profile, basis().cluster)))


def run_of(name: str = "demo", steps: int = 40) -> Run:
    """A run in which everything took longer than predicted by one factor."""
    plan = plan_of()
    bare = Run(Path(name), plan, basis(), Steps.of(()), Evaluations.of(()), None, ())
    courses = [_slower(course) for course in predict(programs_of(bare, basis()), basis())]
    assert plan.prediction is not None
    return replace(
        bare,
        steps=Steps.of(Step(i, math.exp(-i / 20), 24, SLOWER * plan.prediction.step_s) for i in range(steps)),
        evaluations=Evaluations.of((Evaluated(steps // 2, 0.5, 0.6), Evaluated(steps, 0.2, 0.9))),
        summary=summary_of(name, plan, steps),
        timings=tuple(records_of(courses, plan)),
    )


def _slower(course: Course) -> Course:
    ranks = tuple(
        tuple(Timed(t.action, SLOWER * t.start_s, SLOWER * t.end_s) for t in own) for own in course.ranks
    )
    return replace(course, ranks=ranks, length_s=SLOWER * course.length_s)


def summary_of(name: str, plan: Plan, steps: int) -> Summary:
    return Summary(
        model=plan.model,
        data="paper",
        run_dir=name,
        seed=0,
        precision=plan.precision,
        device="cpu",
        world=plan.world,
        global_batch=plan.global_batch,
        epochs=1,
        steps=steps,
        train_loss=0.1,
        test_accuracy=0.9,
        test_top5=1.0,
        test_loss=0.2,
        test_samples=100,
        samples_per_s=None,
        measured_step_s=None,
        predicted_step_s=None,
        measured_memory_bytes=(2**20, 2 * 2**20, 3 * 2**20, 4 * 2**20),
        predicted_memory_bytes=(2**20,) * 4,
        prediction_source="estimated",
        stages=(),
        gpu=GpuUse(reason="none"),
        total_s=1.0,
    )


def ends(steps: int = 100) -> tuple[Point, ...]:
    """The steps of a training that began with the recording."""
    return Steps.of(Step(i, 1.0, 24, STEP_S, BEGIN_S + STEP_S * (i + 1)) for i in range(steps)).ends


def on_gpus(run: Run) -> Run:
    """The ranks of a run on GPUs of one node, two on each."""
    timings = tuple(replace(t, host="node0", gpu=uuid_of(t.rank // 2), device="cuda") for t in run.timings)
    return replace(run, timings=timings, recording=recorded(in_turns(gpu_samples(60), host_samples(60, range(4)))))


def recorded(records: Sequence[Record]) -> Recording:
    found = Recording.of(records, ends())
    assert found is not None
    return found


def folder_of(folder: Path) -> Path:
    """Write a run's folder, which has no steps yet, and has ended."""
    run = run_of()
    folder.mkdir()
    (folder / "metrics.jsonl").touch()
    (folder / "plan.json").write_text(run.plan.to_json())
    basis().save(folder)
    assert run.summary is not None
    run.summary.save(folder / "summary.json")
    for record in run.timings:
        record.save(folder)
    return folder
