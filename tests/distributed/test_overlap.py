"""Overlap is real: what a rank computes does not end before communication of others, or an update, has happened.

No test looks at a clock. A computation is held until what is to lie under it is over; where it could not, the held
rank gives up. The recorded timeline then has to tell the same.
"""

from __future__ import annotations

import itertools
import threading
from dataclasses import replace
from functools import cache

import pytest

from hybridpar.planning.check import check
from hybridpar.planning.compile import compile as compile_program
from hybridpar.planning.plan import Plan, Segment, Stage
from hybridpar.planning.program import Action, Operation, Program
from hybridpar.report.course import Course, measured
from hybridpar.report.overlap import overlap
from hybridpar.report.timing import RankTiming, load
from hybridpar.runtime.executor import Executor
from hybridpar.runtime.stopwatch import HostStopwatch
from tests.support.plans import make_plan
from tests.support.timing import recorded
from tests.support.training import Case, make_case

LAYERS, PATIENCE_S = 16, 30.0


@cache
def case() -> Case:
    return make_case(steps=2, samples=12)


def data_parallel() -> Plan:
    front = Stage("front", 6, (Segment((0, LAYERS), (0, 1)),))
    return make_plan(case().traced.chain, front, world=2, global_batch=12, bucket_bytes=1)


def pipeline() -> Plan:
    middle = Stage("middle", 4, (Segment((0, 6), (0,)), Segment((6, LAYERS), (1,))))
    return make_plan(case().traced.chain, middle, world=2, global_batch=12, order="fill_drain")


def three_stages() -> Plan:
    front = Stage("front", 3, (Segment((0, 4), (0, 1)),))
    middle = Stage("middle", 4, (Segment((4, 9), (2,)),))
    tail = Stage("tail", 6, (Segment((9, LAYERS), (1, 2)),), ("column", "row", "column"))
    return make_plan(case().traced.chain, front, middle, tail, world=3, global_batch=12, bucket_bytes=1)


def replicas() -> Plan:
    return replace(pipeline(), world=4, replicas=2, replica_shares=(2.0, 1.0))


def programs_of(plan: Plan) -> list[Program]:
    made = [compile_program(plan, case().traced.chain, 12, "train", k) for k in range(plan.replicas)]
    for program in made:
        check(program)
    return made


def hold(executor: Executor, kind: str, key: tuple[int, int], until: threading.Event) -> None:
    """Let a computation of a rank end only after something else."""
    compute = getattr(executor, f"_{kind}")

    def held(state: object, at: tuple[int, int]) -> None:
        compute(state, at)
        if at == key:
            assert until.wait(PATIENCE_S), f"{kind} {key} hides nothing"

    setattr(executor, f"_{kind}", held)


def key_of(action: Action) -> tuple[int, int]:
    assert action.block is not None
    assert action.micro_batch is not None
    return action.block, action.micro_batch


def last(program: Program, rank: int, kind: str) -> Action:
    return [a for a in program.actions[rank] if a.kind == kind][-1]


def course_of(records: list[RankTiming], programs: list[Program]) -> Course:
    return measured(programs, records)[0][0]


def test_buckets_are_reduced_while_backward_goes_on() -> None:
    plan = data_parallel()
    programs = programs_of(plan)
    first = next(o for o in programs[0].operations if o.content == "bucket" and o.block)
    held = key_of(last(programs[0], 0, "backward"))

    reduced, heard = threading.Event(), set()

    def prepare(rank: int, executor: Executor, watch: HostStopwatch) -> None:
        hold(executor, "backward", held, reduced)
        complete = watch.complete

        def told(operation: Operation) -> None:
            complete(operation)
            if operation.index == first.index:
                heard.add(rank)
            if heard == {0, 1}:
                reduced.set()

        executor.communicators.completed = told  # type: ignore[attr-defined]

    course = course_of(recorded(plan, case(), programs, prepare=prepare), programs)
    found = overlap(course).buckets
    assert found.overlapped >= 2, "the first bucket of either rank"
    assert found.hidden_s > 0
    (flight,) = [f for f in course.flights if f.operation == first.index]
    assert all(flight.end_s < t.end_s for _, t in course.of("backward") if key_of(t.action) == held)


def test_an_exchange_arrives_while_the_next_micro_batch_computes() -> None:
    plan = pipeline()
    programs, arrived = programs_of(plan), threading.Event()
    sends = [o for o in programs[0].operations if o.kind == "send" and o.content == "activation"]

    def prepare(rank: int, executor: Executor, watch: HostStopwatch) -> None:
        if rank == 0:
            hold(executor, "forward", (0, 1), arrived)
            return

        def note(program: Program, action: Action, start_s: float, end_s: float) -> None:
            watch.note(program, action, start_s, end_s)
            if action.kind == "wait" and action.operation == sends[0].index:
                arrived.set()

        executor.observer = note

    course = course_of(recorded(plan, case(), programs, prepare=prepare), programs)
    (flight,) = [f for f in course.flights if f.operation == sends[0].index]
    (following,) = [t for r, t in course.of("forward") if r == 0 and t.action.micro_batch == 1]
    assert flight.end_s < following.end_s
    found = overlap(course)
    assert found.exchanges.overlapped >= 1
    assert found.early_receives >= 1, "the receive of micro-batch 1 is posted before the wait for micro-batch 0"
    assert found.receives == sum(o.kind == "send" for o in programs[0].operations)


def test_a_stage_updates_while_another_one_goes_backward() -> None:
    plan = pipeline()
    programs, updated = programs_of(plan), threading.Event()

    def prepare(rank: int, executor: Executor, watch: HostStopwatch) -> None:
        if rank == 0:
            hold(executor, "backward", key_of(last(programs[0], 0, "backward")), updated)
            return

        def note(program: Program, action: Action, start_s: float, end_s: float) -> None:
            watch.note(program, action, start_s, end_s)
            if action.kind == "update":
                updated.set()

        executor.observer = note

    found = overlap(course_of(recorded(plan, case(), programs, prepare=prepare), programs))
    assert (found.updates, found.early_updates) == (2, 1)


@pytest.mark.parametrize("make", [data_parallel, pipeline, three_stages, replicas])
def test_a_record_holds_the_program(make, tmp_path) -> None:  # type: ignore[no-untyped-def]
    plan = make()
    programs = programs_of(plan)
    records = recorded(plan, case(), programs, steps=2)
    for record in records:
        record.save(tmp_path)
    assert load(tmp_path, plan.world, plan.fingerprint) == tuple(records)
    (courses,) = measured(programs, records)  # the first of two steps is left out
    for program, course in zip(programs, courses, strict=True):
        assert [[t.action for t in own] for own in course.ranks] == [list(own) for own in program.actions]
        assert {f.operation for f in course.flights} == {o.index for o in program.operations if not o.alone}
        assert all(0 <= f.start_s <= f.end_s for f in course.flights)
        for own in course.ranks:
            assert all(a.end_s <= b.start_s for a, b in itertools.pairwise(own))
        starts = {t.action.operation: t.start_s for _, t in course.of("start")}
        assert all(f.start_s >= starts[f.operation] for f in course.flights)


def test_a_step_across_replicas_is_in_flight_once_all_have_started_it() -> None:
    plan = replicas()
    programs = programs_of(plan)
    (courses,) = measured(programs, recorded(plan, case(), programs))
    for operation in (o for o in programs[0].operations if o.across):
        other = next(o for o in programs[1].operations if o.across and o.place == operation.place)
        one, two = (
            next(f for f in c.flights if f.operation == o.index)
            for c, o in zip(courses, (operation, other), strict=True)
        )
        assert (one.start_s, one.end_s) == (two.start_s, two.end_s)


def test_records_of_another_plan_or_world_are_not_taken(tmp_path) -> None:  # type: ignore[no-untyped-def]
    plan = pipeline()
    for record in recorded(plan, case(), programs_of(plan)):
        record.save(tmp_path)
    assert len(load(tmp_path, 2, plan.fingerprint)) == 2
    assert load(tmp_path, 2, three_stages().fingerprint) == ()
    assert load(tmp_path, 3, plan.fingerprint) == ()
