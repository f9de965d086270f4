"""The cluster: devices, nodes and the links between them."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, get_args

from hybridpar.errors import ClusterError
from hybridpar.schema import to_data

Level = Literal["device", "node", "rack", "site", "wan"]
LEVELS: tuple[Level, ...] = ("node", "rack", "site", "wan")
"""The levels that have a link, narrowest first."""
Algorithm = Literal["ring", "tree", "hierarchical", "mesh", "server", "best"]
"""Of an all-reduce; see ``collectives.all_reduce``."""
MOST_CONTENTION = 4.0
"""Greater ones are mistakes of a measurement."""
Collective = Literal["all_reduce", "all_gather", "reduce_scatter", "broadcast"]
COLLECTIVES: tuple[Collective, ...] = ("all_reduce", "all_gather", "reduce_scatter", "broadcast")


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
    speed: float | tuple[float, ...] = 1.0
    """Speed of its devices relative to the device that the profile is of, for all or one by one: 2.0 takes half
    the time."""
    memory_bytes: float | None = None
    """Memory of each of its devices; None: the cluster's device's."""

    def __post_init__(self) -> None:
        if self.devices < 1:
            raise ClusterError(f"devices: {self.devices} is below 1; a node needs at least one device")
        if self.cores is not None and self.cores < 1:
            raise ClusterError(f"cores: {self.cores} is below 1")
        if isinstance(self.speed, tuple) and len(self.speed) != self.devices:
            raise ClusterError(
                f"speed: {len(self.speed)} values for {self.devices} devices; give one number for all, or one each"
            )
        for factor in self.speed if isinstance(self.speed, tuple) else (self.speed,):
            if not (factor > 0 and math.isfinite(factor)):
                raise ClusterError(f"speed: {factor} is not above 0")
        if self.memory_bytes is not None and not (self.memory_bytes > 0 and math.isfinite(self.memory_bytes)):
            raise ClusterError(f"memory_bytes: {self.memory_bytes} is not above 0")


@dataclass(frozen=True)
class Link:
    """Time of n bytes over the link: ``latency_s + n / bytes_per_s``, in each direction by itself.

    Forward is from a lower to a higher rank. The reverse direction has constants of its own where they are given.
    """

    latency_s: float
    bytes_per_s: float
    contention: float = 0.0
    """Seconds of computation that a rank loses per second in which this link carries its data: with 0 the overlap
    is free, with 1 computing stands still meanwhile, above 1 both at once take longer than one after the other."""
    reverse_latency_s: float | None = None
    reverse_bytes_per_s: float | None = None
    latency_contention: float | None = None
    """Likewise per second of latency: waking threads up costs other computation than copying bytes; None: as
    ``contention``."""

    def __post_init__(self) -> None:
        for latency_s, bytes_per_s in ((self.latency_s, self.bytes_per_s), self._reverse):
            if not (latency_s >= 0 and bytes_per_s > 0):
                raise ClusterError(
                    f"a link of latency_s={latency_s} and bytes_per_s={bytes_per_s} "
                    "cannot be; latency is at least 0 and bandwidth above 0"
                )
        for name, value in (("contention", self.contention), ("latency_contention", self._waiting)):
            if not 0 <= value <= MOST_CONTENTION:
                raise ClusterError(
                    f"{name}: {value} is not in 0..{MOST_CONTENTION:g}; it is the seconds of computing "
                    "that are lost per second of communication"
                )

    @property
    def _reverse(self) -> tuple[float, float]:
        return (
            self.latency_s if self.reverse_latency_s is None else self.reverse_latency_s,
            self.bytes_per_s if self.reverse_bytes_per_s is None else self.reverse_bytes_per_s,
        )

    @property
    def _waiting(self) -> float:
        return self.contention if self.latency_contention is None else self.latency_contention

    @property
    def contends(self) -> bool:
        """Whether computation loses anything to communication."""
        return max(self.contention, self._waiting) > 0

    def lost(self, latency_s: float, transfer_s: float) -> float:
        """Seconds of computation that a rank loses during so many seconds of latency and of transfer."""
        return self._waiting * latency_s + self.contention * transfer_s

    def time(self, payload_bytes: float, reverse: bool = False) -> float:
        """Seconds to move ``payload_bytes``; ``reverse``: from a higher to a lower rank."""
        latency_s, bytes_per_s = self._reverse if reverse else (self.latency_s, self.bytes_per_s)
        return latency_s + payload_bytes / bytes_per_s

    def slower(self, payload_bytes: float) -> float:
        """Seconds to move ``payload_bytes`` in the direction that takes longer."""
        return max(self.time(payload_bytes), self.time(payload_bytes, reverse=True))


@dataclass(frozen=True)
class Cluster:
    """Nodes with one kind of device, which may differ in speed and memory, and a link per level.

    Ranks are numbered node by node.

    ``links`` maps a level (node: within a node, rack: between nodes of a rack, site: between racks,
    wan: between sites) to its link. A level that is missing falls back to the next narrower one given.
    Above the node level the ranks of a node share one card per direction.
    """

    name: str
    device: Device
    nodes: tuple[Node, ...]
    links: dict[str, Link]
    collectives: dict[str, dict[str, Link]] = field(default_factory=dict)
    """By level and operation: latency and bandwidth that a collective of the library reaches there, fitted to
    measured times. They take the place of the link's in the operation's formula."""
    all_reduce: Algorithm = "ring"
    """The algorithm of the library's all-reduce."""

    def __post_init__(self) -> None:
        if not self.nodes:
            raise ClusterError(f"cluster {self.name} has no nodes; list at least one")
        for level in self.links:
            if level not in LEVELS:
                raise ClusterError(f"links.{level}: unknown level; use node, rack, site or wan")
        if "node" not in self.links:
            raise ClusterError("links.node: missing; give latency_s and bytes_per_s within a node")
        if len(self.nodes) > 1 and "rack" not in self.links:
            raise ClusterError("links.rack: missing; give latency_s and bytes_per_s between nodes")
        self._check_collectives()

    def _check_collectives(self) -> None:
        if self.all_reduce not in get_args(Algorithm):
            known = ", ".join(get_args(Algorithm))
            raise ClusterError(f"all_reduce: algorithm {self.all_reduce!r} is unknown; use {known}")
        for level, fitted in self.collectives.items():
            if level not in self.links:
                raise ClusterError(
                    f"collectives.{level}: there is no links.{level}; describe both, or leave it out"
                )
            for name in fitted:
                if name not in COLLECTIVES:
                    known = ", ".join(COLLECTIVES)
                    raise ClusterError(f"collectives.{level}.{name}: unknown operation; use {known}")

    @property
    def world(self) -> int:
        """Number of devices, one rank each."""
        return sum(node.devices for node in self.nodes)

    @cached_property
    def node_of(self) -> tuple[int, ...]:
        """Node index of every rank."""
        return tuple(i for i, node in enumerate(self.nodes) for _ in range(node.devices))

    @cached_property
    def _speeds(self) -> tuple[float, ...]:
        return tuple(
            factor
            for node in self.nodes
            for factor in (node.speed if isinstance(node.speed, tuple) else (node.speed,) * node.devices)
        )

    def speed(self, rank: int) -> float:
        """Speed of a rank's device relative to the device that the profile is of."""
        return self._speeds[rank]

    def memory_bytes(self, rank: int) -> float:
        """Memory of a rank's device."""
        own = self.nodes[self.node_of[rank]].memory_bytes
        return self.device.memory_bytes if own is None else own

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

    def link(self, level: Level, operation: Collective | None = None) -> Link:
        """The link of a level, or the next narrower one given; with ``operation`` its fitted one, if any."""
        for candidate in reversed(LEVELS[: LEVELS.index(level) + 1]):
            if candidate in self.links:
                fitted = self.collectives.get(candidate, {})
                return fitted.get(operation or "", self.links[candidate])
        raise ClusterError(f"links.{level}: missing")

    @cached_property
    def fingerprint(self) -> str:
        """Hash over everything the cluster says."""
        return hashlib.sha256(json.dumps(to_data(self), sort_keys=True).encode()).hexdigest()[:16]
