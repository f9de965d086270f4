"""Clusters: descriptions, presets, detection, and the time of communication over their links."""

import itertools
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from hybridpar.cluster import describe
from hybridpar.cluster.collectives import (
    all_gather,
    all_reduce,
    broadcast,
    point_to_point,
    reduce_scatter,
    wire_bytes_all_reduce,
)
from hybridpar.cluster.devices import DEVICES, device
from hybridpar.cluster.topology import Cluster, Link, Node
from hybridpar.errors import ClusterError

CONF = Path(__file__).parents[2] / "conf" / "cluster"
ALGORITHMS = ("ring", "tree", "hierarchical", "mesh", "server", "best")
LINKS = {
    "node": Link(1e-6, 100e9),
    "rack": Link(1e-5, 10e9),
    "site": Link(5e-5, 5e9),
    "wan": Link(1e-2, 1e8),
}


def config_of(name):
    return OmegaConf.to_container(OmegaConf.load(CONF / f"{name}.yaml"))


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


# --- devices


def test_presets_keep_the_order_of_their_generations():
    gpus = [DEVICES[name] for name in ("P100", "V100", "A100", "H100", "H200")]
    for older, newer in itertools.pairwise(gpus):
        assert older.flops_per_s["float32"] <= newer.flops_per_s["float32"]
        assert older.memory_bytes_per_s < newer.memory_bytes_per_s
        assert older.memory_bytes <= newer.memory_bytes
    assert "bfloat16" not in DEVICES["V100"].flops_per_s
    assert DEVICES["cpu_core"].kind == "cpu"


def test_overrides_replace_fields_and_merge_rates():
    v100 = device("V100", memory_bytes=32e9, flops_per_s={"float32": 1e12}, overhead_s=None)
    assert v100.memory_bytes == 32e9
    assert v100.flops_per_s == DEVICES["V100"].flops_per_s | {"float32": 1e12}
    assert v100.overhead_s == DEVICES["V100"].overhead_s
    assert device("V100") == DEVICES["V100"]


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("v100", {}, "did you mean V100"),
        ("H10O", {}, "did you mean H100"),
        ("V100", {"memory": 1}, "device.memory: unknown field"),
        ("V100", {"memory_bytes": "8 GB"}, "device.memory_bytes: expected float, got '8 GB'"),
        ("V100", {"memory_bytes": 0}, "device.memory_bytes: 0.0 is not above 0"),
        ("V100", {"flops_per_s": {"float32": -1.0}}, r"device.flops_per_s.float32: -1.0 is not above 0"),
        ("V100", {"overhead_s": -1.0}, "device.overhead_s: -1.0 is below 0"),
    ],
)
def test_wrong_devices_are_named(name, overrides, message):
    with pytest.raises(ClusterError, match=message):
        device(name, **overrides)


# --- descriptions


def plain(**changes):
    data = {
        "name": "lab",
        "device": {"preset": "P100"},
        "nodes": [{"devices": 2, "count": 3}, {"devices": 1, "rack": "b", "cores": 4}],
        "links": {"node": {"latency_s": 0, "bytes_per_s": 1e10}, "rack": {"latency_s": 1e-5, "bytes_per_s": 5e9}},
    }
    return data | changes


def test_groups_of_nodes_are_expanded_in_order():
    c = describe.from_mapping(plain())
    assert c.world == 7
    assert c.nodes[:3] == (Node(2),) * 3
    assert c.nodes[3] == Node(1, cores=4, rack="b")
    assert describe.from_mapping(plain(nodes={"count": 4, "devices": 1})).nodes == (Node(1),) * 4


def test_null_stands_for_not_given():
    data = plain(device={"preset": "P100", "memory_bytes": None, "flops_per_s": {"float32": None}})
    data["links"] |= {"site": {"latency_s": None, "bytes_per_s": None}, "wan": None}
    assert describe.from_mapping(data) == describe.from_mapping(plain())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"speed": 1}, "cluster.speed: unknown field"),
        ({"device": None}, "cluster.device: missing"),
        ({"device": "P100"}, "cluster.device: expected a mapping, got 'P100'"),
        ({"device": {"preset": "P10"}}, "cluster.device: no device preset 'P10'; did you mean P100"),
        ({"device": {"name": "mine"}}, "cluster.device.memory_bytes: missing"),
        ({"nodes": [{"devices": 0}]}, r"cluster.nodes\[0\]: devices: 0 is below 1"),
        ({"nodes": [{"devices": 1}, {"device": 1}]}, r"cluster.nodes\[1\].device: unknown field"),
        ({"nodes": {"count": 0, "devices": 1}}, "cluster.nodes.count: 0 is below 1"),
        ({"nodes": []}, "cluster: cluster lab has no nodes"),
        ({"links": {"node": {"latency_s": 0}}}, "cluster.links.node.bytes_per_s: missing"),
        ({"links": {"node": {"latency_s": 0, "bytes_per_s": 1}}}, "cluster: links.rack: missing"),
        ({"links": {"node": {"latency_s": 0, "bytes_per_s": 0}}}, "cluster.links.node: a link of"),
        ({"links": {"nodes": {"latency_s": 0, "bytes_per_s": 1}}}, "cluster: links.nodes: unknown level"),
    ],
)
def test_errors_name_the_field(changes, message):
    with pytest.raises(ClusterError, match=message):
        describe.from_mapping(plain(**changes))


def test_a_saved_cluster_is_read_back_equal(tmp_path):
    c = describe.from_mapping(plain())
    describe.save(c, tmp_path / "c.yaml")
    assert describe.load(tmp_path / "c.yaml") == c
    assert len(yaml.safe_load((tmp_path / "c.yaml").read_text())["nodes"]) == 2


def test_a_file_may_write_numbers_as_hydra_does(tmp_path):
    """PyYAML reads ``8e9`` as a string."""
    path = tmp_path / "c.yaml"
    path.write_text(
        "device: {preset: V100, memory_bytes: 8e9}\nnodes: {devices: 2}\n"
        "links: {node: {latency_s: 1e-6, bytes_per_s: 1e10}}\n"
    )
    c = describe.load(path)
    assert c.device.memory_bytes == 8e9
    assert c.links["node"] == Link(1e-6, 1e10)


def test_unreadable_files_are_named(tmp_path):
    path = tmp_path / "c.yaml"
    with pytest.raises(ClusterError, match=r"cannot read .*c.yaml: No such file"):
        describe.load(path)
    for text, message in (
        ("a: [", "is not YAML"),
        ("- 1", "expected a mapping with device"),
        ("kind: local", "'local' has no place in a file"),
        ("device: {preset: X}\nnodes: {devices: 1}\nlinks: {}", "c.yaml.device: no device preset"),
    ):
        path.write_text(text)
        with pytest.raises(ClusterError, match=message):
            describe.load(path)


@pytest.mark.parametrize(
    ("preset", "world", "name"), [("p100_4x1_40g", 4, "P100"), ("v100_2x8", 16, "V100"), ("h100_1x8", 8, "H100")]
)
def test_config_presets_are_clusters(preset, world, name):
    c = describe.from_config(config_of(preset))
    assert (c.name, c.world, c.device) == (preset, world, DEVICES[name])
    assert describe.load(CONF / f"{preset}.yaml") == c


def test_config_values_replace_those_of_a_file(tmp_path):
    describe.save(describe.from_mapping(plain()), tmp_path / "c.yaml")
    config = config_of("from_file")
    with pytest.raises(ClusterError, match=r"cluster.path: missing"):
        describe.from_config(config)
    config["path"] = str(tmp_path / "c.yaml")
    assert describe.from_config(config) == describe.from_mapping(plain())
    config["links"]["rack"]["bytes_per_s"] = 1e9
    config["device"]["preset"] = "A100"
    changed = describe.from_config(config)
    assert changed.links["rack"] == Link(1e-5, 1e9)
    assert changed.device == DEVICES["A100"]


def test_unknown_kinds_are_named():
    with pytest.raises(ClusterError, match=r"cluster.kind: 'cloud' is unknown"):
        describe.from_config({"kind": "cloud"})


# --- this machine


@pytest.fixture
def without_gpu(monkeypatch):
    def fail():
        raise describe.pynvml.NVMLError(describe.pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(describe.pynvml, "nvmlInit", fail)


@pytest.mark.usefixtures("without_gpu")
def test_a_machine_without_gpu_shares_its_cores_and_memory():
    c = describe.local(3)
    assert c.nodes == (Node(3, cores=describe.usable_cores()),)
    assert c.device.kind == "cpu"
    assert c.device.memory_bytes * 3 == pytest.approx(describe.usable_memory_bytes(), rel=0.2)
    assert c.links == {"node": describe.LOOPBACK}
    assert describe.local().world == max(2, describe.usable_cores())


@pytest.mark.usefixtures("without_gpu")
def test_the_local_config_takes_overrides():
    config = config_of("local")
    assert describe.from_config(config, world=4).world == 4
    config |= {"world": 2}
    config["links"]["node"]["bytes_per_s"] = 1e9
    config["device"]["memory_bytes"] = 1e9
    c = describe.from_config(config, world=4)
    assert c.world == 2
    assert c.links["node"] == Link(describe.LOOPBACK.latency_s, 1e9)
    assert c.device == device("cpu_core", memory_bytes=1e9)
    with pytest.raises(ClusterError, match="world: 0 is below 1"):
        describe.local(0)


@pytest.mark.parametrize(
    ("line", "files", "quota"),
    [
        ("0::/job", {"sys/fs/cgroup/job/cpu.max": "45000 100000"}, 0.45),
        (
            "0::/job/rank",
            {"sys/fs/cgroup/job/cpu.max": "50000 100000", "sys/fs/cgroup/cpu.max": "max 100000"},
            0.5,
        ),
        (
            "4:cpu,cpuacct:/",
            {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "4500", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "10000"},
            0.45,
        ),
    ],
)
def test_cgroup_quotas_cut_the_cores(tmp_path, line, files, quota):
    for name, text in ({"proc/self/cgroup": line} | files).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert describe.core_quota(tmp_path) == pytest.approx(quota)
    assert describe.usable_cores(tmp_path) == 1


def test_cgroup_limits_cut_the_memory(tmp_path):
    for name, text in {"proc/self/cgroup": "0::/", "sys/fs/cgroup/memory.max": "1000000"}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert describe.usable_memory_bytes(tmp_path) == 1_000_000


@pytest.fixture
def gpus(monkeypatch):
    """Fake NVML: the test fills in the names; two NVLinks, PCIe 4.0 x16."""
    machine = SimpleNamespace(names=[], nvlinks=2)
    nvml = describe.pynvml

    def link_state(_, index):
        if index >= machine.nvlinks:
            raise nvml.NVMLError(nvml.NVML_ERROR_INVALID_ARGUMENT)
        return nvml.NVML_FEATURE_ENABLED

    fakes = {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetCount": lambda: len(machine.names),
        "nvmlDeviceGetHandleByIndex": lambda i: i,
        "nvmlDeviceGetName": lambda i: machine.names[i],
        "nvmlDeviceGetUUID": lambda i: f"GPU-{i}{i}{i}{i}",
        "nvmlDeviceGetMemoryInfo": lambda _: SimpleNamespace(total=10_000_000_000),
        "nvmlDeviceGetMaxClockInfo": lambda _, kind: 1000 if kind == nvml.NVML_CLOCK_SM else 5000,
        "nvmlDeviceGetMemoryBusWidth": lambda _: 256,
        "nvmlDeviceGetNumGpuCores": lambda _: 1000,
        "nvmlDeviceGetNvLinkState": link_state,
        "nvmlDeviceGetMaxPcieLinkGeneration": lambda _: 4,
        "nvmlDeviceGetMaxPcieLinkWidth": lambda _: 16,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(nvml, name, fake)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return machine


def test_known_gpus_take_their_preset_and_real_memory(gpus):
    gpus.names = ["Tesla V100-SXM2-16GB"] * 4
    c = describe.local()
    assert c.world == 4
    assert c.device == device("V100", memory_bytes=10e9)
    assert c.links["node"].bytes_per_s == pytest.approx(2 * 25e9 * 0.8)
    assert describe.local(2).device == c.device
    assert describe.local(4, "cuda").device.kind == "cuda"
    assert describe.local(2, "cpu").device.kind == "cpu"


def test_a_job_with_more_ranks_than_gpus_is_planned_for_the_cpu_it_runs_on(gpus):
    gpus.names = ["Tesla V100-SXM2-16GB"]
    assert describe.local(1).device.kind == "cuda"
    assert describe.local(4).device.kind == "cpu"
    with pytest.raises(ClusterError, match="there are 1 for 4 ranks"):
        describe.local(4, "cuda")


def test_unknown_gpus_are_described_by_their_clocks(gpus):
    gpus.names, gpus.nvlinks = ["NVIDIA GeForce X"], 0
    c = describe.local()
    assert c.device.flops_per_s == {"float32": pytest.approx(1000 * 2 * 1e9 * 0.8)}
    assert c.device.memory_bytes_per_s == pytest.approx(256 / 8 * 5e9 * 2 * 0.8)
    assert c.links["node"].bytes_per_s == pytest.approx(16 * 1.969e9 * 0.8)


def test_visible_devices_choose_gpus(gpus, monkeypatch):
    gpus.names = ["NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB", "NVIDIA A100-SXM4-80GB"]
    with pytest.raises(ClusterError, match="different GPUs"):
        describe.local()
    for visible, world, name in (("1,2", 2, "A100"), ("GPU-0000", 1, "H100"), ("2,9,0", 1, "A100")):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        c = describe.local()
        assert (c.world, c.device.name) == (world, name)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert describe.local(2).device.kind == "cpu"


def test_describing_clusters_needs_no_torch_and_no_hydra():
    code = (
        "import sys, hybridpar.cluster.describe, hybridpar.cluster.collectives, hybridpar.profiling.analytic;"
        "assert not {'torch', 'hydra', 'omegaconf'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
