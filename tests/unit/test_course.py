"""Predicted and measured courses of a step: one form, and what is read off them."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from functools import cache

import pytest

from hybridpar.cluster.topology import Cluster, Device, Link, Node
from hybridpar.errors import RecordError
from hybridpar.planning.compile import compile as compile_program
from hybridpar.planning.costs import Costs
from hybridpar.planning.plan import Plan, Segment, Stage
from hybridpar.planning.program import Action, Program
from hybridpar.planning.simulate import simulate
from hybridpar.planning.timeline import Flight
from hybridpar.profiling.analytic import estimate
from hybridpar.report import shares
from hybridpar.report.course import Course, Timed, measured, simulated, typical
from hybridpar.report.deviation import deviations
from hybridpar.report.overlap import covered, overlap
from hybridpar.report.timing import RankTiming, StepTiming, load, path_of
from tests.support.plans import make_plan
from tests.support.timing import records_of
from tests.support.training import make_case

CHAIN = make_case().traced.chain
LAYERS = len(CHAIN.layers)


def cluster_of(cores: int | None = None) -> Cluster:
    device = Device("paper", 2e9, {"float64": 1e9, "float32": 1e9}, 1e9, 1e-5)
    links = {"node": Link(1e-5, 1e8), "rack": Link(3e-5, 2e7)}
    return Cluster("paper", device, (Node(2, cores=cores),) * 2, links)


@cache
def plan_of(replicas: int = 1) -> Plan:
    """Front on ranks 0 and 1, middle on 2, tail on 1 and 3; or of each replica on two ranks."""
    cut = CHAIN.tail_start
    if replicas == 2:
        middle = Stage("middle", 4, (Segment((0, 6), (0,)), Segment((6, LAYERS), (1,))))
        return make_plan(CHAIN, middle, world=4, global_batch=24, replicas=2, replica_shares=(2.0, 1.0))
    front = Stage("front", 3, (Segment((0, 4), (0, 1)),))
    middle = Stage("middle", 4, (Segment((4, cut), (2,)),))
    tail = Stage("tail", 6, (Segment((cut, LAYERS), (1, 3)),), ("column", "row", "column"))
    return make_plan(CHAIN, front, middle, tail, world=4, global_batch=24, bucket_bytes=1)


def predicted(plan: Plan, cores: int | None = None) -> list[Course]:
    costs = Costs(estimate(CHAIN, cluster_of().device, "float64"), cluster_of(cores))
    programs = [compile_program(plan, CHAIN, plan.global_batch, "train", k) for k in range(plan.replicas)]
    return [simulated(program, simulate(program, costs)) for program in programs]


@pytest.mark.parametrize("cores", [None, 1])
@pytest.mark.parametrize("replicas", [1, 2])
def test_a_simulated_course_leaves_no_time_out(replicas: int, cores: int | None) -> None:
    """In the steady state a rank computes or waits; cores that ranks share are simulated by events."""
    for course in predicted(plan_of(replicas), cores):
        for own, share in zip(course.ranks, shares.by_rank(course), strict=True):
            assert all(a.end_s <= b.start_s + 1e-12 for a, b in itertools.pairwise(own))
            assert share.busy_s + share.waiting_s == pytest.approx(course.length_s)
            assert share.rest_s == pytest.approx(0.0, abs=1e-9)
        ends = {f.operation: f.end_s for f in course.flights}
        waits = [t for _, t in course.of("wait") if t.action.operation in ends]
        assert all(t.end_s >= ends[t.action.operation] - 1e-12 for t in waits)


def test_a_simulated_course_draws_as_the_simulation() -> None:
    (course,) = predicted(plan_of())
    costs = Costs(estimate(CHAIN, cluster_of().device, "float64"), cluster_of())
    timeline = simulate(course.program, costs)
    assert sorted(course.timeline.spans, key=repr) == sorted(timeline.spans, key=repr)
    assert course.timeline.period_s == pytest.approx(timeline.period_s)


@pytest.mark.parametrize("replicas", [1, 2])
def test_what_ran_as_predicted_is_measured_as_predicted(replicas: int) -> None:
    plan = plan_of(replicas)
    expected = predicted(plan)
    (found,) = measured([c.program for c in expected], records_of(expected, plan))
    for one, two in zip(expected, found, strict=True):
        assert [share.busy_s for share in shares.by_rank(two)] == pytest.approx(
            [share.busy_s for share in shares.by_rank(one)]
        )
        for a, b in zip(shares.by_stage(one), shares.by_stage(two), strict=True):
            assert b.seconds == pytest.approx(a.seconds)
    assert max(abs(d.difference_s) for d in deviations(expected, [found])) == pytest.approx(0.0, abs=1e-9)


def test_the_action_that_took_longer_is_named_first() -> None:
    plan = plan_of()
    (course,) = predicted(plan)
    at = [
        (rank, i)
        for rank, own in enumerate(course.ranks)
        for i, t in enumerate(own)
        if t.action.kind == "backward"
    ]
    rank, number = at[len(at) // 2]
    slow = [list(own) for own in course.ranks]
    action, start_s, end_s = slow[rank][number]
    slow[rank][number] = Timed(action, start_s, end_s + 7.0)
    (first, *_) = deviations([course], [[replace(course, ranks=tuple(map(tuple, slow)))]])
    assert (first.rank, first.kind, first.micro_batch) == (rank, "backward", action.micro_batch)
    assert first.name == course.program.describe(action)
    assert first.difference_s == pytest.approx(7.0)
    assert first.predicted_s == pytest.approx(end_s - start_s)
    assert first.stage is not None
    assert first.stage in first.name.replace(".", " ")


def test_clocks_of_hosts_are_put_together() -> None:
    plan = plan_of()
    expected = predicted(plan)
    programs, records = [c.program for c in expected], records_of(expected, plan)
    moved = [
        replace(
            r,
            offset_s=-100.0 * r.rank,
            steps=tuple(replace(s, start_s=s.start_s + 100.0 * r.rank) for s in r.steps),
        )
        for r in records
    ]
    (one,), (two,) = measured(programs, records)[0], measured(programs, moved)[0]
    for a, b in zip(one.flights, two.flights, strict=True):
        assert b == Flight(a.operation, pytest.approx(a.start_s), pytest.approx(a.end_s))  # type: ignore[arg-type]


def test_the_first_recorded_step_counts_only_where_it_is_alone_and_partial_ones_never() -> None:
    plan = plan_of()
    expected = predicted(plan)
    programs, records = [c.program for c in expected], records_of(expected, plan)

    def with_steps(*sizes: int) -> list[RankTiming]:
        return [
            replace(
                r,
                steps=tuple(
                    replace(r.steps[0], step=k, samples=n, start_s=10.0 * k, length_s=1.0 + k)
                    for k, n in enumerate(sizes)
                ),
            )
            for r in records
        ]

    assert len(measured(programs, with_steps(24))) == 1
    assert measured(programs, with_steps(7)) == ()
    courses = measured(programs, with_steps(24, 24, 24, 24, 7))
    assert [step[0].length_s for step in courses] == pytest.approx([11.0, 11.0, 11.0])
    assert typical(courses) is courses[0]
    assert measured(programs, with_steps(7, 24, 24))[0][0].length_s == pytest.approx(11.0)


def test_a_record_of_other_actions_is_refused() -> None:
    plan = plan_of()
    expected = predicted(plan)
    records = records_of(expected, plan)
    step = records[2].steps[0]
    records[2] = replace(records[2], steps=(replace(step, actions=step.actions[1:]),))
    with pytest.raises(
        RecordError, match=r"timeline of rank 2, step 0: its .* actions are not those of the run's plan"
    ):
        measured([c.program for c in expected], records)


# Overlap, on steps made by hand


def by_hand(
    program: Program, times: dict[tuple[int, int], tuple[float, float]], flights: tuple[Flight, ...]
) -> Course:
    """A course in which all actions take no time at 0, apart from some, by rank and number."""
    ranks = tuple(
        tuple(Timed(a, *times.get((rank, i), (0.0, 0.0))) for i, a in enumerate(actions))
        for rank, actions in enumerate(program.actions)
    )
    return Course(program, ranks, flights, 10.0)


def find(program: Program, rank: int, kind: str, **fields: int) -> tuple[int, int]:
    own: list[tuple[int, Action]] = list(enumerate(program.actions[rank]))
    return rank, next(i for i, a in own if a.kind == kind and all(getattr(a, k) == v for k, v in fields.items()))


def test_time_under_intervals() -> None:
    assert covered(1.0, 5.0, [(0.0, 2.0), (3.0, 4.0), (4.5, 9.0)]) == pytest.approx(1.0 + 1.0 + 0.5)
    assert covered(1.0, 5.0, []) == 0


def test_buckets_under_backward_by_hand() -> None:
    program = compile_program(plan_of(), CHAIN, 24, "train")
    bucket = next(o for o in program.operations if o.content == "bucket")
    rank = bucket.ranks[0]
    times = {
        find(program, rank, "start", operation=bucket.index): (1.0, 1.0),
        find(program, rank, "backward"): (2.0, 5.0),
    }
    found = overlap(by_hand(program, times, (Flight(bucket.index, 1.5, 4.0),))).buckets
    assert (found.count, found.overlapped) == (2, 1), "the bucket's other rank goes backward at no time"
    assert found.seconds == pytest.approx((4.0 - 1.0) + 4.0)
    assert found.hidden_s == pytest.approx(4.0 - 2.0)
    assert found.share == pytest.approx(2.0 / 7.0)


def test_exchanges_under_other_computation_by_hand() -> None:
    """The sender's own micro-batch hides nothing: what is sent is its result."""
    program = compile_program(plan_of(2), CHAIN, 24, "train")
    sent = next(o for o in program.operations if o.kind == "send" and o.content == "activation")
    assert sent.transfer is not None
    own = sent.transfer.source_micro_batch
    times = {
        find(program, 0, "forward", micro_batch=own): (0.0, 3.0),
        find(program, 0, "forward", micro_batch=own + 1): (3.0, 5.0),
        find(program, 1, "forward", micro_batch=own): (4.0, 6.0),
        find(program, 0, "start", operation=sent.index): (2.0, 2.0),
        find(program, 1, "start", operation=sent.index): (0.5, 0.5),
    }
    found = overlap(by_hand(program, times, (Flight(sent.index, 2.0, 8.0),)))
    assert (found.exchanges.count, found.exchanges.overlapped) == (1, 1)
    assert found.exchanges.hidden_s == pytest.approx(3.0)
    assert found.exchanges.share == pytest.approx(0.5)
    assert found.early_receives == 1


def test_updates_before_the_last_backward_by_hand() -> None:
    program = compile_program(plan_of(2), CHAIN, 24, "train")
    times = {
        find(program, 1, "update"): (2.0, 3.0),
        find(program, 0, "backward"): (1.0, 4.0),
        find(program, 0, "update"): (5.0, 6.0),
    }
    found = overlap(by_hand(program, times, ()))
    assert (found.updates, found.early_updates) == (2, 1)
    assert found.buckets.share is None


# The record


def record(**fields: object) -> RankTiming:
    step = StepTiming(3, 24, 5.0, 1.0, (("forward", 0, 1, None, 0.1, 0.4),), ((7, 0.2),))
    return replace(RankTiming(0, 1, "abc", "cpu", 0.5, 0.1, (step,)), **fields)  # type: ignore[arg-type]


def test_a_record_is_read_as_it_was_written(tmp_path) -> None:  # type: ignore[no-untyped-def]
    assert load(tmp_path, 1, "abc") == ()
    record().save(tmp_path)
    assert load(tmp_path, 1, "abc") == (record(),)
    assert [p.name for p in path_of(tmp_path, 0).parent.iterdir()] == ["rank0.json"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"schema": 9}, "schema 9 is not 1"),
        ({"rank": 4}, "rank 4 is not below the world of 1"),
        ({"offset_s": "none"}, r"rank0.json.offset_s: expected float, got 'none'"),
        ({"steps": [{"step": 1}]}, r"rank0.json.steps\[0\].samples: missing"),
        ({"colour": 1}, "colour: unknown field"),
    ],
)
def test_a_malformed_record_is_refused_by_field(change, said, tmp_path) -> None:  # type: ignore[no-untyped-def]
    path = record().save(tmp_path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(RecordError, match=said):
        load(tmp_path, 1, "abc")


def test_an_action_that_ends_before_it_starts_is_refused() -> None:
    with pytest.raises(RecordError, match=r"step 3: action 0 \(forward\) runs from 0.4 to 0.1 s"):
        StepTiming(3, 24, 5.0, 1.0, (("forward", 0, 1, None, 0.4, 0.1),))
