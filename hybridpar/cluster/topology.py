"""The cluster: devices, nodes and the links between them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from hybridpar.errors import ClusterError
from hybridpar.schema import to_data

Level = Literal["device", "node", "rack", "site", "wan"]


@dataclass(frozen=True)
class Device:
    """One accelerator, or one process's share of a host's CPU."""

    name: str
    memory_bytes: float
    flops_per_s: dict[str, float]
    """Attainable floating point rate by dtype name ("float32", ...)."""
    memory_bytes_per_s: float
    overhead_s: float
    """Fixed cost of starting one layer's kernels."""
    kind: Literal["cuda", "cpu"] = "cuda"
    action_s: float = 0.0
    """What the executor itself takes per action on a CPU that also computes; a GPU computes meanwhile."""


@dataclass(frozen=True)
class Node:
    """One host. Nodes of one rack, and racks of one site, share the faster link levels."""

    devices: int
    cores: int | None = None
    """CPU cores that the node's ranks share when the device is a CPU; None: each rank has its own."""
    rack: str = "rack0"
    site: str = "site0"

    def __post_init__(self) -> None:
        if self.devices < 1:
            raise ClusterError(f"devices: {self.devices} is below 1; a node needs at least one device")
        if self.cores is not None and self.cores < 1:
            raise ClusterError(f"cores: {self.cores} is below 1")


@dataclass(frozen=True)
class Link:
    """Time of n bytes over the link: ``latency_s + n / bytes_per_s``, in each direction by itself."""

    latency_s: float
    bytes_per_s: float

    def __post_init__(self) -> None:
        if self.latency_s < 0 or self.bytes_per_s <= 0:
            raise ClusterError(
                f"a link of latency_s={self.latency_s} and bytes_per_s={self.bytes_per_s} "
                "cannot be; latency is at least 0 and bandwidth above 0"
            )

    def time(self, payload_bytes: float) -> float:
        """Seconds to move ``payload_bytes``."""
        return self.latency_s + payload_bytes / self.bytes_per_s


@dataclass(frozen=True)
class Cluster:
    """Nodes with one kind of device, and a link per level. Ranks are numbered node by node.

    ``links`` maps a level (node: within a node, rack: between nodes of a rack, site: between racks,
    wan: between sites) to its link. A level that is missing falls back to the next narrower one given.
    Above the node level the ranks of a node share one card per direction.
    """

    name: str
    device: Device
    nodes: tuple[Node, ...]
    links: dict[str, Link]

    def __post_init__(self) -> None:
        if not self.nodes:
            raise ClusterError(f"cluster {self.name} has no nodes; list at least one")
        for level in self.links:
            if level not in {"node", "rack", "site", "wan"}:
                raise ClusterError(f"links.{level}: unknown level; use node, rack, site or wan")
        if "node" not in self.links:
            raise ClusterError("links.node: missing; give latency_s and bytes_per_s within a node")
        if len(self.nodes) > 1 and "rack" not in self.links:
            raise ClusterError("links.rack: missing; give latency_s and bytes_per_s between nodes")

    @property
    def world(self) -> int:
        """Number of devices, one rank each."""
        return sum(node.devices for node in self.nodes)

    @cached_property
    def node_of(self) -> tuple[int, ...]:
        """Node index of every rank."""
        return tuple(i for i, node in enumerate(self.nodes) for _ in range(node.devices))

    def level(self, a: int, b: int) -> Level:
        """The link level between ranks ``a`` and ``b``."""
        if a == b:
            return "device"
        first, second = self.nodes[self.node_of[a]], self.nodes[self.node_of[b]]
        if self.node_of[a] == self.node_of[b]:
            return "node"
        if first.site != second.site:
            return "wan"
        return "rack" if first.rack == second.rack else "site"

    def link(self, level: Level) -> Link:
        """The link of a level, or the next narrower one given."""
        order: tuple[Level, ...] = ("node", "rack", "site", "wan")
        for candidate in reversed(order[: order.index(level) + 1]):
            if candidate in self.links:
                return self.links[candidate]
        raise ClusterError(f"links.{level}: missing")

    @cached_property
    def fingerprint(self) -> str:
        """Hash over everything the cluster says."""
        return hashlib.sha256(json.dumps(to_data(self), sort_keys=True).encode()).hexdigest()[:16]
