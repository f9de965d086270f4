"""Cluster descriptions: from config data, from a YAML file, and of the machine at hand."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pynvml
import yaml

from hybridpar.cluster.devices import ATTAINABLE, ATTAINABLE_BANDWIDTH, CUDA_OVERHEAD_S, DEVICES, custom
from hybridpar.cluster.limits import core_quota, usable_cores, usable_memory_bytes
from hybridpar.cluster.topology import Cluster, Device, Link, Node
from hybridpar.errors import ClusterError
from hybridpar.schema import from_data, to_data

__all__ = [
    "ABOUT",
    "FIELDS",
    "LOOPBACK",
    "SCHEMA",
    "DeviceChoice",
    "NodeGroup",
    "check_writable",
    "core_quota",
    "from_config",
    "from_mapping",
    "load",
    "local",
    "save",
    "usable_cores",
    "usable_memory_bytes",
]

DeviceChoice = Literal["auto", "cpu", "cuda"]
"""What a job runs on; auto: one GPU per rank where there are enough, else the CPU."""

# Two gloo processes of one thread each on a machine with 2 AMD EPYC cores over the loopback interface, PyTorch
# 2.14, measured on 2026-11-23 as half of a ping-pong's median time: 1 KiB 59 us, 16 KiB 79 us, 64 KiB 91 us,
# 256 KiB 134 us, 1 MiB 302 us, 4 MiB 1209 us, 16 MiB 4842 us. This line fits all of them within 20 %.
# Contention: CPU time that a process spends on a message (system calls copy it) over the line's time, the mean of
# both ends and median of three rounds there: 64 KiB 0.4, 1 MiB 0.6, 4 MiB 0.7. The machine had other work, which
# disturbs CPU time far less than it would the lost time of a computation, which a probe measures.
LOOPBACK = Link(latency_s=60e-6, bytes_per_s=3.5e9, contention=0.65)

# Bytes/s per NVLink link and direction: 25e9 for NVLink 2, 3 and 4 (V100, A100 and H100 data sheets: 300e9, 600e9
# and 900e9 in both directions over 6, 12 and 18 links). PCIe: bytes/s per lane and direction by generation
# (PCI-SIG, after line coding). The share that NCCL reaches of either is assumed, not measured.
_NVLINK_BYTES_PER_S = 25e9
_PCIE_BYTES_PER_S = {1: 0.25e9, 2: 0.5e9, 3: 0.985e9, 4: 1.969e9, 5: 3.938e9, 6: 7.56e9}
_GPU_LINK_SHARE = 0.8
# Seconds for a kernel on one GPU to see another's data, launch included; assumed, not measured.
_GPU_LINK_LATENCY_S = 10e-6


@dataclass(frozen=True)
class NodeGroup:
    """``count`` equal nodes of a description."""

    devices: int
    count: int = 1
    cores: int | None = None
    rack: str = "rack0"
    site: str = "site0"
    speed: float | tuple[float, ...] = 1.0
    memory_bytes: float | None = None


FIELDS = ("name", "device", "nodes", "links", "collectives", "all_reduce")
"""What a description says of the cluster itself."""
ABOUT = ("schema", "source", "date", "versions", "measured")
"""What a description may say of its origin; nothing is planned with it."""
SCHEMA = 1


def from_config(
    data: Mapping[str, Any], where: str = "cluster", world: int | None = None, device: DeviceChoice = "auto"
) -> Cluster:
    """Build the cluster of a ``cluster`` config group.

    ``kind`` says where it comes from: ``preset`` (the fields stand in ``data``), ``from_file`` (in the YAML file
    ``path``) or ``local`` (this machine with ``world`` ranks, the argument ``world`` where the config has none, on
    ``device``).
    For the latter two, fields of ``data`` that are not null replace what was read or detected, and a device preset
    replaces the whole device.
    Raises ClusterError naming the field, with ``where`` before it.
    """
    kind = data.get("kind", "preset")
    rest = {key: value for key, value in data.items() if key not in {"kind", "path", "world"}}
    if kind == "preset":
        return from_mapping(rest, where)
    if kind == "local":
        ranks = data.get("world")
        return from_mapping(_over(_plain(local(world if ranks is None else ranks, device)), rest), where)
    if kind == "from_file":
        path = data.get("path")
        if not path or path == "???":
            raise ClusterError(
                f"{where}.path: missing; give a description's path, as in {where}.path=cluster.yaml"
            )
        return from_mapping(_over(_read(Path(path).expanduser()), rest), where)
    raise ClusterError(f"{where}.kind: {kind!r} is unknown; use preset, local or from_file")


def from_mapping(data: Mapping[str, Any], where: str = "cluster") -> Cluster:
    """Build a cluster from plain data.

    - ``name``: a word for output
    - ``device``: ``preset`` (one of ``devices.DEVICES``) with overrides, or all fields of a Device
    - ``nodes``: a list of groups of equal nodes, or one group; a group has ``devices`` (per node), ``count`` (1),
      ``cores`` (null: each rank has its own), ``rack``, ``site``, ``speed`` (1, or one number per device) and
      ``memory_bytes`` (null: the device's)
    - ``links``: level (node, rack, site, wan) to ``latency_s``, ``bytes_per_s``, ``contention`` (0),
      ``latency_contention`` (null: as that),
      ``reverse_latency_s`` and ``reverse_bytes_per_s`` (null: as forward)
    - ``collectives``: level and operation to fitted ``latency_s`` and ``bytes_per_s``; may be left out
    - ``all_reduce``: the library's algorithm (ring)
    - ``schema``, ``source``, ``date``, ``versions``, ``measured``: where the description comes from

    Null stands for "not given" everywhere. Raises ClusterError naming the field, with ``where`` before it.
    """
    given = _without_none(data)
    for field in given:
        if field not in (*FIELDS, *ABOUT):
            raise ClusterError(f"{where}.{field}: unknown field; a cluster has {', '.join(FIELDS)}")
    if given.get("schema", SCHEMA) != SCHEMA:
        raise ClusterError(f"{where}.schema: {given['schema']!r} is not {SCHEMA}, the only one this version reads")
    for field in ("device", "nodes", "links"):
        if field not in given:
            raise ClusterError(f"{where}.{field}: missing")
    for field in ("device", "links"):
        if not isinstance(given[field], Mapping):
            raise ClusterError(f"{where}.{field}: expected a mapping, got {given[field]!r}")
    device = custom(given["device"], f"{where}.device")
    present = {level: link for level, link in given["links"].items() if link != {}}
    links = from_data(dict[str, Link], present, f"{where}.links", ClusterError)
    nodes = _nodes(given["nodes"], f"{where}.nodes")
    fitted = given.get("collectives", {})
    collectives = from_data(dict[str, dict[str, Link]], fitted, f"{where}.collectives", ClusterError)
    algorithm = given.get("all_reduce", "ring")
    try:
        return Cluster(str(given.get("name", "unnamed")), device, nodes, links, collectives, algorithm)
    except ClusterError as e:
        raise ClusterError(f"{where}: {e}") from e


def load(path: Path) -> Cluster:
    """Read a cluster from a YAML file with the fields of :func:`from_mapping`.

    Raises ClusterError for a file that cannot be read, and for a wrong field by its name.
    """
    return from_mapping(_read(path), path.name)


def save(cluster: Cluster, path: Path, about: Mapping[str, Any] | None = None) -> None:
    """Write a cluster as YAML that :func:`load` reads back to an equal one.

    ``about``: plain data on its origin, keys of ``ABOUT``; ``measured`` comes last. Raises ClusterError for a file
    that cannot be written.
    """
    origin = {"schema": SCHEMA, **(about or {})}
    data = {key: origin[key] for key in ABOUT[:-1] if key in origin} | _plain(cluster)
    data |= {key: origin[key] for key in ABOUT[-1:] if key in origin}
    try:
        path.write_text(yaml.safe_dump(data, sort_keys=False, width=110))
    except OSError as e:
        raise ClusterError(f"cannot write {path}: {e.strerror}; name a file in an existing folder") from e


def check_writable(path: Path) -> None:
    """Raise ClusterError, before anything is measured, where :func:`save` could not write ``path``."""
    folder = path.resolve().parent
    if not folder.is_dir():
        raise ClusterError(f"cannot write {path}: there is no folder {folder}; make it first")
    if path.is_dir() or not os.access(path if path.exists() else folder, os.W_OK):
        raise ClusterError(f"cannot write {path}: it is a folder or not yours to write; name another file")


def local(world: int | None = None, choice: DeviceChoice = "auto") -> Cluster:
    """Describe this machine as one node of ``world`` ranks, on the device that a job of so many would run on.

    With at least ``world`` NVIDIA GPUs: one rank per GPU. Else, or where ``choice`` is cpu: ``world`` ranks (or
    one per usable core, at least 2) on the usable cores, each with an equal share of the available memory. Rates
    come from the device presets, links from constants of this module and NVML.

    Raises ClusterError for a world below 1, for GPUs that differ or cannot be described, and where ``choice`` is
    cuda but ranks outnumber the GPUs.
    """
    if world is not None and world < 1:
        raise ClusterError(f"world: {world} is below 1; a job has at least one rank")
    gpu = None if choice == "cpu" else _gpus()
    if gpu is not None and gpu[0] >= (world or 1):
        count, device, link = gpu
        return Cluster("local", device, (Node(count if world is None else world),), {"node": link})
    if choice == "cuda":
        raise ClusterError(
            f"train.device=cuda needs one GPU per rank, but there are {gpu[0] if gpu else 0} for {world or 1} "
            "ranks; start fewer ranks, or set train.device=cpu"
        )
    cores = usable_cores()
    ranks = max(2, cores) if world is None else world
    device = custom({"preset": "cpu_core", "memory_bytes": usable_memory_bytes() / ranks}, "device")
    return Cluster("local", device, (Node(ranks, cores=cores),), {"node": LOOPBACK})


def _gpus() -> tuple[int, Device, Link] | None:
    """Count, kind and link of this machine's visible NVIDIA GPUs; None where there are none."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        handles = _visible([pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())])
        if not handles:
            return None
        names = sorted({str(pynvml.nvmlDeviceGetName(handle)) for handle in handles})
        if len(names) > 1:
            raise ClusterError(
                f"this machine has different GPUs ({', '.join(names)}), but a cluster has one kind of device; "
                "choose equal ones with CUDA_VISIBLE_DEVICES"
            )
        return len(handles), _gpu(handles[0], names[0]), _gpu_link(handles[0])
    except pynvml.NVMLError as e:
        raise ClusterError(f"NVML cannot describe this machine's GPUs: {e}; describe them in a file") from e
    finally:
        pynvml.nvmlShutdown()


def _visible(handles: list[Any]) -> list[Any]:
    """Keep the GPUs that CUDA_VISIBLE_DEVICES names by index or UUID; like CUDA, stop at the first bad one."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return handles
    uuids = [str(pynvml.nvmlDeviceGetUUID(handle)) for handle in handles]
    visible = []
    for word in filter(None, (w.strip() for w in chosen.split(","))):
        matches = [
            i for i, uuid in enumerate(uuids) if word == str(i) or (len(word) > 4 and uuid.startswith(word))
        ]
        if len(matches) != 1:
            break
        visible.append(handles[matches[0]])
    return visible


def _gpu(handle: Any, name: str) -> Device:
    """Describe a GPU by the preset in its name and its real memory, or by its clocks where no preset fits.

    float32 peak: cores x 2 operations (multiply-add) x SM clock; memory bandwidth: bus width x memory clock x 2
    (double data rate). CUDA C++ Programming Guide and NVML reference; attainable shares as for the presets.
    """
    memory_bytes = float(pynvml.nvmlDeviceGetMemoryInfo(handle).total)
    for preset in DEVICES:
        if re.search(rf"\b{preset}\b", name):
            return custom({"preset": preset, "memory_bytes": memory_bytes}, "device")
    clock_hz = pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_SM) * 1e6
    memory_hz = pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_MEM) * 1e6
    bus_bytes = pynvml.nvmlDeviceGetMemoryBusWidth(handle) / 8
    return Device(
        name=name,
        memory_bytes=memory_bytes,
        flops_per_s={"float32": pynvml.nvmlDeviceGetNumGpuCores(handle) * 2 * clock_hz * ATTAINABLE["fma"]},
        memory_bytes_per_s=bus_bytes * memory_hz * 2 * ATTAINABLE_BANDWIDTH,
        overhead_s=CUDA_OVERHEAD_S,
    )


def _gpu_link(handle: Any) -> Link:
    """NVLink with the GPU's active links, else PCIe with its greatest generation and width."""
    links = 0
    for i in range(pynvml.NVML_NVLINK_MAX_LINKS):
        try:
            links += int(pynvml.nvmlDeviceGetNvLinkState(handle, i) == pynvml.NVML_FEATURE_ENABLED)
        except pynvml.NVMLError:
            break
    if links:
        return Link(_GPU_LINK_LATENCY_S, links * _NVLINK_BYTES_PER_S * _GPU_LINK_SHARE)
    generation = min(int(pynvml.nvmlDeviceGetMaxPcieLinkGeneration(handle)), max(_PCIE_BYTES_PER_S))
    lanes = int(pynvml.nvmlDeviceGetMaxPcieLinkWidth(handle))
    return Link(_GPU_LINK_LATENCY_S, lanes * _PCIE_BYTES_PER_S[generation] * _GPU_LINK_SHARE)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as everyone expects it: ``8e9`` is a number, as it is in Hydra's files, not a string."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _read(path: Path) -> Mapping[str, Any]:
    try:
        data = yaml.load(path.read_text(), _Loader)  # noqa: S506 - a SafeLoader with one more number format
    except OSError as e:
        raise ClusterError(f"cannot read {path}: {e.strerror}; give the path of an existing file") from e
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise ClusterError(f"{path} is not YAML: {e}") from e
    if not isinstance(data, Mapping):
        raise ClusterError(f"{path}: expected a mapping with device, nodes and links, got {data!r}")
    if data.get("kind", "preset") != "preset":
        raise ClusterError(f"{path}: kind: {data['kind']!r} has no place in a file; list device, nodes and links")
    return {str(key): value for key, value in data.items() if key != "kind"}


def _nodes(data: Any, where: str) -> tuple[Node, ...]:
    groups = data if isinstance(data, list | tuple) else [data]
    nodes: list[Node] = []
    for i, entry in enumerate(groups):
        place = f"{where}[{i}]" if groups is data else where
        group = from_data(NodeGroup, entry, place, ClusterError)
        if group.count < 1:
            raise ClusterError(f"{place}.count: {group.count} is below 1")
        try:
            nodes += [_node(group)] * group.count
        except ClusterError as e:
            raise ClusterError(f"{place}: {e}") from e
    return tuple(nodes)


def _node(group: NodeGroup) -> Node:
    return Node(group.devices, group.cores, group.rack, group.site, group.speed, group.memory_bytes)


def _plain(cluster: Cluster) -> dict[str, Any]:
    """Turn a cluster into plain data for YAML: runs of equal nodes as one group, no fields that say nothing."""
    runs = [(node, len(list(same))) for node, same in itertools.groupby(cluster.nodes)]
    nodes = [
        NodeGroup(node.devices, count, node.cores, node.rack, node.site, node.speed, node.memory_bytes)
        for node, count in runs
    ]
    data = {
        "name": cluster.name,
        "device": to_data(cluster.device),
        "nodes": [_without_none(to_data(group)) for group in nodes],
        "links": _without_none(to_data(cluster.links)),
    }
    if cluster.collectives:
        data["collectives"] = _without_none(to_data(cluster.collectives))
    return data | {"all_reduce": cluster.all_reduce}


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _without_none(v) for k, v in value.items() if v is not None}
    return value


def _over(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Put config fields on top of a description."""
    device = over.get("device")
    replaced = isinstance(device, Mapping) and device.get("preset") is not None
    return _merge({k: v for k, v in base.items() if not (replaced and k == "device")}, over)


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Put ``over`` on top of ``base``: mappings key by key, null leaves what is there, all else replaces."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        if isinstance(value, Mapping) and isinstance(below, Mapping):
            merged[key] = _merge(below, value)
        elif value is not None:
            merged[key] = value
    return merged
