"""The network of a rank: its interfaces, what the backends would use of them, and the launcher's address."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass

import psutil

from hybridpar.doctor.finding import Finding, note, ok, wrong

_TOPIC = "network"
_FAMILIES = (socket.AF_INET, socket.AF_INET6)


@dataclass(frozen=True)
class Interface:
    """A network interface that is up."""

    name: str
    addresses: tuple[str, ...]
    """IPv4 first."""

    @property
    def loopback(self) -> bool:
        """Whether it ends in this machine."""
        return all(_local(address) for address in self.addresses)


def interfaces() -> tuple[Interface, ...]:
    """Return the interfaces that are up and have an address; link-local IPv6 addresses are left out."""
    up = psutil.net_if_stats()
    found = []
    for name, all_ in sorted(psutil.net_if_addrs().items()):
        known = [a.address for family in _FAMILIES for a in all_ if a.family == family]
        usable = tuple(a for a in known if not a.startswith("fe80"))
        if usable and name in up and up[name].isup:
            found.append(Interface(name, usable))
    return tuple(found)


def check_interfaces(known: tuple[Interface, ...], *, nodes: int) -> Finding:
    """Tell the interfaces; several nodes need one that leaves the machine."""
    outward = [f"{i.name} ({i.addresses[0]})" for i in known if not i.loopback]
    if outward:
        return ok(_TOPIC, f"interfaces: {', '.join(outward)}")
    if nodes > 1:
        return wrong(_TOPIC, "no interface but the loopback is up", "bring one up that reaches the other nodes")
    return note(_TOPIC, "no interface but the loopback is up: jobs of one node only")


def check_gloo(environment: Mapping[str, str], known: tuple[Interface, ...], *, nodes: int) -> Finding:
    """Compare GLOO_SOCKET_IFNAME, a list of names, with the interfaces; without it gloo asks the host name."""
    given = environment.get("GLOO_SOCKET_IFNAME", "")
    if given:
        return _named("GLOO_SOCKET_IFNAME", given, [_by_name(known, n) for n in given.split(",")], known, nodes)
    address = gloo_address(environment, known)
    if not _local(address):
        return ok(_TOPIC, f"gloo uses {_shown(address, known)}")
    what = f"gloo uses the loopback, as the host name {socket.gethostname()} is not that of another interface"
    if nodes > 1:
        return wrong(_TOPIC, what, f"set GLOO_SOCKET_IFNAME to one of {_outward(known)} on every node")
    return note(_TOPIC, f"{what}: jobs of one node only", "set GLOO_SOCKET_IFNAME for jobs of several nodes")


def check_nccl(environment: Mapping[str, str], known: tuple[Interface, ...], *, nodes: int) -> Finding | None:
    """Compare NCCL_SOCKET_IFNAME with the interfaces: ``eth`` is a prefix, ``=eth0`` a name, ``^`` all but."""
    given = environment.get("NCCL_SOCKET_IFNAME", "")
    if not given:
        return None
    others, exact = given.startswith("^"), given.lstrip("^").startswith("=")
    names = given.lstrip("^=").split(",")
    meant = [i for i in known if others != any(i.name == n if exact else i.name.startswith(n) for n in names)]
    return _named("NCCL_SOCKET_IFNAME", given, [*meant] or [None], known, nodes)


def _named(
    variable: str, value: str, meant: list[Interface | None], known: tuple[Interface, ...], nodes: int
) -> Finding:
    """Judge the interfaces that a variable names; None stands for one that is not there."""
    remedy = f"set {variable} to one of {_outward(known)}, or unset it"
    if None in meant:
        return wrong(
            _TOPIC, f"{variable}={value} names an interface that is missing, down or without address", remedy
        )
    if all(i is not None and i.loopback for i in meant):
        what = f"{variable}={value} is the loopback, which reaches no other node"
        return wrong(_TOPIC, what, remedy) if nodes > 1 else note(_TOPIC, what, remedy)
    return ok(_TOPIC, f"{variable}={value}")


def check_master(environment: Mapping[str, str], *, nodes: int) -> Finding | None:
    """Resolve MASTER_ADDR, the launcher's, if it is set."""
    name = environment.get("MASTER_ADDR")
    if name is None:
        return None
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except OSError as e:
        remedy = "give an address or a name that every node resolves (torchrun --rdzv-endpoint, --master-addr)"
        return wrong(_TOPIC, f"MASTER_ADDR={name} cannot be resolved: {e.strerror}", remedy)
    address = str(found[0][4][0])
    if nodes > 1 and _local(address):
        remedy = "launch with an address of the first node that the others reach"
        return wrong(
            _TOPIC, f"MASTER_ADDR={name} is the loopback ({address}), but there are {nodes} nodes", remedy
        )
    return ok(_TOPIC, f"MASTER_ADDR={name} is {address}")


def gloo_address(environment: Mapping[str, str], known: tuple[Interface, ...]) -> str:
    """Return the address that gloo binds: of its interface, else the host name's, else the loopback's.

    As ``ProcessGroupGloo::createDefaultDevice`` of PyTorch does it.
    """
    given = environment.get("GLOO_SOCKET_IFNAME", "")
    if given:
        interface = _by_name(known, given.split(",")[0])
        return interface.addresses[0] if interface else "127.0.0.1"
    try:
        found = socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)
    except OSError:
        return "127.0.0.1"
    return next((str(a[4][0]) for a in found if _binds(str(a[4][0]))), "127.0.0.1")


def shown_address(environment: Mapping[str, str], known: tuple[Interface, ...]) -> str:
    """Return gloo's address with the name of its interface."""
    return _shown(gloo_address(environment, known), known)


def _shown(address: str, known: tuple[Interface, ...]) -> str:
    name = next((i.name for i in known if address in i.addresses), "loopback" if _local(address) else "unknown")
    return f"{name} ({address})"


def _by_name(known: tuple[Interface, ...], name: str) -> Interface | None:
    return next((i for i in known if i.name == name), None)


def _outward(known: tuple[Interface, ...]) -> str:
    return ", ".join(i.name for i in known if not i.loopback) or "(none that leaves this machine is up)"


def _binds(address: str) -> bool:
    """Whether a socket of this machine can have the address."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as s:
        try:
            s.bind((address, 0))
        except OSError:
            return False
    return True


def _local(address: str) -> bool:
    return address.startswith("127.") or address == "::1"
