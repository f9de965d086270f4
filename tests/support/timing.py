"""Timing the steps of ranks that are threads."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from hybridpar.planning.plan import Plan
from hybridpar.planning.program import Program
from hybridpar.report.course import Course
from hybridpar.report.timing import RankTiming, StepTiming, named
from hybridpar.runtime.communicators import ProcessGroups
from hybridpar.runtime.executor import Executor
from hybridpar.runtime.stopwatch import HostStopwatch
from tests.support.threads import run_ranks
from tests.support.training import Case, make_executor, run_step

Prepare = Callable[[int, Executor, HostStopwatch], None]
"""What a test does to a rank, its executor and its stopwatch before the first step."""


def recorded(
    plan: Plan, case: Case, programs: Sequence[Program], steps: int = 1, prepare: Prepare = lambda *_: None
) -> list[RankTiming]:
    """Run some steps on ranks that are threads; return the record of every rank."""

    def body(rank: int, groups: ProcessGroups) -> RankTiming:
        executor, timings = make_executor(case, plan, rank, groups), []
        replica, place = plan.locate(rank)
        for step in range(steps):
            watch = HostStopwatch()
            executor.observer, groups.completed = watch.note, watch.complete
            if step == 0:
                prepare(rank, executor, watch)
            run_step(case, programs[replica], place, executor, step)
            length_s = time.perf_counter() - watch.start_s
            actions, completions = watch.read()
            timings.append(
                StepTiming(step, len(case.data[step][0]), watch.start_s, length_s, actions, completions)
            )
        return RankTiming(rank, plan.world, plan.fingerprint, "cpu", 0.0, 0.0, tuple(timings))

    return run_ranks(plan, body)


def records_of(courses: Sequence[Course], plan: Plan) -> list[RankTiming]:
    """The records that ranks would have written, had they run as some courses of all plan replicas say."""
    begin_s = min(t.start_s for course in courses for actions in course.ranks for t in actions)
    result = []
    for actions in (actions for course in courses for actions in course.ranks):
        timed = tuple((*named(t.action), t.start_s - begin_s, t.end_s - begin_s) for t in actions)
        step = StepTiming(0, plan.global_batch, begin_s, timed[-1][-1], timed)
        result.append(RankTiming(len(result), plan.world, plan.fingerprint, "cpu", 0.0, 0.0, (step,)))
    return result
