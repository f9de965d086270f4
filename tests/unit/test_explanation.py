"""Why a plan: the split of its time, the five axes, where the answer flips, neighbouring micro-batches."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from hybridpar.cluster.topology import Cluster, Link, Node
from hybridpar.planning import explanation
from hybridpar.planning.axes import SLOWER, axes
from hybridpar.planning.check import check
from hybridpar.planning.compile import compile as compile_program
from hybridpar.planning.costs import Costs
from hybridpar.planning.explain import in_few_words, rivals
from hybridpar.planning.explanation import explain
from hybridpar.planning.flips import Direction, Flip, crossing, flips, resized
from hybridpar.planning.microbatches import micro_batch_effects
from hybridpar.planning.plan import Plan, Segment, Stage
from hybridpar.planning.request import Shape
from hybridpar.planning.search import Candidate, Planned, assess
from hybridpar.planning.simulate import simulate
from hybridpar.planning.sizes import usual_sizes
from hybridpar.planning.timesplit import StageTime, TimeSplit, split_time
from hybridpar.planning.trial import Trials, with_bandwidth, with_speeds
from tests.support.paper import BACKWARD_S, FORWARD_S, chain_of, cluster_of, profile_of, trials_of
from tests.support.plans import make_plan, random_plan, random_samples

BOTH_S = FORWARD_S + BACKWARD_S
NARROW = chain_of(1000, 1, 1000)
"""Much to reduce, and one element to hand over in the middle."""
GRADIENT_BYTES = 8 * (1000 + 1 + 1000 + 1000)


def data_parallel(batch: int, ranks: int = 2) -> Plan:
    stage = Stage("front", -(-batch // ranks), (Segment((0, 2), tuple(range(ranks))),))
    return make_plan(NARROW, stage, world=ranks, global_batch=batch)


def pipeline(batch: int, micro_batch: int) -> Plan:
    segments = Segment((0, 1), (0,)), Segment((1, 2), (1,))
    return make_plan(NARROW, Stage("middle", micro_batch, segments), world=2, global_batch=batch)


def planned_of(trials: Trials, chosen: Shape, *plans: tuple[Shape, Plan]) -> Planned:
    """A result of the search that never took place."""
    found = [Candidate(shape, assess(plan, trials.chain, trials.profile, trials.cluster)) for shape, plan in plans]
    plan = next(c.plan for c in found if c.shape == chosen)
    assert plan is not None
    return Planned(plan, chosen, tuple(found), len(found))


def duel(cluster: Cluster, batch: int = 2, chosen: Shape = "data_parallel") -> tuple[Trials, Planned]:
    """Data parallelism, which takes 6 s for the samples of a rank, against a pipeline, 6 s for each sample."""
    trials = trials_of(NARROW, cluster)
    both: tuple[tuple[Shape, Plan], ...] = (
        ("data_parallel", data_parallel(batch)),
        ("pipeline", pipeline(batch, batch)),
    )
    return trials, planned_of(trials, chosen, *both)


def split_of(trials: Trials, plan: Plan) -> TimeSplit:
    program = trials.program(plan)
    return split_time(program, trials.timeline(program))


# The split of the time


def test_data_parallel_ranks_wait_for_their_reduction() -> None:
    seconds = 10.0
    trials = trials_of(NARROW, cluster_of(2, GRADIENT_BYTES / seconds), update_s_per_byte=1e-3)
    split = split_of(trials, data_parallel(2))
    for own in split.ranks:
        (time,) = own
        assert time.compute_s == pytest.approx(2 * BOTH_S)
        assert time.update_s == pytest.approx(GRADIENT_BYTES * 1e-3)
        assert time.exposed_s == pytest.approx(seconds, rel=0.01)
        assert time.bubble_s == pytest.approx(0.0, abs=1e-9)


def test_segments_of_a_pipeline_wait_for_each_other() -> None:
    """With one micro-batch one of two ranks is at work at any time."""
    split = split_of(trials_of(NARROW, cluster_of(2)), pipeline(1, 1))
    for own in split.ranks:
        (time,) = own
        assert (time.compute_s, time.bubble_s) == pytest.approx((BOTH_S, BOTH_S))
        assert time.exposed_s == pytest.approx(0.0, abs=1e-9)


def test_a_message_in_flight_is_exposed_what_precedes_it_is_bubble() -> None:
    """Rank 1 waits 6 s for the next activation: 5 s until it is there to be sent, and 1 s on the wire."""
    seconds = 1.0
    split = split_of(trials_of(NARROW, cluster_of(2, 8 / seconds)), pipeline(1, 1))
    first, second = (own[0] for own in split.ranks)
    assert first.compute_s == second.compute_s == pytest.approx(BOTH_S)
    assert first.exposed_s >= seconds - 1e-9
    assert second.exposed_s >= seconds - 1e-9
    for own in (first, second):
        assert own.total_s == pytest.approx(split.period_s, rel=1e-12)


@pytest.mark.parametrize("cores", [None, 1])
def test_every_rank_s_parts_add_up_to_the_period(cores: int | None) -> None:
    """On random plans, with and without shared cores: nothing negative, and busy as the spans say."""
    dice = random.Random(7)  # noqa: S311 - dice, no secret
    chain = chain_of(6, 5, 8, 4, 6)
    device = cluster_of(1).device
    for _ in range(60):
        plan = random_plan(chain, dice)
        if plan.world <= 2 and dice.random() < 0.5:
            plan = replace(plan, replicas=2, world=2 * plan.world, global_batch=2 * plan.global_batch)
        program = compile_program(plan, chain, random_samples(plan, dice), "train")
        check(program)
        link = Link(dice.random(), 10 ** dice.uniform(0, 4))
        nodes = (Node(4, cores=cores),) if dice.random() < 0.5 else (Node(2, cores=cores),) * 2
        cluster = Cluster("dice", replace(device), nodes, {"node": link, "rack": link})
        timeline = simulate(program, Costs(profile_of(chain, update_s_per_byte=1e-3), cluster))
        split = split_time(program, timeline)
        for rank, own in enumerate(split.ranks):
            busy = sum(s.end_s - s.start_s for s in timeline.spans if s.rank == rank)
            assert split.busy_s(rank) == pytest.approx(busy)
            assert sum(t.total_s for t in own) == pytest.approx(split.period_s, rel=1e-9)
            assert min(min(t.compute_s, t.update_s, t.exposed_s, t.bubble_s) for t in own) >= -1e-9
        stages = [split.stage(i) for i in range(len(plan.stages))]
        assert sum(t.total_s for t in stages) == pytest.approx(split.period_s, rel=1e-9)
        assert split.total.total_s == pytest.approx(split.period_s, rel=1e-9)


def test_a_wait_belongs_to_the_stage_that_waits() -> None:
    """Rank 1 holds the tail alone: all that it waits for is the tail's."""
    front, tail = Stage("front", 2, (Segment((0, 1), (0,)),)), Stage("tail", 2, (Segment((1, 2), (1,)),))
    split = split_of(trials_of(NARROW, cluster_of(2)), make_plan(NARROW, front, tail, world=2, global_batch=2))
    assert split.ranks[0][1] == split.ranks[1][0] == StageTime()
    assert split.ranks[1][1].bubble_s == pytest.approx(2 * BOTH_S)


# The five axes


def test_axes_of_data_parallelism() -> None:
    seconds = 3.0
    trials = trials_of(NARROW, cluster_of(2, GRADIENT_BYTES / seconds))
    program = trials.program(data_parallel(4))
    split = split_time(program, trials.timeline(program))
    period, work = split.period_s, 2 * 2 * BOTH_S
    found = axes(trials, program, split)
    assert found.synchronised_bytes == GRADIENT_BYTES  # 2 (n-1)/n S with n = 2
    assert found.exchanged_bytes == 0
    assert found.busy_share == pytest.approx(work / period)
    assert found.balance == pytest.approx(1.0)
    assert found.straggler == pytest.approx((work / SLOWER - work) / period)
    assert found.input_samples_per_s == pytest.approx(2 / period)
    assert found.input_bytes_per_s == pytest.approx(2 / period * 1000 * 8)
    assert found.readers == 2


@pytest.mark.parametrize("contention", [0.0, 0.5])
def test_plan_replicas_synchronise_across(contention: float) -> None:
    """A segment on a single rank is reduced with its counterpart in the other replica, and waits for that."""
    seconds = 10.0
    segments = Segment((0, 1), (0,)), Segment((1, 2), (1,))
    stage = Stage("middle", 4, segments)
    plan = make_plan(NARROW, stage, world=4, global_batch=8, replicas=2)
    cluster = cluster_of(4, 8 * 2000 / seconds)
    link = replace(cluster.links["rack"], contention=contention)
    trials = trials_of(NARROW, replace(cluster, links={"node": link, "rack": link}))
    program = trials.program(plan)
    split = split_time(program, trials.timeline(program))
    assert len(split.ranks) == 2
    assert split.ranks[1][0].exposed_s + split.ranks[1][0].compute_s >= seconds
    for (own,) in split.ranks:
        assert own.total_s == pytest.approx(split.period_s)
    found = axes(trials, program, split)
    assert found.synchronised_bytes == 8 * 2000
    assert found.readers == 2
    assert found.straggler > 0
    (effects,) = micro_batch_effects(trials, plan)
    assert effects.larger is None  # four samples are all that a replica has


def test_the_slowest_counterpart_is_the_worst_choice() -> None:
    plan = make_plan(NARROW, Stage("front", 4, (Segment((0, 2), (0,)),)), world=2, global_batch=8, replicas=2)
    cluster = replace(cluster_of(2), nodes=(Node(1), Node(1, speed=0.5)))
    trials = trials_of(NARROW, cluster)
    program = trials.program(plan)
    slow = trials.step_with_slow_rank_s(program, 0, 0.5)
    assert slow == pytest.approx(2 * trials.step_s(program))


def test_axes_of_a_pipeline() -> None:
    segments = Segment((0, 1), (0,)), Segment((1, 3), (1,))
    chain = chain_of(5, 3, 4, 2)
    plan = make_plan(chain, Stage("middle", 2, segments), world=2, global_batch=4)
    trials = trials_of(chain, cluster_of(2))
    program = trials.program(plan)
    found = axes(trials, program, split_time(program, trials.timeline(program)))
    assert found.synchronised_bytes == 0
    assert found.exchanged_bytes == 4 * 3 * 8
    assert found.balance == pytest.approx(1.5 / 2)
    # The second segment has twice the work, so it is the slow one that hurts; the first has slack.
    slow = trials.step_with_slow_rank_s(program, 1, SLOWER)
    assert found.straggler == pytest.approx(slow / trials.step_s(program) - 1)
    assert slow > trials.step_with_slow_rank_s(program, 0, SLOWER)
    assert found.readers == 1


# Where the answer flips


@pytest.mark.parametrize(
    ("direction", "at"), [("above", 3.1), ("above", 1.001), ("below", 0.27), ("below", 1 / 60)]
)
def test_a_crossing_is_found_to_half_a_percent(direction: Direction, at: float) -> None:
    found = crossing(lambda f: f >= at if direction == "above" else f <= at, direction)
    assert found == pytest.approx(at, rel=0.005)
    assert found is not None
    assert found >= at if direction == "above" else found <= at


def test_the_nearest_crossing_counts() -> None:
    found = crossing(lambda f: 3 <= f <= 7 or f > 20, "above")
    assert found == pytest.approx(3, rel=0.005)


def test_a_crossing_beyond_64_times_is_none() -> None:
    assert crossing(lambda f: f > 65, "above") is None
    assert crossing(lambda f: f < 1 / 65, "below") is None


def flip(found: tuple[Flip, ...], quantity: str, direction: Direction) -> Flip:
    return next(f for f in found if (f.quantity, f.direction) == (quantity, direction))


def test_flips_of_data_parallelism_against_a_pipeline() -> None:
    """Of b samples data parallelism takes 3 b + S/beta seconds (b even), the pipeline 6 b.

    With b = 8 and S/beta = 10 s they meet where S/beta = 24 s, where the devices are 2.4 times as fast, and below
    4 samples: 4 take 22 and 24 s, 3 take 22 (a rank has two of them) and 18.
    """
    trials, planned = duel(cluster_of(2, GRADIENT_BYTES / 10.0), batch=8)
    found = flips(trials, planned, full=True)
    assert found is not None
    assert (found.leader, found.challengers, found.link_level) == ("data_parallel", ("pipeline",), "rack")
    now = GRADIENT_BYTES / 10.0 * 8e-9
    bandwidth = flip(found.found, "bandwidth", "below")
    assert bandwidth.now == pytest.approx(now)
    assert bandwidth.at == pytest.approx(now * 10 / 24, rel=0.01)
    assert bandwidth.challenger == "pipeline"
    assert flip(found.found, "bandwidth", "above").at is None
    assert flip(found.found, "device_speed", "above").at == pytest.approx(2.4, rel=0.01)
    assert flip(found.found, "device_speed", "below").at is None
    batch = flip(found.found, "global_batch", "below")
    assert (batch.now, batch.at, batch.challenger, batch.reason) == (8, 3, "pipeline", None)


def test_the_short_form_looks_at_the_bandwidth_only() -> None:
    trials, planned = duel(cluster_of(2, GRADIENT_BYTES / 10.0), batch=8)
    found = flips(trials, planned, full=False)
    assert found is not None
    assert [f.quantity for f in found.found] == ["bandwidth"] * 2


def test_the_short_form_of_large_programs_leaves_flips_out(monkeypatch: pytest.MonkeyPatch) -> None:
    trials, planned = duel(cluster_of(2), batch=8)
    assert explain(planned, trials, full=False).flips is not None
    monkeypatch.setattr(explanation, "MOST_BRIEF_ACTIONS", 5)
    assert explain(planned, trials, full=False).flips is None
    assert explain(planned, trials, full=True).flips is not None


def test_a_plan_that_was_asked_for_is_held_against_as_the_slower_one() -> None:
    trials, planned = duel(cluster_of(2, GRADIENT_BYTES / 10.0), batch=8, chosen="pipeline")
    found = flips(trials, planned, full=False)
    assert found is not None
    assert (found.leader, found.challengers) == ("data_parallel", ("pipeline",))
    assert in_few_words(planned).startswith("asked for; data_parallel is faster")


def test_without_a_runner_up_nothing_flips() -> None:
    trials, planned = duel(cluster_of(2))
    alone = replace(planned, candidates=planned.candidates[:1])
    assert flips(trials, alone, full=True) is None
    assert rivals(alone) == []
    assert in_few_words(alone) == "the only shape that is possible"


def test_a_leader_that_no_longer_fits_is_overtaken() -> None:
    """All parameters on each rank leave no room for a ninth sample; half of them leave much."""
    chain = chain_of(1, 1000, 1)
    front = make_plan(chain, Stage("front", 1, (Segment((0, 2), (0, 1)),)), world=2, global_batch=8)
    segments = Segment((0, 1), (0,)), Segment((1, 2), (1,))
    middle = make_plan(chain, Stage("middle", 1, segments), world=2, global_batch=8)
    roomy = trials_of(chain, cluster_of(2))
    _, peak, _ = roomy.excess(roomy.program(front))
    tight = trials_of(chain, cluster_of(2, memory_bytes=peak))
    planned = planned_of(tight, "data_parallel", ("data_parallel", front), ("pipeline", middle))
    found = flips(tight, planned, full=True)
    assert found is not None
    above = flip(found.found, "global_batch", "above")
    assert (above.challenger, above.at) == ("pipeline", 9)
    assert "exceeds its memory by" in str(above.reason)


def test_what_cannot_be_fast_enough_is_not_simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the pipeline's work is on one rank: 8 samples take 24 s at least."""
    trials = trials_of(NARROW, cluster_of(2))
    assert resized(trials, pipeline(8, 4), 8, limit_s=25.0).step_s == pytest.approx(3 * 4 * BOTH_S)
    monkeypatch.setattr(Trials, "program", None)
    assert resized(trials, pipeline(8, 4), 8, limit_s=24.0).step_s is None


def test_a_resized_plan_takes_the_better_of_more_and_larger_micro_batches() -> None:
    trials = trials_of(NARROW, cluster_of(2))
    assert resized(trials, pipeline(4, 2), 4).step_s == pytest.approx(3 * 2 * BOTH_S)
    # Kept at 2 there are four micro-batches (five times 2 samples), as 4 of 8 there are two (three times 4).
    assert resized(trials, pipeline(4, 2), 8).step_s == pytest.approx(5 * 2 * BOTH_S)


# Neighbouring micro-batches


def test_neighbours_of_a_micro_batch() -> None:
    trials = trials_of(NARROW, cluster_of(2))
    (stage,) = micro_batch_effects(trials, pipeline(8, 4))
    assert (stage.kind, stage.micro_batch) == ("middle", 4)
    assert stage.smaller is not None
    assert stage.larger is not None
    assert stage.larger.micro_batch == 8
    assert stage.larger.step_s == pytest.approx(2 * 8 * BOTH_S)
    assert stage.smaller.micro_batch == 3
    (whole,) = micro_batch_effects(trials, pipeline(8, 8))
    assert whole.larger is None
    (single,) = micro_batch_effects(trials, pipeline(8, 1))
    assert single.smaller is None


def test_a_larger_micro_batch_that_does_not_fit_says_by_how_much() -> None:
    chain = chain_of(4, 1 << 16, 4)
    segments = Segment((0, 1), (0,)), Segment((1, 2), (1,))
    plan = make_plan(chain, Stage("middle", 4, segments), world=2, global_batch=8)
    roomy = trials_of(chain, cluster_of(2))
    peaks = []
    for size in (4, 8):
        stages = (replace(plan.stages[0], micro_batch=size),)
        peaks.append(roomy.excess(roomy.program(replace(plan, stages=stages)))[1])
    assert peaks[0] < peaks[1]
    tight = trials_of(chain, cluster_of(2, memory_bytes=peaks[0]))
    (stage,) = micro_batch_effects(tight, plan)
    assert stage.larger is not None
    assert stage.larger.step_s is None
    assert stage.larger.memory_bytes == peaks[1]
    assert stage.larger.reason == f"out of memory by {(peaks[1] - peaks[0]) / 2**20:.4g} MiB on rank 0"


def test_usual_sizes_are_parts_of_the_share_and_powers_of_two() -> None:
    assert usual_sizes(1) == (1,)
    assert usual_sizes(6) == (1, 2, 3, 4, 6)
    assert {64, 32, 22, 16, 11, 8, 6, 4, 3, 2, 1} == set(usual_sizes(64))


# Other circumstances


def test_bandwidth_scales_all_links_between_nodes_in_both_directions() -> None:
    link = Link(1e-3, 100.0, reverse_bytes_per_s=50.0)
    links = {"node": link, "rack": link, "site": link}
    cluster = replace(cluster_of(2), links=links, collectives={"rack": {"all_reduce": link}})
    scaled = with_bandwidth(cluster, 4.0)
    wider = replace(link, bytes_per_s=400.0, reverse_bytes_per_s=200.0)
    assert scaled.links == {"node": link, "rack": wider, "site": wider}
    assert scaled.collectives == {"rack": {"all_reduce": wider}}
    lone = with_bandwidth(replace(cluster_of(1, 100.0, devices=2)), 4.0)
    assert lone.links["node"].bytes_per_s == 400.0


def test_speeds_multiply() -> None:
    cluster = replace(cluster_of(2), nodes=(Node(2, speed=2.0), Node(2, speed=(1.0, 3.0))))
    changed = with_speeds(cluster, {1: 0.5, 3: 2.0})
    assert [changed.speed(r) for r in range(4)] == [2.0, 1.0, 1.0, 6.0]


# The whole


def test_an_explanation_covers_all_shapes_in_the_long_form_only() -> None:
    trials, planned = duel(cluster_of(2, GRADIENT_BYTES / 10.0), batch=8)
    third = Candidate("front_tail", None, "rank 0 needs 2.0 MiB, 1.0 MiB more than it has", over_memory=True)
    rule = Candidate("three_stage", None, "no placement")
    planned = replace(planned, candidates=(*planned.candidates, third, rule))
    brief, full = (explain(planned, trials, full=form) for form in (False, True))
    assert [a.candidate.shape for a in brief.accounts] == ["data_parallel", "pipeline"]
    assert brief.effects == ()
    assert [(o.shape, o.constraint, o.detail) for o in full.obstacles] == [
        ("front_tail", "memory", third.reason),
        ("three_stage", "rule", "no placement"),
    ]
    assert [e.kind for e in full.effects] == ["front"]
    assert full.account("pipeline").split.period_s == pytest.approx(48, rel=0.01)
