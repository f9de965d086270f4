"""Simulated time and counted memory: by hand on tiny programs, by relations on random ones."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from hybridpar.cluster.collectives import all_reduce
from hybridpar.cluster.topology import Cluster, Device, Link, Node
from hybridpar.model.chain import Chain, Layer
from hybridpar.planning.bound import Bounds
from hybridpar.planning.compile import compile as compile_program
from hybridpar.planning.costs import Costs
from hybridpar.planning.events import EventSimulation
from hybridpar.planning.memory import Memory, memory
from hybridpar.planning.plan import OrderRule, Plan, Recipe, Segment, Stage, validate
from hybridpar.planning.program import Program
from hybridpar.planning.resident import peak_per_rank
from hybridpar.planning.simulate import predict, simulate, step_time, step_time_at_least
from hybridpar.planning.timeline import Timeline
from hybridpar.planning.walk import walk
from hybridpar.profiling.record import LayerProfile, Profile
from tests.support.paper import SMALL, chain_of, front, profile_of
from tests.support.plans import make_plan, random_plan
from tests.support.training import make_case

# Small chains, hand-made profiles and clusters whose times can be computed on paper


def random_profile(chain: Chain, dice: random.Random) -> Profile:
    """Times with an offset and a slope in samples, about a millisecond, different for every layer and pass."""
    sizes = (1, 4, 16)

    def row() -> tuple[float, ...]:
        offset, slope = dice.random() * 1e-3 * dice.choice((0, 1, 4)), dice.random() * 1e-3
        return tuple(offset + slope * n for n in sizes)

    layers = tuple(LayerProfile(layer.name, (row(),), (row(),)) for layer in chain.layers)
    return Profile(
        chain.fingerprint,
        "estimated",
        "dice",
        "float64",
        sizes,
        (1.0,),
        layers,
        dice.random() * 1e-6,
        dice.random() * 1e-6,
    )


def scaled_profile(profile: Profile, by: float) -> Profile:
    """All times multiplied."""

    def times(table: tuple[tuple[float, ...], ...]) -> tuple[tuple[float, ...], ...]:
        return tuple(tuple(t * by for t in row) for row in table)

    layers = tuple(LayerProfile(x.name, times(x.forward_s), times(x.backward_s)) for x in profile.layers)
    return replace(
        profile,
        layers=layers,
        update_s_per_byte=profile.update_s_per_byte * by,
        loss_s_per_element=profile.loss_s_per_element * by,
    )


def cluster_of(
    *nodes: Node,
    latency_s: float = 0.0,
    bytes_per_s: float = 1e12,
    rack: Link | None = None,
    memory_bytes: float = 1e15,
    memory_bytes_per_s: float = 1e18,
) -> Cluster:
    """Nodes with one link inside and one (by default the same) between them."""
    link = Link(latency_s, bytes_per_s)
    device = Device("paper", memory_bytes, {"float64": 1.0, "float32": 1.0}, memory_bytes_per_s, 0.0)
    return Cluster("paper", device, nodes, {"node": link, "rack": rack or link})


def random_cluster(nodes: tuple[Node, ...], dice: random.Random) -> Cluster:
    """Links from slow to fast, against :func:`random_profile`."""
    within = Link(dice.random() * 1e-3 * dice.choice((0.01, 1)), 10 ** dice.uniform(4, 7))
    between = Link(dice.random() * 1e-2, 10 ** dice.uniform(4, 7))
    return replace(cluster_of(*nodes, memory_bytes_per_s=1e8), links={"node": within, "rack": between})


def scaled_cluster(
    cluster: Cluster, *, latency: float = 1.0, bandwidth: float = 1.0, memory: float = 1.0
) -> Cluster:
    """Latencies, bandwidths and the devices' memory bandwidth multiplied."""
    links = {k: Link(v.latency_s * latency, v.bytes_per_s * bandwidth) for k, v in cluster.links.items()}
    device = replace(cluster.device, memory_bytes_per_s=cluster.device.memory_bytes_per_s * memory)
    return replace(cluster, links=links, device=device)


FORWARD_S, BACKWARD_S = 1.0, 2.0
"""Per sample and layer."""
MLP = chain_of(4, 6, 5)
PARAMETER_BYTES = 8 * (4 * 6 + 6 + 6 * 5 + 5)


def program_of(chain: Chain, *stages: Stage, batch: int, **fields: object) -> Program:
    world = 1 + max(r for s in stages for r in s.ranks)
    plan = make_plan(chain, *stages, world=world, global_batch=batch, **fields)
    return compile_program(plan, chain, batch, "train")


def run(program: Program, cluster: Cluster, steps: int = 3, **times: float) -> Timeline:
    profile = profile_of(program.chain, FORWARD_S, BACKWARD_S, **times)
    return simulate(program, Costs(profile, cluster), steps)


# By hand


def test_one_rank_does_one_thing_after_the_other() -> None:
    """Four samples through two layers, five logits each, and one update."""
    program = program_of(MLP, front(2, 0), batch=4)
    timeline = run(program, cluster_of(Node(1)), update_s_per_byte=1e-3, loss_s_per_element=0.1)
    step_s = 4 * 2 * (FORWARD_S + BACKWARD_S) + 4 * 5 * 0.1 + PARAMETER_BYTES * 1e-3
    assert timeline.ends_s == pytest.approx([step_s, 2 * step_s, 3 * step_s])
    assert timeline.period_s == pytest.approx(step_s)
    kinds = [s.action.kind for s in sorted(timeline.spans, key=lambda s: s.start_s)]
    assert kinds == ["forward", "score", "loss", "backward"] * 2 + ["update"]
    assert sum(s.end_s - s.start_s for s in timeline.spans) == pytest.approx(step_s)


def test_two_replicas_wait_for_the_reduction() -> None:
    """The labels and the metrics, of 32 bytes each, travel beside the computation."""
    program = program_of(MLP, front(2, 0, 1), batch=4)
    latency_s, bytes_per_s = 0.25, 1e3
    cluster = cluster_of(Node(2), latency_s=latency_s, bytes_per_s=bytes_per_s)
    timeline = run(program, cluster, update_s_per_byte=1e-3)
    reduction_s = 2 * (latency_s + PARAMETER_BYTES / 2 / bytes_per_s)
    step_s = 2 * 2 * (FORWARD_S + BACKWARD_S) + reduction_s + PARAMETER_BYTES * 1e-3
    assert timeline.ends_s == pytest.approx([step_s, 2 * step_s, 3 * step_s])


@pytest.mark.parametrize("nodes", [(Node(2),), (Node(1), Node(1))], ids=["one node", "two nodes"])
def test_the_last_layers_are_reduced_while_the_first_run_backward(nodes: tuple[Node, ...]) -> None:
    program = program_of(MLP, front(2, 0, 1), batch=4, bucket_bytes=1)
    cluster = cluster_of(*nodes, latency_s=0.1, bytes_per_s=100.0)
    first_s, second_s = (2 * (0.1 + 8 * n / 2 / 100) for n in (4 * 6 + 6, 6 * 5 + 5))
    forward_s, each_s = 2 * 2 * FORWARD_S, 2 * BACKWARD_S
    step_s = forward_s + each_s + max(second_s, each_s) + first_s
    assert run(program, cluster).ends_s[0] == pytest.approx(step_s)
    slower = cluster_of(*nodes, latency_s=2.5, bytes_per_s=100.0)
    first_s, second_s = first_s + 2 * 2.4, second_s + 2 * 2.4
    # The labels' all-reduce of 2 (2.5 + 0.16) s now ends after the forward.
    labels_s = 2 * (2.5 + 8 * 4 / 2 / 100)
    step_s = max(forward_s, labels_s) + each_s + max(second_s, each_s) + first_s
    assert run(program, slower).ends_s[0] == pytest.approx(step_s)


def test_a_first_backward_adds_nothing_and_copies_into_the_bucket() -> None:
    """Weights gather in place; of two biases with 11 numbers the gradients go to their place in the bucket."""
    adding_s, copy_s_per_byte = 0.5, 1e-3
    profile = profile_of(MLP, FORWARD_S, BACKWARD_S)
    layers = tuple(replace(layer, accumulate_s=adding_s) for layer in profile.layers)
    profile = replace(profile, layers=layers, copy_s_per_byte=copy_s_per_byte)
    whole_s = 2 * 2 * 2 * (FORWARD_S + BACKWARD_S)
    for ranks, copied_bytes in (((0,), 0), ((0, 1), 8 * 11)):
        program = program_of(MLP, front(2, *ranks), batch=4 * len(ranks))
        timeline = simulate(program, Costs(profile, cluster_of(Node(len(ranks)))))
        step_s = whole_s - 2 * adding_s + copied_bytes * copy_s_per_byte
        assert timeline.period_s == pytest.approx(step_s)


def test_a_pipeline_of_two_segments() -> None:
    """Two micro-batches of one sample. Rank 0: F0 F1 . B0 . B1; rank 1 does F B F B. c is one message's time.

    Rank 1 works on sample 0 from 1+c to 4+c and on sample 1 until 7+c; rank 0 needs c more for the gradient, and 2
    for its own backward.
    """
    segments = (Segment((0, 1), (0,)), Segment((1, 2), (1,)))
    program = program_of(MLP, Stage("middle", 1, segments), batch=2)
    latency_s, bytes_per_s = 0.05, 1e3
    message_s = latency_s + 8 * 6 / bytes_per_s
    timeline = run(program, cluster_of(Node(2), latency_s=latency_s, bytes_per_s=bytes_per_s))
    assert timeline.ends_s[0] == pytest.approx(9 + 2 * message_s)
    assert timeline.period_s == pytest.approx(9 + 2 * message_s)
    own = [
        (s.action.kind, s.action.micro_batch, s.end_s - timeline.ends_s[1]) for s in timeline.spans if s.rank == 1
    ]
    expected = [
        ("forward", 0, 2 + message_s),
        ("backward", 0, 4 + message_s),
        ("forward", 1, 5 + message_s),
        ("backward", 1, 7 + message_s),
    ]
    for (kind, m, end_s), (wanted_kind, wanted_m, wanted_s) in zip(own, expected, strict=True):
        assert (kind, m) == (wanted_kind, wanted_m)
        assert end_s == pytest.approx(wanted_s)


def test_fill_and_drain_takes_as_long_and_keeps_more() -> None:
    segments = (Segment((0, 1), (0,)), Segment((1, 2), (1,)))
    times, peaks = {}, {}
    rules: tuple[OrderRule, ...] = ("fill_drain", "one_forward_one_backward")
    for rule in rules:
        program = program_of(MLP, Stage("middle", 1, segments), batch=8, order=rule)
        times[rule] = run(program, cluster_of(Node(2))).period_s
        peaks[rule] = memory(program, 1).peak
    assert times["fill_drain"] == pytest.approx(times["one_forward_one_backward"]) == pytest.approx(27.0)
    assert peaks["fill_drain"] > peaks["one_forward_one_backward"]


@pytest.mark.parametrize(("width", "arrive_s"), [(2048, [4.0, 5.0, 6.0]), (256, [4.0, 4.0, 4.0])])
def test_messages_of_a_node_queue_at_its_card_unless_they_are_small(width: int, arrive_s: list[float]) -> None:
    """Rank 0 computes three samples in 3 s and sends one, in 1 s, to each of three ranks on another node."""
    chain = chain_of(1, width, 1)
    stages = front(3, 0, layers=(0, 1)), Stage("middle", 1, (Segment((1, 2), (1, 2, 3)),))
    program = program_of(chain, *stages, batch=3)
    assert {o.bytes for o in program.operations if o.content == "activation"} == {8 * width}
    between = Link(0.0, 8.0 * width)
    timeline = run(program, cluster_of(Node(1), Node(3), rack=between), steps=1)
    began = sorted(s.start_s for s in timeline.spans if s.action.kind == "forward" and s.rank)
    assert began == pytest.approx(arrive_s)


def test_ranks_that_share_a_core_take_twice_as_long() -> None:
    program = program_of(MLP, front(2, 0, 1), batch=4)
    alone = run(program, cluster_of(Node(2))).period_s
    assert run(program, cluster_of(Node(2, cores=2))).period_s == alone
    assert run(program, cluster_of(Node(2, cores=1))).period_s == pytest.approx(2 * alone)
    assert alone == pytest.approx(12.0)


def test_an_idle_rank_lends_its_core() -> None:
    """Three samples and one: the core never rests, so the step takes all of the work and no more."""
    program = program_of(MLP, front(3, 0, 1, shares=(3.0, 1.0)), batch=4)
    timeline = run(program, cluster_of(Node(2, cores=1)))
    work_s = 4 * 2 * (FORWARD_S + BACKWARD_S)
    assert timeline.period_s == pytest.approx(work_s)
    ends = {s.rank: s.end_s - timeline.ends_s[1] for s in timeline.spans if s.action.kind == "backward"}
    # Half speed until the smaller share (6 s of work) is done, then the other rank has the core to itself.
    assert ends == pytest.approx({1: 12.0, 0: work_s})
    assert run(program, cluster_of(Node(2))).period_s == pytest.approx(18.0)


def test_a_copy_costs_memory_bandwidth_where_it_moves_anything() -> None:
    """One rank holds both stages. Micro-batches of equal size pass on as they are; others are copied."""
    times = {}
    for size in (2, 4):
        stages = (front(2, 0, layers=(0, 1)), Stage("tail", size, (Segment((1, 2), (0,)),)))
        program = program_of(MLP, *stages, batch=4)
        times[size] = run(program, cluster_of(Node(1), memory_bytes_per_s=100.0)).period_s
    assert times[2] == pytest.approx(24.0)
    copied_bytes = 2 * 4 * 6 * 8
    assert times[4] == pytest.approx(24.0 + 2 * copied_bytes / 100)


def test_a_shard_does_its_share() -> None:
    """Two shards of three and two columns: 3/5 and 2/5 of the last layer."""
    tail = Stage("tail", 4, (Segment((1, 2), (0, 1)),), ("column",))
    program = program_of(MLP, front(2, 0, 1, layers=(0, 1)), tail, batch=4)
    profile = profile_of(MLP, FORWARD_S, BACKWARD_S, update_s_per_byte=1.0)
    costs = Costs(profile, cluster_of(Node(2)))
    block = program.blocks[1]
    assert [costs.passes(MLP, block, shard, 4, "forward") for shard in (0, 1)] == pytest.approx([2.4, 1.6])
    updates = [costs.update(program.plan, MLP, [block], shard) for shard in (0, 1)]
    assert sum(updates) == pytest.approx(8 * 35)
    stages = predict(program, costs).stages
    assert [s.kind for s in stages] == ["front", "tail"]
    assert (stages[0].forward_s, stages[0].backward_s, stages[0].update_s) == pytest.approx((2.0, 4.0, 8 * 30.0))
    assert (stages[1].forward_s, stages[1].backward_s, stages[1].update_s) == pytest.approx((2.4, 4.8, 8 * 21.0))


def test_a_prediction_sums_up() -> None:
    program = program_of(MLP, front(2, 0, 1), batch=4)
    costs = Costs(profile_of(MLP, FORWARD_S, BACKWARD_S), cluster_of(Node(2), latency_s=2.0))
    prediction = predict(program, costs)
    # The labels' 4 s end with the forward; the gradients' 4 s follow the backward.
    assert prediction.step_s == pytest.approx(16.0)
    assert prediction.samples_per_s == pytest.approx(4 / 16)
    assert prediction.bubble == pytest.approx(4 / 16)
    assert prediction.wire_bytes == 2 * (PARAMETER_BYTES + 32 + 40)
    assert prediction.memory_bytes == peak_per_rank(program, costs.workspaces)
    assert prediction.source == "estimated"


@pytest.mark.parametrize("contention", [0.0, 0.5, 1.0, 1.5])
def test_a_link_takes_its_share_of_the_compute_rate(contention: float) -> None:
    """Labels travel during the forward, metrics and the last layer's gradients during the backward."""
    chain = chain_of(6, 4, 6)
    program = program_of(chain, front(2, 0, 1), batch=4, bucket_bytes=1)
    assert [o.bytes for o in program.operations if o.content == "bucket"] == [8 * 30, 8 * 28]
    link = Link(0.0, 120.0, contention)
    cluster = cluster_of(Node(2))
    cluster = replace(cluster, links={"node": link, "rack": link})
    profile = profile_of(chain, [0.5, 0.5], [2.0, 2.0])
    timeline = simulate(program, Costs(profile, cluster), 1)
    flights = {program.operations[f.operation].content: f.end_s - f.start_s for f in timeline.flights}
    assert flights["bucket"] == pytest.approx(8 * 28 / 120)
    overlapped_s = flights["label"] + flights["metrics"] + 8 * 30 / 120
    assert timeline.ends_s[0] == pytest.approx(2 * 5.0 + contention * overlapped_s + 8 * 28 / 120)


def test_latency_has_a_contention_of_its_own() -> None:
    link = Link(2.0, 120.0, contention=0.5, latency_contention=1.5)
    chain = chain_of(6, 4, 6)
    costs = Costs(profile_of(chain, [0.5, 0.5], [2.0, 2.0]), replace(cluster_of(Node(2)), links={"node": link}))
    program = program_of(chain, front(2, 0, 1), batch=4)
    for operation in program.operations:
        assert operation.kind == "all_reduce"
        whole_s = costs.operation(program, operation)
        latency_s = 2 * 2.0  # a ring of two: one message there, one back
        expected = (1.5 * latency_s + 0.5 * (whole_s - latency_s)) / whole_s
        assert costs.contention(program, operation) == pytest.approx(expected)


def test_a_collective_s_own_contention_counts() -> None:
    """Of all that travels here, only reductions have one: labels, metrics and gradients."""
    chain = chain_of(6, 4, 6)
    program = program_of(chain, front(2, 0, 1), batch=4)
    link = Link(0.0, 120.0)
    cluster = replace(cluster_of(Node(2)), links={"node": link, "rack": link})
    profile = profile_of(chain, [0.5, 0.5], [2.0, 2.0])

    def ends_s(**fitted: Link) -> float:
        return simulate(program, Costs(profile, replace(cluster, collectives={"node": fitted})), 1).ends_s[0]

    assert {o.kind for o in program.operations} == {"all_reduce"}
    assert (
        ends_s(all_gather=replace(link, contention=0.5))
        == ends_s()
        < ends_s(all_reduce=replace(link, contention=0.5))
    )


def test_clipping_makes_the_update_wait_for_the_norm() -> None:
    stages = (front(2, 0, 1),)
    cluster = cluster_of(Node(2), latency_s=0.5, bytes_per_s=1e12)
    plain, clipped = (
        run(program_of(MLP, *stages, batch=4, recipe=Recipe(clipping=on)), cluster).period_s
        for on in (False, True)
    )
    assert clipped == pytest.approx(plain + all_reduce(cluster, (0, 1), 8))


# Relations

CASE_CHAIN = make_case(samples=1).traced.chain
PLANS = 60


def random_cases(nodes: tuple[Node, ...]) -> list[tuple[Program, Profile, Cluster]]:
    cases = []
    for seed in range(PLANS):
        dice = random.Random(seed)  # noqa: S311
        plan = random_plan(CASE_CHAIN, dice)
        program = compile_program(plan, CASE_CHAIN, plan.global_batch, "train")
        cases.append((program, random_profile(CASE_CHAIN, dice), random_cluster(nodes, dice)))
    return cases


Change = Callable[[Profile, Cluster], tuple[Profile, Cluster]]
BETTER: dict[str, Change] = {
    "bandwidth": lambda p, c: (p, scaled_cluster(c, bandwidth=1.7)),
    "latency": lambda p, c: (p, scaled_cluster(c, latency=0.4)),
    "device": lambda p, c: (scaled_profile(p, 0.6), scaled_cluster(c, memory=1 / 0.6)),
    "one layer": lambda p, c: (_one_layer_faster(p), c),
}


def _one_layer_faster(profile: Profile) -> Profile:
    faster = scaled_profile(profile, 0.5)
    chosen = len(profile.layers) // 2
    layers = (*profile.layers[:chosen], faster.layers[chosen], *profile.layers[chosen + 1 :])
    return Profile(**{**vars(profile), "layers": layers})


MACHINES = [(Node(4),), (Node(1),) * 4, (Node(2),) * 2]


@pytest.mark.parametrize("nodes", MACHINES, ids=str)
@pytest.mark.parametrize("better", BETTER)
def test_a_better_machine_never_makes_a_program_slower(better: str, nodes: tuple[Node, ...]) -> None:
    """A fixed program with a fixed order at every card is a longest path, so this holds without exception.

    Cards once served operations as they became ready: a better machine was slower in 1 of 500 programs.
    """
    for program, profile, cluster in random_cases(nodes):
        before = simulate(program, Costs(profile, cluster))
        after = simulate(program, Costs(*BETTER[better](profile, cluster)))
        for a, b in zip(before.ends_s, after.ends_s, strict=True):
            assert b <= a * (1 + 1e-12)
        assert after.period_s <= before.period_s * (1 + 1e-9)


@pytest.mark.parametrize("nodes", MACHINES, ids=str)
def test_events_and_the_longest_path_agree_where_nothing_contends(nodes: tuple[Node, ...]) -> None:
    for program, profile, cluster in random_cases(nodes):
        costs = Costs(profile, cluster)
        path = simulate(program, costs, 3)
        events = EventSimulation(walk(program, costs), costs, 3).run()
        assert path.ends_s == pytest.approx(events.ends_s, rel=1e-12)
        for own, other in ((path.spans, events.spans), (path.flights, events.flights)):
            pairs = zip(sorted(own, key=repr), sorted(other, key=repr), strict=True)
            assert all((a.start_s, a.end_s) == pytest.approx((b.start_s, b.end_s), rel=1e-9) for a, b in pairs)
        assert step_time(program, costs) == simulate(program, costs).period_s


@pytest.mark.parametrize("nodes", [*MACHINES, (Node(4, cores=1),)], ids=str)
def test_contention_only_slows(nodes: tuple[Node, ...]) -> None:
    for program, profile, cluster in random_cases(nodes):
        costs = Costs(profile, cluster)
        links = {level: replace(link, contention=0.5) for level, link in cluster.links.items()}
        slower = Costs(profile, replace(cluster, links=links))
        assert step_time_at_least(program, slower) <= step_time(program, slower) * (1 + 1e-9)
        assert simulate(program, costs, 1).ends_s[0] <= simulate(program, slower, 1).ends_s[0] * (1 + 1e-9)


@pytest.mark.parametrize("nodes", [*MACHINES, (Node(4, cores=1),)], ids=str)
def test_no_program_beats_its_plan_s_bound(nodes: tuple[Node, ...]) -> None:
    for program, profile, cluster in random_cases(nodes):
        costs = Costs(profile, cluster)
        bound = Bounds(CASE_CHAIN, costs).of(program.plan)
        period = simulate(program, costs).period_s
        assert 0 < bound <= period * (1 + 1e-9), program.plan


@pytest.mark.parametrize("nodes", [(Node(1),) * 4, (Node(4, cores=2),)], ids=str)
def test_time_has_no_unit_of_its_own(nodes: tuple[Node, ...]) -> None:
    """Twice the times and half the bandwidths: exactly twice the period (powers of two round nothing)."""
    for program, profile, cluster in random_cases(nodes):
        period = simulate(program, Costs(profile, cluster)).period_s
        for by in (2.0, 1 / 8):
            slower = scaled_cluster(cluster, latency=by, bandwidth=1 / by, memory=1 / by)
            assert simulate(program, Costs(scaled_profile(profile, by), slower)).period_s == by * period


@pytest.mark.parametrize("nodes", [(Node(1),) * 4, (Node(4, cores=2),)], ids=str)
def test_a_step_is_timed_the_same_however_many_follow(nodes: tuple[Node, ...]) -> None:
    """The last of the simulated steps once had the cores to itself towards its end, and beat the bound."""
    for program, profile, cluster in random_cases(nodes):
        two, four = (simulate(program, Costs(profile, cluster), steps) for steps in (2, 4))
        assert two.ends_s == four.ends_s[:2]


def test_fewer_cores_never_help_and_one_core_does_all_the_work() -> None:
    for program, profile, cluster in random_cases((Node(4),)):
        costs = Costs(profile, cluster)
        own = simulate(program, costs, 1).ends_s[0]
        link = cluster.links["node"]
        one = cluster_of(Node(4, cores=1), latency_s=link.latency_s, bytes_per_s=link.bytes_per_s)
        work = sum(sum(costs.actions(program, rank)) for rank in range(len(program.actions)))
        shared = simulate(program, Costs(profile, one), 1).ends_s[0]
        assert shared >= work * (1 - 1e-3)
        assert own <= work + sum(costs.operation(program, o) for o in program.operations if len(o.ranks) > 1), (
            "one thing after the other is the longest that anything can take"
        )


def test_a_simulation_is_a_pure_function() -> None:
    for program, profile, cluster in random_cases((Node(2),) * 2)[:10]:
        first, second = (simulate(program, Costs(profile, cluster)) for _ in range(2))
        assert first.ends_s == second.ends_s
        assert first.spans == second.spans


# Memory

SMALL_WEIGHT_BYTES, SMALL_BIAS_BYTES = 8 * (3 * 5 + 5 * 2), 8 * (5 + 2)
SMALL_PARAMETER_BYTES = SMALL_WEIGHT_BYTES + SMALL_BIAS_BYTES


def small_plan(*ranks: int, **fields: object) -> Plan:
    return make_plan(SMALL, front(2, *ranks, layers=(0, 3)), world=len(ranks), global_batch=4, **fields)


def small_program(*ranks: int, mode: str = "train", **fields: object) -> Program:
    return compile_program(small_plan(*ranks, **fields), SMALL, 4, mode)  # type: ignore[arg-type]


def test_a_peak_by_hand() -> None:
    """Micro-batches of two samples, one after the other.

    Each keeps the activation's output (5 numbers a sample, saved once for two layers) and the logits or their
    gradient (2 numbers a sample). The inputs of the first layer are the batch, which is there anyway.
    """
    counted = memory(small_program(0), 0)
    assert (counted.parameters, counted.optimizer) == (SMALL_PARAMETER_BYTES,) * 2
    assert counted.gradients == SMALL_WEIGHT_BYTES, "they gather in place, though in no bucket"
    assert counted.batch == 4 * 3 * 8
    assert counted.control == 4 * 8 + 4 * 8 + 5 * 8, "the step's labels, the own ones, and five metrics"
    first = [a.kind for a in small_program(0).actions[0]].index("backward")
    assert counted.accumulated == (0,) * first + (SMALL_BIAS_BYTES,) * (len(counted.saved) - first)
    live = 2 * 5 * 8 + 2 * 2 * 8
    """Of the second micro-batch, while the first one's gradients are there. One rank exchanges no figures."""
    assert counted.peak == 3 * SMALL_PARAMETER_BYTES + counted.batch + counted.control + live
    assert max(counted.saved) == 2 * 5 * 8
    assert counted.saved[-1] == counted.moving[-1] == 0


def test_fill_and_drain_keeps_all_micro_batches() -> None:
    counted = memory(small_program(0, order="fill_drain"), 0)
    assert max(counted.saved) == 2 * 2 * 5 * 8


@pytest.mark.parametrize("states", [0, 1, 2])
def test_optimizer_states_are_counted(states: int) -> None:
    counted = memory(small_program(0, recipe=Recipe(optimizer_states=states)), 0)
    assert counted.optimizer == states * SMALL_PARAMETER_BYTES
    always = SMALL_WEIGHT_BYTES + counted.batch + counted.control
    assert counted.persistent == (1 + states) * SMALL_PARAMETER_BYTES + always


def test_zero_divides_the_states_of_the_front_s_replicas() -> None:
    """DeepSpeed keeps a copy of a part's parameters; under stage 2 there is no bucket beside them."""

    def counted(sharding: str, *ranks: int, offload: bool = False) -> Memory:
        recipe = Recipe(sharding=sharding, optimizer_states=2, offload=offload)  # type: ignore[arg-type]
        plan = replace(small_plan(*ranks), precision="float32", recipe=recipe)
        validate(plan, SMALL)
        return memory(compile_program(plan, SMALL, 4, "train"), 0)

    replicated, alone = counted("none", 0, 1), counted("zero1", 0)
    assert replicated.optimizer == alone.optimizer == SMALL_PARAMETER_BYTES  # in float32
    whole = SMALL_PARAMETER_BYTES // 2
    part = -(-whole // 16) * 8
    padding = 2 * part - whole
    for sharding, bucket in (("zero1", whole), ("zero2", 0)):
        sharded = counted(sharding, 0, 1)
        assert sharded.parameters == replicated.parameters
        assert sharded.optimizer == 3 * part + padding
        assert sharded.gradients == bucket + part
        assert counted(sharding, 0, 1, offload=True).optimizer < part + padding


def test_evaluation_keeps_nothing_for_a_backward() -> None:
    counted = memory(small_program(0, mode="evaluate"), 0)
    assert (counted.gradients, counted.optimizer, max(counted.saved)) == (0, 0, 0)
    assert not any(counted.accumulated)
    assert counted.peak == counted.persistent + 2 * 2 * 8, "logits"
    assert counted.persistent == SMALL_PARAMETER_BYTES + counted.batch + counted.control


def test_shards_hold_all_parameters_once() -> None:
    tail = Stage("tail", 4, (Segment((1, 3), (0, 1)),), ("row",))
    plan = make_plan(SMALL, front(2, 0, 1, layers=(0, 1)), tail, world=2, global_batch=4)
    program = compile_program(plan, SMALL, 4, "train")
    first = 8 * (3 * 5 + 5)
    # Five features over two shards; the bias belongs to the first.
    assert [memory(program, r).parameters - first for r in (0, 1)] == [8 * (3 * 2 + 2), 8 * 2 * 2]


def test_only_readers_hold_inputs() -> None:
    segments = (Segment((0, 1), (1,)), Segment((1, 3), (0,)))
    plan = make_plan(SMALL, Stage("middle", 2, segments), world=2, global_batch=4)
    program = compile_program(plan, SMALL, 4, "train")
    assert [memory(program, r).batch for r in (0, 1)] == [0, 4 * 3 * 8]


def test_integer_inputs_have_eight_bytes_in_any_precision() -> None:
    embedding = Layer("e", "Embedding", (3,), (3,), 1, saves_input=True)
    chain = Chain("tokens", (embedding, *SMALL.layers), input_dtype="int")
    plan = Plan("tokens", chain.fingerprint, 1, 4, "float32", (front(2, 0, layers=(0, 4)),))
    assert memory(compile_program(plan, chain, 4, "train"), 0).batch == 4 * 3 * 8


def test_a_step_on_nothing_but_zeros_costs_no_time() -> None:
    program = program_of(MLP, front(2, 0), batch=4)
    prediction = predict(program, Costs(profile_of(MLP, 0.0, 0.0), cluster_of(Node(1))))
    assert (prediction.step_s, prediction.samples_per_s, prediction.bubble) == (0.0, 0.0, 0.0)
