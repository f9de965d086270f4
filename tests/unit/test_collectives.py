"""The time of communication over a cluster's links."""

import dataclasses
import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybridpar.cluster.collectives import (
    all_gather,
    all_reduce,
    broadcast,
    point_to_point,
    reduce_scatter,
    wire_bytes_all_reduce,
)
from hybridpar.cluster.devices import DEVICES
from hybridpar.cluster.topology import Cluster, Link, Node
from hybridpar.errors import ClusterError

ALGORITHMS = ("ring", "tree", "hierarchical", "mesh", "server", "best")
LINKS = {
    "node": Link(1e-6, 100e9),
    "rack": Link(1e-5, 10e9),
    "site": Link(5e-5, 5e9),
    "wan": Link(1e-2, 1e8),
}


def cluster(nodes=4, devices=1, links=LINKS, racks=1, sites=1):
    places = [(f"rack{i % racks}", f"site{i % sites}") for i in range(nodes)]
    return Cluster("test", DEVICES["V100"], tuple(Node(devices, None, *place) for place in places), dict(links))


def everyone(c):
    return tuple(range(c.world))


# --- collectives


def test_point_to_point_is_latency_plus_bytes_over_bandwidth():
    c = cluster(nodes=2, devices=2)
    assert point_to_point(c, 0, 0, 1e6) == 0.0
    assert point_to_point(c, 0, 1, 1e6) == pytest.approx(1e-6 + 1e6 / 100e9)
    assert point_to_point(c, 1, 2, 1e6) == pytest.approx(1e-5 + 1e6 / 10e9)


def test_ring_all_reduce_of_vgg16_over_5_gb_per_s_takes_166_ms():
    links = {"node": Link(0.0, 12e9), "rack": Link(0.0, 5e9)}
    assert all_reduce(cluster(links=links), (0, 1, 2, 3), 553.4e6) == pytest.approx(0.166, rel=1e-3)


def test_ring_all_reduce_is_reduce_scatter_then_all_gather():
    c = cluster(nodes=3, devices=2)
    n, size = 6, 6e6
    both = reduce_scatter(c, everyone(c), size) + all_gather(c, everyone(c), size / n)
    assert all_reduce(c, everyone(c), size) == pytest.approx(both)


def test_without_latency_the_ring_takes_its_wire_bytes():
    links = {"node": Link(0.0, 1.0), "rack": Link(0.0, 1.0)}
    c = cluster(nodes=5, links=links)
    assert all_reduce(c, everyone(c), 10.0) == pytest.approx(wire_bytes_all_reduce(5, 10.0)) == pytest.approx(16.0)


def test_a_ring_in_node_order_crosses_each_card_once():
    wide, narrow = cluster(nodes=2, devices=8), cluster(nodes=16, devices=1)
    assert all_reduce(wide, everyone(wide), 1e8) == pytest.approx(all_reduce(narrow, everyone(narrow), 1e8))


def test_the_order_of_ranks_does_not_matter():
    c = cluster(nodes=2, devices=2, sites=2)
    for algorithm in ("ring", "tree", "hierarchical", "mesh", "best"):
        times = {all_reduce(c, order, 1e6, algorithm) for order in itertools.permutations(range(4))}
        assert len(times) == 1, algorithm


def test_hierarchical_wins_where_latency_between_nodes_is_long():
    c = cluster(nodes=4, devices=8)
    assert all_reduce(c, everyone(c), 1e4, "hierarchical") < all_reduce(c, everyone(c), 1e4, "ring")


def test_tree_wins_for_small_vectors_and_ring_for_large_ones():
    c = cluster(nodes=16)
    assert all_reduce(c, everyone(c), 8, "tree") < all_reduce(c, everyone(c), 8, "ring")
    assert all_reduce(c, everyone(c), 1e9, "tree") > all_reduce(c, everyone(c), 1e9, "ring")


def test_best_is_the_least_of_those_libraries_offer():
    c = cluster(nodes=4, devices=4)
    for size in (1.0, 1e5, 1e9):
        offered = [all_reduce(c, everyone(c), size, a) for a in ("ring", "tree", "hierarchical")]
        assert all_reduce(c, everyone(c), size, "best") == min(offered)


def test_a_mesh_shares_the_card_of_a_node():
    spread, packed = cluster(nodes=8, devices=1), cluster(nodes=2, devices=4)
    assert all_reduce(packed, everyone(packed), 1e8, "mesh") > all_reduce(spread, everyone(spread), 1e8, "mesh")


def test_a_parameter_server_grows_with_its_workers_and_a_ring_does_not():
    links = {"node": Link(0.0, 1e9), "rack": Link(0.0, 1e9)}
    few, many = cluster(nodes=2, links=links), cluster(nodes=8, links=links)
    assert all_reduce(many, everyone(many), 1e6, "server") == pytest.approx(
        7 * all_reduce(few, everyone(few), 1e6, "server")
    )
    assert all_reduce(many, everyone(many), 1e6) < 2 * all_reduce(few, everyone(few), 1e6)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_one_rank_needs_no_communication(algorithm):
    c = cluster()
    assert all_reduce(c, (2,), 1e9, algorithm) == 0.0
    assert all_gather(c, (2,), 1e9) == reduce_scatter(c, (2,), 1e9) == broadcast(c, (2,), 1e9) == 0.0


shapes = st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 3), st.integers(1, 2))


@given(shapes, st.sampled_from(sorted(LINKS)), st.floats(1.0, 100.0), st.floats(0.0, 1e9))
def test_more_bandwidth_or_less_latency_is_never_slower(shape, level, factor, size):
    nodes, devices, racks, sites = shape
    slow = cluster(nodes, devices, LINKS, racks, sites)
    link = LINKS[level]
    ranks = everyone(slow)
    for better in (
        Link(link.latency_s, link.bytes_per_s * factor),
        Link(link.latency_s / factor, link.bytes_per_s),
    ):
        fast = cluster(nodes, devices, LINKS | {level: better}, racks, sites)
        for algorithm in ALGORITHMS:
            assert all_reduce(fast, ranks, size, algorithm) <= all_reduce(slow, ranks, size, algorithm) * (
                1 + 1e-12
            )
        for collective in (all_gather, reduce_scatter, broadcast):
            assert collective(fast, ranks, size) <= collective(slow, ranks, size) * (1 + 1e-12)


@given(shapes, st.floats(0.0, 1e9), st.floats(1.0, 10.0))
def test_more_bytes_are_never_faster(shape, size, factor):
    nodes, devices, racks, sites = shape
    c = cluster(nodes, devices, LINKS, racks, sites)
    for algorithm in ALGORITHMS:
        assert all_reduce(c, everyone(c), size, algorithm) <= all_reduce(c, everyone(c), size * factor, algorithm)
    for collective in (all_gather, reduce_scatter, broadcast):
        assert collective(c, everyone(c), size) <= collective(c, everyone(c), size * factor)


@given(shapes, st.floats(1.0, 1e9))
def test_no_all_reduce_beats_the_wire(shape, size):
    """Patarasu & Yuan 2009: each rank sends at least 2 (n-1)/n S."""
    nodes, devices, racks, sites = shape
    c = cluster(nodes, devices, LINKS, racks, sites)
    least = wire_bytes_all_reduce(c.world, size) / max(link.bytes_per_s for link in LINKS.values())
    for algorithm in ALGORITHMS:
        assert all_reduce(c, everyone(c), size, algorithm) >= least * (1 - 1e-12)


def test_wrong_ranks_are_named():
    c = cluster()
    with pytest.raises(ClusterError, match=r"ranks \[0, 9\] do not fit cluster test of 4"):
        all_reduce(c, (0, 9), 1.0)
    with pytest.raises(ClusterError, match="each must be given once"):
        all_gather(c, (1, 1), 1.0)
    with pytest.raises(ClusterError, match="at least one rank"):
        broadcast(c, (), 1.0)
    with pytest.raises(ClusterError, match="rank 7 is not in cluster test"):
        point_to_point(c, 0, 7, 1.0)
    with pytest.raises(ClusterError, match="'rign' is unknown"):
        all_reduce(c, (0, 1), 1.0, "rign")


# --- relations


def every_time(c, size):
    """Seconds of everything there is, by name."""
    times = {f"all_reduce {a}": all_reduce(c, everyone(c), size, a) for a in ALGORITHMS}
    for collective in (all_gather, reduce_scatter, broadcast):
        times[collective.__name__] = collective(c, everyone(c), size)
    times["point_to_point"] = point_to_point(c, 0, c.world - 1, size)
    return times


def changed(link, latency=1.0, bandwidth=1.0):
    """A link with its latencies and bandwidths, of both directions, multiplied."""
    return dataclasses.replace(
        link,
        latency_s=link.latency_s * latency,
        bytes_per_s=link.bytes_per_s * bandwidth,
        reverse_latency_s=None if link.reverse_latency_s is None else link.reverse_latency_s * latency,
        reverse_bytes_per_s=None if link.reverse_bytes_per_s is None else link.reverse_bytes_per_s * bandwidth,
    )


constants = st.builds(
    Link,
    st.floats(0.0, 1e-3),
    st.floats(1e6, 1e11),
    reverse_latency_s=st.none() | st.floats(0.0, 1e-3),
    reverse_bytes_per_s=st.none() | st.floats(1e6, 1e11),
)


@st.composite
def clusters(draw):
    """Clusters of uneven racks and sites, with directed links and some fitted constants."""
    places = st.tuples(st.integers(1, 4), st.sampled_from("ab"), st.sampled_from("xy"))
    nodes = draw(st.lists(places, min_size=1, max_size=5))
    links = {level: draw(constants) for level in LINKS}
    fitted = {
        level: draw(st.dictionaries(st.sampled_from(["all_reduce", "all_gather", "broadcast"]), constants))
        for level in draw(st.sets(st.sampled_from(sorted(LINKS))))
    }
    members = tuple(Node(n, None, rack, site) for n, rack, site in nodes)
    return Cluster("any", DEVICES["V100"], members, links, fitted, draw(st.sampled_from(ALGORITHMS)))


@given(clusters(), st.floats(0.0, 1e9), st.floats(1.0, 1e3))
def test_better_links_fewer_bytes_and_less_latency_are_never_slower_anywhere(c, size, factor):
    def with_links(change):
        fitted = {level: {k: change(v) for k, v in f.items()} for level, f in c.collectives.items()}
        return dataclasses.replace(c, links={k: change(v) for k, v in c.links.items()}, collectives=fitted)

    base = every_time(c, size)
    for worse in (
        every_time(with_links(lambda link: changed(link, latency=factor)), size),
        every_time(with_links(lambda link: changed(link, bandwidth=1 / factor)), size),
        every_time(c, size * factor),
    ):
        assert all(worse[name] >= seconds * (1 - 1e-12) for name, seconds in base.items())


@given(clusters(), st.floats(0.0, 1e9), st.floats(1e-3, 1e3))
def test_scaling_all_latencies_and_inverse_bandwidths_scales_all_times(c, size, factor):
    def scaled(link):
        return changed(link, latency=factor, bandwidth=1 / factor)

    fitted = {level: {k: scaled(v) for k, v in f.items()} for level, f in c.collectives.items()}
    other = dataclasses.replace(c, links={k: scaled(v) for k, v in c.links.items()}, collectives=fitted)
    expected = {name: pytest.approx(seconds * factor, rel=1e-9) for name, seconds in every_time(c, size).items()}
    assert every_time(other, size) == expected


@given(st.integers(2, 9), constants, st.floats(0.0, 1e9))
def test_on_one_level_hierarchical_is_the_ring(n, link, size):
    for c in (cluster(1, n, {"node": link}), cluster(n, 1, {"node": Link(0.0, 1e12), "rack": link})):
        ring = all_reduce(c, everyone(c), size, "ring")
        assert all_reduce(c, everyone(c), size, "hierarchical") == pytest.approx(ring)


@given(constants, st.floats(0.0, 1e9))
def test_between_two_ranks_a_mesh_is_a_ring_and_a_server_sends_everything(link, size):
    c = cluster(1, 2, {"node": link})
    ring = all_reduce(c, (0, 1), size, "ring")
    assert all_reduce(c, (0, 1), size, "mesh") == pytest.approx(ring)
    assert all_reduce(c, (0, 1), size, "server") >= ring * (1 - 1e-12)
    assert all_reduce(c, (0, 1), size, "tree") <= all_reduce(c, (0, 1), size, "server") * (1 + 1e-12)


@given(clusters(), st.floats(0.0, 1e9))
def test_a_broadcast_is_never_slower_than_its_tree_nor_faster_than_one_message(c, size):
    bare = dataclasses.replace(c, collectives={})
    tree = sum(
        math.ceil(math.log2(bare.world)) * link.slower(size) for link in bare.links.values() if bare.world > 1
    )
    least = min(min(link.time(size), link.time(size, reverse=True)) for link in bare.links.values())
    time = broadcast(bare, everyone(bare), size)
    assert time <= tree * (1 + 1e-12)
    if bare.world > 1:
        assert time >= min(least, size / max(v.bytes_per_s for v in bare.links.values())) * (1 - 1e-9)


# --- directions, fitted constants, the library's algorithm


def test_directions_are_told_apart():
    link = Link(1e-5, 1e9, reverse_latency_s=3e-5, reverse_bytes_per_s=1e8)
    c = cluster(1, 4, {"node": link})
    assert point_to_point(c, 1, 3, 1e6) == pytest.approx(1e-5 + 1e6 / 1e9)
    assert point_to_point(c, 3, 1, 1e6) == pytest.approx(3e-5 + 1e6 / 1e8)
    assert all_reduce(c, everyone(c), 4e6, "ring") == pytest.approx(6 * (3e-5 + 1e6 / 1e8))
    assert all_reduce(c, everyone(c), 1e6, "tree") == pytest.approx(2 * (1e-5 + 1e-3) + 2 * (3e-5 + 1e-2))
    assert all_gather(c, everyone(c), 1e6) == pytest.approx(3 * (3e-5 + 1e-2))


def fitted_cluster(algorithm="ring"):
    fitted = {
        "all_reduce": Link(1e-3, 1e6),
        "all_gather": Link(2e-3, 2e6),
        "reduce_scatter": Link(3e-3, 3e6),
        "broadcast": Link(4e-3, 4e6),
    }
    links = {"node": Link(1e-5, 1e9)}
    return Cluster("fitted", DEVICES["V100"], (Node(4),), links, {"node": fitted}, algorithm)


def test_fitted_constants_take_the_place_of_the_links():
    c = fitted_cluster()
    assert all_reduce(c, everyone(c), 4e6) == pytest.approx(6 * (1e-3 + 1.0))
    assert all_gather(c, everyone(c), 2e6) == pytest.approx(3 * (2e-3 + 1.0))
    assert reduce_scatter(c, everyone(c), 12e6) == pytest.approx(3 * (3e-3 + 1.0))
    assert broadcast(c, everyone(c), 4e6) == pytest.approx(2 * (4e-3 + 1.0))
    assert point_to_point(c, 0, 1, 1e9) == pytest.approx(1e-5 + 1.0)


def test_fitted_constants_of_an_all_reduce_are_those_of_the_librarys_algorithm():
    ring, tree = fitted_cluster(), fitted_cluster("tree")
    assert all_reduce(tree, everyone(tree), 1e6) == pytest.approx(4 * (1e-3 + 1.0))
    assert all_reduce(ring, everyone(ring), 1e6, "tree") == pytest.approx(4 * (1e-5 + 1e-3))
    assert all_reduce(tree, everyone(tree), 4e6, "ring") == pytest.approx(6 * (1e-5 + 1e-3))


def test_a_level_without_a_link_takes_the_fitted_constants_of_the_one_it_falls_back_to():
    links = {"node": Link(0.0, 1e9), "rack": Link(0.0, 1e9)}
    nodes = (Node(1), Node(1, site="far"))
    c = Cluster("two", DEVICES["V100"], nodes, links, {"rack": {"all_gather": Link(0.0, 1e6)}})
    assert all_gather(c, (0, 1), 1e6) == pytest.approx(1.0)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_clusters_algorithm_is_the_default(algorithm):
    c = dataclasses.replace(cluster(nodes=4, devices=4), all_reduce=algorithm)
    assert all_reduce(c, everyone(c), 1e6) == all_reduce(c, everyone(c), 1e6, algorithm)


# --- uneven places


def test_hierarchical_leaves_most_to_the_smallest_rack():
    """Racks of three nodes and of one: the lone node's card carries the whole vector between the racks."""
    links = {"node": Link(0.0, 1e9), "rack": Link(0.0, 1e9), "site": Link(0.0, 1e9)}
    c = Cluster("uneven", DEVICES["V100"], (*[Node(1, rack="a")] * 3, Node(1, rack="b")), links)
    assert all_reduce(c, everyone(c), 3e9, "hierarchical") == pytest.approx(2 * 2 * 1.0 + 2 * 1 * 1.5)


def test_a_mesh_and_a_server_load_a_level_with_what_lies_beyond_it_only():
    """Three nodes of a rack and one elsewhere: a slow link between the racks carries one share per node."""
    links = {"node": Link(0.0, 1e12), "rack": Link(0.0, 1e12), "site": Link(0.0, 1e6)}
    c = Cluster("uneven", DEVICES["V100"], (*[Node(1, rack="a")] * 3, Node(1, rack="b")), links)
    assert all_reduce(c, everyone(c), 4e6, "mesh") == pytest.approx(2 * 3.0)
    assert all_reduce(c, everyone(c), 1e6, "server") == pytest.approx(2 * 1.0)
