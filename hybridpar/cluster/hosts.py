"""Where the ranks of a job run: what each tells of itself, and the nodes that follow."""

from __future__ import annotations

import itertools
import math
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hybridpar.cluster.limits import Limit, cpu_limit, memory_limit
from hybridpar.cluster.topology import LEVELS, Cluster, Device, Link, Node
from hybridpar.errors import ClusterError

_EQUAL = 0.05
"""Memories that differ by less than this share are the same."""


@dataclass(frozen=True)
class Host:
    """What a rank knows of the place where it runs."""

    place: tuple[str, ...]
    """Equal on the ranks of one node: launcher's agent, host name, network namespace."""
    machine: str
    """Equal on all that share what has no other limit: the host name."""
    device: Device
    cpu: Limit
    machine_cores: int
    memory: Limit
    """Of the device."""

    @staticmethod
    def here(device: Device, agent: int, root: Path = Path("/")) -> Host:
        """Describe this process on ``device``, started by the launcher's agent number ``agent``."""
        namespace = root / "proc/self/ns/net"
        network = str(namespace.readlink()) if namespace.is_symlink() else ""
        memory = (
            memory_limit(root) if device.kind == "cpu" else Limit(device.memory_bytes, f"device of {os.getpid()}")
        )
        machine = socket.gethostname()
        return Host((str(agent), machine, network), machine, device, cpu_limit(root), os.cpu_count() or 1, memory)


def unprobed(hosts: Sequence[Host], nodes: Sequence[Node], link: Link) -> Cluster:
    """Return the cluster of ``nodes`` with rank 0's device and ``link`` on all levels, for a probe to measure.

    A memory that is the same on all nodes is the device's. Of a core that a quota grants in part, the device is
    that part.
    """
    sizes = [node.memory_bytes for node in nodes if node.memory_bytes is not None]
    least, most = min(sizes), max(sizes)
    if most <= least * (1 + _EQUAL):
        nodes = [replace(node, memory_bytes=None) for node in nodes]
    device = replace(_share(hosts[0]), memory_bytes=least)
    name = f"probed_{len(nodes)}x{max(node.devices for node in nodes)}"
    return Cluster(name, device, tuple(nodes), dict.fromkeys(LEVELS, link))


def _share(host: Host) -> Device:
    """Return a host's device as fast as its process may use it."""
    device, share = host.device, min(1.0, host.cpu.amount)
    if device.kind != "cpu" or share == 1.0:
        return device
    return replace(
        device,
        flops_per_s={dtype: rate * share for dtype, rate in device.flops_per_s.items()},
        memory_bytes_per_s=device.memory_bytes_per_s * share,
        overhead_s=device.overhead_s / share,
        action_s=device.action_s / share,
    )


def make_nodes(
    hosts: Sequence[Host],
    ranks_per_node: int | None = None,
    racks: Sequence[str] | None = None,
    sites: Sequence[str] | None = None,
) -> tuple[Node, ...]:
    """Group the ranks' hosts, in rank order, into nodes.

    A node is a run of ranks with one agent, host name and network namespace, or ``ranks_per_node`` ranks.
    ``racks`` and ``sites`` name the place of every node. Raises ClusterError where ranks are not numbered node by
    node, and where the given values do not fit.
    """
    if ranks_per_node is None:
        groups = [tuple(same) for _, same in itertools.groupby(hosts, key=lambda host: host.place)]
        if len({group[0].place for group in groups}) < len(groups):
            raise ClusterError(
                "ranks are not numbered node by node; a node's ranks must follow each other, as with torchrun"
            )
    elif len(hosts) % ranks_per_node:
        raise ClusterError(
            f"probe.ranks_per_node: {ranks_per_node} does not divide the {len(hosts)} ranks; "
            "leave it null to find the nodes by host name"
        )
    else:
        groups = [tuple(hosts[i : i + ranks_per_node]) for i in range(0, len(hosts), ranks_per_node)]
    for name, given in (("racks", racks), ("sites", sites)):
        if given is not None and len(given) != len(groups):
            raise ClusterError(f"probe.{name}: {len(given)} names for {len(groups)} nodes; give one each, or null")
    return tuple(
        Node(
            len(group),
            _cores(group, hosts),
            racks[i] if racks is not None else "rack0",
            sites[i] if sites is not None else "site0",
            memory_bytes=_memory_bytes(group, hosts),
        )
        for i, group in enumerate(groups)
    )


def _cores(group: Sequence[Host], everyone: Sequence[Host]) -> int | None:
    """Cores that a node's ranks share; None where each has its own, by a quota, by its CPUs, or on a GPU.

    Ranks have their own where every one is limited by something else and the machine can give to all at once.
    """
    if group[0].device.kind != "cpu":
        return None
    sharers = [sum(_owner(h, h.cpu) == _owner(host, host.cpu) for h in everyone) for host in group]
    total = sum(host.cpu.amount / n for host, n in zip(group, sharers, strict=True))
    machine = max(host.machine_cores for host in group)
    if set(sharers) == {1} and all(host.cpu.owner for host in group) and total <= machine:
        return None
    return max(1, math.floor(min(total, machine)))


def _memory_bytes(group: Sequence[Host], everyone: Sequence[Host]) -> float:
    """Memory of each of a node's devices: the least of their limits, each shared by all that it is set for."""
    return min(
        host.memory.amount / sum(_owner(h, h.memory) == _owner(host, host.memory) for h in everyone)
        for host in group
    )


def _owner(host: Host, limit: Limit) -> tuple[str, str]:
    return host.machine, limit.owner
