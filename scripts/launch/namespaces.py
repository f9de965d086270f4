"""Several hosts on one machine: network namespaces on a bridge, with links of a limited rate in both directions.

Linux only: needs root, and ``ip``, ``tc`` and ``nsenter``. Nothing but the standard library is used.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from types import TracebackType

TOOLS = ("ip", "tc", "nsenter")
INTERFACE = "eth0"
"""Of every host, to the others."""
QUEUE = ("burst", "512kb", "latency", "50ms")
"""Of a token bucket: what passes at once, and how long a packet waits before it is dropped."""
EMPTIED_S = 10.0
"""A killed process leaves its namespace within this time."""
_numbers = itertools.count()


class HostsError(Exception):
    """There can be no hosts here; says what is missing and what would help."""


class Hosts:
    """Hosts that are connected by a bridge; a context manager that removes them, with what runs on them.

    Args:
        count: how many.
        rate: of each host's link, each way, as ``tc`` writes it (``3.3gbit``); None: no limit.
        inside: of what the processes of one host send each other; None: no limit.

    Raises HostsError, leaving nothing behind, without root, without the tools, and where the kernel refuses.
    """

    def __init__(self, count: int, rate: str | None = None, inside: str | None = None) -> None:
        _require()
        prefix = f"hp{os.getpid()}x{next(_numbers)}"
        self.names = [f"{prefix}-{number}" for number in range(count)]
        self._bridge = f"{prefix}-net"
        try:
            self._make(rate, inside)
        except BaseException:
            self.close()
            raise

    def address(self, host: int) -> str:
        """Return a host's address."""
        return f"10.77.{(host + 1) // 250}.{(host + 1) % 250}"

    def entry(self, host: int) -> list[str]:
        """Return what stands before a command that is to run on a host.

        ``nsenter``, unlike ``ip netns exec``, leaves /sys as it is, where limits of cores and memory are read.
        """
        return ["nsenter", f"--net=/run/netns/{self.names[host]}"]

    def close(self) -> None:
        """Kill what still runs on the hosts and remove them; may be called twice."""
        for name in (*self.names, self._bridge):
            _empty(name)
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)

    def __enter__(self) -> Hosts:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _make(self, rate: str | None, inside: str | None) -> None:
        bridge = self._bridge
        _run("ip", "netns", "add", bridge)
        _run("ip", "-n", bridge, "link", "add", "bridge", "type", "bridge")
        _run("ip", "-n", bridge, "link", "set", "bridge", "up")
        for number, name in enumerate(self.names):
            port, pair = f"port{number}", ("type", "veth", "peer", "name")
            _run("ip", "netns", "add", name)
            _run("ip", "link", "add", INTERFACE, "netns", name, *pair, port, "netns", bridge)
            _run("ip", "-n", name, "address", "add", f"{self.address(number)}/16", "dev", INTERFACE)
            for interface in ("lo", INTERFACE):
                _run("ip", "-n", name, "link", "set", interface, "up")
            _run("ip", "-n", bridge, "link", "set", port, "master", "bridge", "up")
            if rate is not None:
                _limit(name, INTERFACE, rate)
                _limit(bridge, port, rate)
            if inside is not None:
                _limit(name, "lo", inside)


def _require() -> None:
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        raise HostsError(f"hosts need {', '.join(missing)} (packages iproute2 and util-linux); install them")
    if os.geteuid() != 0:
        raise HostsError("hosts are network namespaces, which only root may make; run as root")


def _limit(namespace: str, interface: str, rate: str) -> None:
    _run("tc", "-n", namespace, "qdisc", "add", "dev", interface, "root", "tbf", "rate", rate, *QUEUE)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip() or f"exit code {done.returncode}"
        raise HostsError(
            f"`{' '.join(command)}` failed: {said}; run on a machine whose kernel has network namespaces, veth, "
            "bridge and tbf, as root (in a container: a privileged one)"
        )


def _empty(name: str) -> None:
    """Kill the processes in a namespace and wait until they have left it."""
    deadline_s = time.monotonic() + EMPTIED_S
    while time.monotonic() < deadline_s:
        found = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False)
        pids = [int(word) for word in found.stdout.split()]
        if not pids:
            return
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
