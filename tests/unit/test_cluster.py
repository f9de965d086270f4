"""Clusters: descriptions, presets, and what is detected of this machine."""

import dataclasses
import itertools
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from omegaconf import OmegaConf

from hybridpar.cluster import describe
from hybridpar.cluster.devices import DEVICES, device
from hybridpar.cluster.topology import Link, Node
from hybridpar.errors import ClusterError

CONF = Path(__file__).parents[2] / "conf" / "cluster"


def config_of(name):
    return OmegaConf.to_container(OmegaConf.load(CONF / f"{name}.yaml"))


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


def test_nodes_may_differ_in_speed_and_memory():
    slow = {"devices": 2, "speed": [1, 0.5], "memory_bytes": 1e9}
    c = describe.from_mapping(plain(nodes=[{"devices": 1}, slow, {"devices": 1, "speed": 2}]))
    assert [c.speed(r) for r in range(c.world)] == [1.0, 1.0, 0.5, 2.0]
    assert [c.memory_bytes(r) for r in range(c.world)] == [16e9, 1e9, 1e9, 16e9]


MEASURED = {
    "links": {
        "node": {"latency_s": 0, "bytes_per_s": 1e10, "contention": 0.3, "reverse_bytes_per_s": 2e9},
        "rack": {"latency_s": 1e-5, "bytes_per_s": 5e9, "reverse_latency_s": 2e-5},
    },
    "collectives": {"rack": {"all_reduce": {"latency_s": 1e-4, "bytes_per_s": 4e9}}},
    "all_reduce": "tree",
}


def test_measured_constants_are_read():
    c = describe.from_mapping(plain(**MEASURED))
    assert c.links["node"] == Link(0.0, 1e10, 0.3, None, 2e9)
    assert c.links["rack"] == Link(1e-5, 5e9, 0.0, 2e-5)
    assert c.collectives == {"rack": {"all_reduce": Link(1e-4, 4e9)}}
    assert c.all_reduce == "tree"
    assert c.fingerprint != describe.from_mapping(plain()).fingerprint


def test_the_origin_of_a_description_is_kept_in_its_file_and_does_not_count(tmp_path):
    c = describe.from_mapping(plain(**MEASURED))
    describe.save(c, tmp_path / "c.yaml", {"source": "measured", "measured": {"links": [1, 2]}})
    data = yaml.safe_load((tmp_path / "c.yaml").read_text())
    assert (data["schema"], data["source"], data["measured"]) == (1, "measured", {"links": [1, 2]})
    assert list(data)[-1] == "measured"
    assert describe.load(tmp_path / "c.yaml") == c
    with pytest.raises(ClusterError, match=r"cluster\.schema: 2 is not 1"):
        describe.from_mapping(plain(schema=2))


def test_a_description_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(ClusterError, match=r"cannot write .*c.yaml: No such file"):
        describe.save(describe.from_mapping(plain()), tmp_path / "none" / "c.yaml")


def test_files_that_could_not_be_written_are_named_before_there_is_anything_to_write(tmp_path):
    describe.check_writable(tmp_path / "c.yaml")
    with pytest.raises(ClusterError, match=r"cannot write .*c.yaml: there is no folder .*none; make it first"):
        describe.check_writable(tmp_path / "none" / "c.yaml")
    with pytest.raises(ClusterError, match="is a folder or not yours"):
        describe.check_writable(tmp_path)


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
        (
            {"links": {"node": {"latency_s": 0, "bytes_per_s": 1, "contention": 5}}},
            "cluster.links.node: contention: 5.0 is not in 0..4",
        ),
        (
            {"links": {"node": {"latency_s": 0, "bytes_per_s": 1, "reverse_bytes_per_s": 0}}},
            "cluster.links.node: a link of latency_s=0.0 and bytes_per_s=0.0 cannot be",
        ),
        ({"nodes": [{"devices": 2, "speed": [1]}]}, r"cluster.nodes\[0\]: speed: 1 values for 2 devices"),
        ({"nodes": [{"devices": 2, "speed": 0}]}, r"cluster.nodes\[0\]: speed: 0.0 is not above 0"),
        ({"nodes": [{"devices": 2, "memory_bytes": 0}]}, r"cluster.nodes\[0\]: memory_bytes: 0.0 is not above 0"),
        ({"collectives": {"wan": {}}}, "cluster: collectives.wan: there is no links.wan"),
        (
            {"collectives": {"node": {"gather": {"latency_s": 0, "bytes_per_s": 1}}}},
            "cluster: collectives.node.gather: unknown operation; use all_reduce",
        ),
        ({"all_reduce": "rign"}, "cluster: all_reduce: algorithm 'rign' is unknown; use ring"),
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


def test_a_file_of_an_earlier_version_is_read(tmp_path):
    """It wrote every field, and knew neither contention nor speeds."""
    path = tmp_path / "c.yaml"
    path.write_text(
        "name: old\ndevice: {preset: V100}\n"
        "nodes: [{devices: 2, count: 1, cores: null, rack: rack0, site: site0}]\n"
        "links: {node: {latency_s: 1.0e-06, bytes_per_s: 10000000000.0}}\n"
    )
    c = describe.load(path)
    assert (c.links["node"].contention, c.speed(1), c.all_reduce, c.collectives) == (0.0, 1.0, "ring", {})


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
    assert c.links["node"] == dataclasses.replace(describe.LOOPBACK, bytes_per_s=1e9)
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
