"""The probe: lines through measured times, which ranks are measured, and what comes out on clusters of paper."""

import dataclasses
import io
import itertools
import random
import socket

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from hybridpar.cluster import describe, hosts, limits
from hybridpar.cluster.collectives import all_gather, all_reduce, broadcast, reduce_scatter
from hybridpar.cluster.devices import DEVICES
from hybridpar.cluster.fit import Sample, fit
from hybridpar.cluster.limits import Limit
from hybridpar.cluster.probe import probe
from hybridpar.cluster.survey import groups_of, levels_of, line, pair_rounds
from hybridpar.cluster.topology import COLLECTIVES, LEVELS, Cluster, Link, Node
from hybridpar.cluster.transport import ACK_BYTES
from hybridpar.errors import ClusterError
from hybridpar.report import probe as table
from tests.support.virtual import KERNEL_S, on_virtual_ranks

# --- lines


SIZES = [2.0**i for i in range(10, 25, 2)]


@given(st.floats(1e-7, 1e-2), st.floats(1e6, 1e11), st.integers(1, 9))
def test_a_line_is_found_exactly(latency, bandwidth, messages):
    found = fit([Sample(messages, b, messages * latency + b / bandwidth) for b in SIZES])
    assert found.seconds(messages, 2.0**10) == pytest.approx(messages * latency + 2.0**10 / bandwidth, rel=1e-6)
    assert found.seconds(messages, 2.0**24) == pytest.approx(messages * latency + 2.0**24 / bandwidth, rel=1e-6)
    assert found.worst_error < 1e-6
    assert not found.poor


def test_noise_and_an_outlier_move_a_line_little():
    draw = random.Random(1)  # noqa: S311
    samples = [Sample(1, b, (5e-5 + b / 2e9) * (1 + draw.uniform(-0.1, 0.1))) for b in SIZES for _ in range(3)]
    samples[4] = dataclasses.replace(samples[4], seconds=samples[4].seconds * 20)
    found = fit(samples)
    assert found.latency_s == pytest.approx(5e-5, rel=0.1)
    assert found.bytes_per_s == pytest.approx(2e9, rel=0.1)
    assert found.median_error < 0.1
    assert found.worst == samples[4]
    assert found.poor, "the outlier is told"


def test_half_and_double_the_time_weigh_the_same():
    """Errors relative to the measured time take a line far below two slow samples for a good one."""
    found = fit([Sample(1, b, b * s) for b in (1.0, 2.0) for s in (1.0, 2.25)])
    assert found.seconds(1, 1.0) == pytest.approx(1.5)


def test_small_messages_tell_the_latency_however_long_large_ones_take():
    """Plain least squares would fit the largest message alone and find a latency of the order of its error."""
    samples = [Sample(1, b, 1e-6 + b / 1e9) for b in SIZES]
    samples[-1] = dataclasses.replace(samples[-1], seconds=samples[-1].seconds * 1.1)
    assert fit(samples).latency_s == pytest.approx(1e-6, rel=0.1)


def test_latency_is_never_negative():
    found = fit([Sample(1, b, (b / 1e9) ** 1.2) for b in SIZES])
    assert found.latency_s == 0.0
    assert found.poor


def test_times_that_do_not_grow_with_the_payload_are_all_latency():
    """A short series on a busy machine."""
    found = fit([Sample(1, 512.0, 3e-3), Sample(1, 8192.0, 1e-3)])
    assert found.latency_s == pytest.approx(1e-3), "a message is no slower than a larger one"
    assert found.bytes_per_s >= 8192 / 3e-3
    assert found.poor


def test_times_that_are_no_line_are_refused():
    with pytest.raises(ClusterError, match="at least two payloads, got 3 samples of one"):
        fit([Sample(1, 8.0, 1.0)] * 3)


@pytest.mark.parametrize("n", [2, 3, 4, 7, 8])
@pytest.mark.parametrize("size", [1e3, 1e7])
def test_samples_are_those_of_the_collectives_formulas(n, size):
    """What is fitted with ``line`` is what ``collectives`` predicts with the fitted constants."""
    fitted = {name: Link(1e-5, 1e9) for name in COLLECTIVES}
    c = Cluster("x", DEVICES["V100"], (Node(n),), {"node": Link(1.0, 1.0)}, {"node": fitted})
    ranks = tuple(range(n))
    for name, seconds in (
        ("all_reduce", all_reduce(c, ranks, size)),
        ("all_gather", all_gather(c, ranks, size / n)),
        ("reduce_scatter", reduce_scatter(c, ranks, size)),
        ("broadcast", broadcast(c, ranks, size)),
    ):
        sample = line(name, n, size, seconds)
        assert sample.messages * 1e-5 + sample.payload_bytes / 1e9 == pytest.approx(seconds), name


# --- which ranks


def paper(*nodes, links=None):
    link = Link(1e-5, 1e9)
    return Cluster("paper", DEVICES["V100"], nodes, links or dict.fromkeys(("node", "rack", "site", "wan"), link))


def test_levels_are_those_that_some_pair_crosses():
    assert levels_of(paper(Node(2))) == ("node",)
    assert levels_of(paper(Node(1), Node(1))) == ("rack",)
    assert levels_of(paper(Node(2), Node(1, rack="b"))) == ("node", "site")
    assert levels_of(paper(Node(1), Node(1), Node(1, site="far"))) == ("rack", "wan")


def test_pairs_of_a_round_disturb_nobody():
    c = paper(Node(4), Node(4), Node(4))
    for level in ("node", "rack"):
        rounds = pair_rounds(c, level)
        assert len(rounds) == 3
        for pairs in rounds:
            ranks = [rank for pair in pairs for rank in pair]
            assert len(set(ranks)) == len(ranks)
            assert all(a < b and c.level(a, b) == level for a, b in pairs)
            if level == "rack":
                nodes = [c.node_of[rank] for rank in ranks]
                assert len(set(nodes)) == len(nodes)
        assert len({pair for pairs in rounds for pair in pairs}) == sum(map(len, rounds))
    assert len(pair_rounds(c, "node")[0]) == 6


def test_on_shared_cores_pairs_take_turns():
    assert pair_rounds(paper(Node(4, cores=2)), "node", 1) == (((0, 1),),)
    assert pair_rounds(paper(Node(4, cores=1)), "node", 1) == (((0, 1),),)
    assert pair_rounds(paper(Node(4, cores=4)), "node", 1) == (((0, 1), (2, 3)),)


def test_groups_cross_one_level_each():
    c = paper(Node(2), Node(2), Node(2, rack="b"), Node(1, site="far"))
    assert groups_of(c, "node") == ((0, 1), (2, 3), (4, 5))
    assert groups_of(c, "rack") == ((0, 2),)
    assert groups_of(c, "site") == ((0, 4),)
    assert groups_of(c, "wan") == ((0, 6),)
    assert groups_of(paper(Node(1), Node(1)), "node") == ()


# --- a whole probe


TRUTH = Cluster(
    "truth",
    DEVICES["V100"],
    (Node(2), Node(2, speed=(1.0, 0.5))),
    {
        "node": Link(1e-5, 4e9, contention=0.25),
        "rack": Link(5e-5, 1e9, contention=0.1, reverse_latency_s=5e-5, reverse_bytes_per_s=5e8),
    },
    {
        "node": {
            "all_reduce": Link(3e-5, 2e9, 0.3, latency_contention=0.8),
            "broadcast": Link(2e-5, 3e9, contention=0.4),
        },
        "rack": {"all_reduce": Link(8e-5, 4e8, contention=0.2), "broadcast": Link(6e-5, 9e8, contention=0.3)},
    },
)


def guess(truth):
    """What a probe knows before it measures."""
    nodes = tuple(dataclasses.replace(node, speed=1.0) for node in truth.nodes)
    return dataclasses.replace(truth, nodes=nodes, links=dict.fromkeys(LEVELS, Link(1.0, 1.0)), collectives={})


def probed(truth, budget_s=40.0, noise=0.0):
    results = on_virtual_ranks(truth, lambda transport: probe(transport, guess(truth), budget_s), noise)
    assert all(result == results[0] for result in results), "every rank knows the same"
    return results[0]


@pytest.fixture(scope="module")
def exact():
    return probed(TRUTH)


def test_links_are_found_by_level_and_direction(exact):
    node, rack = exact.cluster.links["node"], exact.cluster.links["rack"]
    assert set(exact.cluster.links) == {"node", "rack"}
    assert (node.latency_s, node.bytes_per_s) == (pytest.approx(1e-5, rel=0.02), pytest.approx(4e9, rel=0.02))
    assert node.reverse_bytes_per_s is None, "directions that are equal are one"
    assert (rack.latency_s, rack.bytes_per_s) == (pytest.approx(5e-5, rel=0.02), pytest.approx(1e9, rel=0.02))
    assert rack.reverse_latency_s == pytest.approx(5e-5, rel=0.02)
    assert rack.reverse_bytes_per_s == pytest.approx(5e8, rel=0.02)
    assert not any(series.fit.poor for series in exact.series)


def test_collectives_are_found_by_level(exact):
    for level, operation in itertools.product(("node", "rack"), ("all_reduce", "broadcast")):
        own, found = TRUTH.collectives[level][operation], exact.cluster.collectives[level][operation]
        assert found.latency_s == pytest.approx(own.latency_s, rel=0.02), (level, operation)
        assert found.bytes_per_s == pytest.approx(own.bytes_per_s, rel=0.02), (level, operation)
    ring = exact.cluster.collectives["rack"]["all_gather"]
    assert ring.bytes_per_s == pytest.approx(5e8, rel=0.02), "the slower direction sets a ring's pace"


def test_contention_is_found_by_level_and_operation(exact):
    for level in ("node", "rack"):
        assert exact.cluster.links[level].contention == pytest.approx(TRUTH.links[level].contention, rel=0.1)
        for operation in ("all_reduce", "broadcast"):
            own, found = TRUTH.collectives[level][operation], exact.cluster.collectives[level][operation]
            assert found.contention == pytest.approx(own.contention, rel=0.1)
            waiting = own.contention if own.latency_contention is None else own.latency_contention
            assert found.latency_contention == pytest.approx(waiting, rel=0.1)


def test_speeds_are_relative_to_rank_0(exact):
    assert exact.kernel_s == pytest.approx((KERNEL_S, KERNEL_S, KERNEL_S, 2 * KERNEL_S))
    assert exact.cluster.nodes == TRUTH.nodes


def test_times_are_predicted_well_in_spite_of_noise():
    found = probed(TRUTH, noise=0.2)
    for a, b in ((0, 1), (0, 2), (3, 1)):
        for size in (1e3, 1e5, 1e7):
            level = TRUTH.level(a, b)
            expected = TRUTH.link(level).time(size, a > b)
            assert found.cluster.link(level).time(size, a > b) == pytest.approx(1.1 * expected, rel=0.15)
    speeds = [found.cluster.speed(rank) for rank in range(4)]
    assert speeds[:3] == [1.0, 1.0, 1.0], "differences within the spread are none"
    assert speeds[3] == pytest.approx(0.5, rel=0.1)


def test_a_disturbance_of_tiny_messages_one_way_does_not_hide_the_time_of_others():
    """Half of a tiny round trip was taken off, and stood in for, every message up to 1 MiB."""

    def body(transport):
        plain = transport.messages

        def disturbed(source, target, payload_bytes, count):
            transport.clock_s += 1e-2 * (source < target and payload_bytes == ACK_BYTES)
            plain(source, target, payload_bytes, count)

        transport.messages = disturbed
        return probe(transport, guess(TRUTH), 40.0)

    node = on_virtual_ranks(TRUTH, body)[0].cluster.links["node"]
    assert (node.latency_s, node.bytes_per_s) == (pytest.approx(1e-5, rel=0.02), pytest.approx(4e9, rel=0.02))


def test_a_slow_link_ends_in_time_with_fewer_sizes_and_says_what_is_missing():
    slow = dataclasses.replace(TRUTH, links={"node": Link(1e-3, 1e6), "rack": Link(1e-2, 1e5)}, collectives={})
    found = probed(slow, budget_s=10.0)
    assert found.wall_s < 20.0
    assert all(2 <= len(series.payload_bytes) < 6 for series in found.series)
    assert found.cluster.links["rack"].bytes_per_s == pytest.approx(1e5, rel=0.1)
    assert "contention of message on level rack: the budget is spent" in found.unmeasured


def test_single_ranks_on_nodes_have_no_collectives_within():
    truth = paper(Node(1), Node(1), links={"node": Link(1e-6, 1e10), "rack": Link(1e-5, 1e9)})
    found = probed(truth)
    assert set(found.cluster.collectives) == {"rack"}
    assert found.cluster.links["node"] == Link(1.0, 1.0), "not measured, but a cluster must have it"
    assert {series.level for series in found.series} == {"rack"}


def test_what_was_measured_is_written_and_read_back(exact, tmp_path):
    path = tmp_path / "c.yaml"
    describe.save(exact.cluster, path, {"versions": {"torch": "0"}, **exact.about()})
    assert describe.load(path) == exact.cluster
    data = yaml.safe_load(path.read_text())
    assert data["source"] == "measured"
    assert data["date"].startswith("20")
    series = data["measured"]["series"]
    assert {(s["level"], s["what"]) for s in series} == {
        (level, what) for level in ("node", "rack") for what in ("message", *COLLECTIVES)
    }
    assert all(len(s["payload_bytes"]) == len(s["seconds"]) >= 3 for s in series)


def test_a_poor_fit_and_what_is_missing_are_told(exact):
    bent = dataclasses.replace(exact.series[0], fit=dataclasses.replace(exact.series[0].fit, median_error=0.3))
    text = shown(dataclasses.replace(exact, series=(bent, *exact.series[1:]), unmeasured=("contention of x",)))
    assert "poor fit: message on level node is no straight line (off by 30% in the median" in text
    assert "not measured: contention of x" in text
    assert "speed of the devices by rank: 1, 1, 1, 0.5" in text
    assert "poor" not in shown(exact)


def shown(result):
    console = Console(width=160, record=True, file=io.StringIO())
    table.show(result, console)
    return console.export_text()


# --- hosts


GIB = 2**30


FREE = Limit(8 * GIB)


def host(place="a", cores=2.0, owner="", memory=FREE, kind="cpu_core", machine=2, name=None):
    return hosts.Host((place,), name or place, DEVICES[kind], Limit(cores, owner), machine, memory)


def test_ranks_of_one_place_are_a_node_and_share_its_cores_and_memory():
    (first, second) = hosts.make_nodes([host("a"), host("a"), host("b")])
    assert (first.devices, first.cores, first.memory_bytes) == (2, 2, 4 * GIB)
    assert (second.devices, second.cores, second.memory_bytes) == (1, 2, 8 * GIB)


def test_nodes_that_are_namespaces_of_one_machine_share_what_it_has():
    nodes = hosts.make_nodes([host(place, name="machine") for place in "abcd"])
    assert [(node.devices, node.cores, node.memory_bytes) for node in nodes] == [(1, 1, 2 * GIB)] * 4


def test_a_quota_per_rank_is_a_share_of_its_own():
    ranks = [host(cores=0.45, owner=f"rank{i}", memory=Limit(GIB, f"rank{i}")) for i in range(4)]
    (node,) = hosts.make_nodes(ranks)
    assert (node.cores, node.memory_bytes) == (None, GIB)


def test_a_part_of_a_core_is_as_much_slower():
    ranks = [host(cores=0.5, owner=f"rank{i}") for i in range(4)]
    whole = host().device
    part = hosts.unprobed(ranks, hosts.make_nodes(ranks), Link(0.0, 1.0)).device
    assert part.flops_per_s["float32"] == whole.flops_per_s["float32"] / 2
    assert part.memory_bytes_per_s == whole.memory_bytes_per_s / 2
    assert (part.action_s, part.overhead_s) == (whole.action_s * 2, whole.overhead_s * 2)
    assert part.action_s > 0
    full = [host(cores=2.0)] * 2
    assert hosts.unprobed(full, hosts.make_nodes(full), Link(0.0, 1.0)).device.action_s == whole.action_s


def test_a_quota_of_all_ranks_together_is_shared():
    (node,) = hosts.make_nodes([host(cores=3.5, owner="job", machine=8)] * 4)
    assert node.cores == 3


def test_quotas_that_promise_more_than_the_machine_has_are_no_own_share():
    (node,) = hosts.make_nodes([host(cores=1.0, owner=f"rank{i}", machine=2) for i in range(4)])
    assert node.cores == 2


def test_gpus_share_no_cores():
    (node,) = hosts.make_nodes([host(kind="V100", memory=Limit(16e9, f"device {i}")) for i in range(2)])
    assert (node.cores, node.memory_bytes) == (None, 16e9)


def test_nodes_may_be_given():
    ranks = [host()] * 4
    nodes = hosts.make_nodes(ranks, 1, ["a", "a", "b", "b"], ["x", "x", "x", "y"])
    assert [(node.rack, node.site) for node in nodes] == [("a", "x"), ("a", "x"), ("b", "x"), ("b", "y")]
    with pytest.raises(ClusterError, match=r"probe\.ranks_per_node: 3 does not divide the 4 ranks"):
        hosts.make_nodes(ranks, 3)
    with pytest.raises(ClusterError, match=r"probe\.racks: 2 names for 1 nodes"):
        hosts.make_nodes(ranks, None, ["a", "b"])
    with pytest.raises(ClusterError, match="not numbered node by node"):
        hosts.make_nodes([host("a"), host("b"), host("a")])


def test_a_memory_that_all_have_is_the_devices():
    even = [host("a", memory=Limit(GIB)), host("b", memory=Limit(1.01 * GIB))]
    c = hosts.unprobed(even, hosts.make_nodes(even), Link(0.0, 1.0))
    assert (c.device.memory_bytes, [c.memory_bytes(r) for r in (0, 1)]) == (GIB, [GIB, GIB])
    odd = [host("a", memory=Limit(GIB)), host("b", memory=Limit(2 * GIB))]
    c = hosts.unprobed(odd, hosts.make_nodes(odd), Link(0.0, 1.0))
    assert [c.memory_bytes(r) for r in (0, 1)] == [GIB, 2 * GIB]


def test_a_rank_tells_where_it_is_and_what_limits_it(tmp_path):
    for name, text in {
        "proc/self/cgroup": "4:cpu,cpuacct:/rank0\n5:memory:/rank0",
        "sys/fs/cgroup/cpu/rank0/cpu.cfs_quota_us": "4500",
        "sys/fs/cgroup/cpu/rank0/cpu.cfs_period_us": "10000",
        "sys/fs/cgroup/memory/rank0/memory.limit_in_bytes": "1000000",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    here = hosts.Host.here(DEVICES["cpu_core"], 3, tmp_path)
    assert here.machine == socket.gethostname()
    assert here.place == ("3", socket.gethostname(), "")
    assert here.cpu == Limit(0.45, str(tmp_path / "sys/fs/cgroup/cpu/rank0"))
    assert here.memory == Limit(1_000_000, str(tmp_path / "sys/fs/cgroup/memory/rank0"))
    on_gpu = hosts.Host.here(DEVICES["V100"], 0, tmp_path)
    assert on_gpu.memory.amount == 16e9
    assert limits.core_quota(tmp_path) == 0.45
