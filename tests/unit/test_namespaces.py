"""Hosts that are network namespaces: what they are, and that nothing of them stays."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from scripts.bench.cgroups import Cgroups
from scripts.launch.namespaces import Hosts, HostsError
from tests.support.hosts import needs_hosts

_LISTEN = """
import socket
server = socket.create_server(("", 5000))
print("ready", flush=True)
connection, (address, _) = server.accept()
connection.sendall(f"from {address}".encode())
"""
_CALL = """
import socket
def call(address):
    print(socket.create_connection((address, 5000)).recv(100).decode())
"""


def on(hosts: Hosts, host: int, *command: str) -> str:
    """What a command prints on a host."""
    return subprocess.run([*hosts.entry(host), *command], capture_output=True, text=True, check=True).stdout


def namespaces_now() -> str:
    return subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout


@needs_hosts
def test_hosts_reach_each_other_over_limited_links_both_ways() -> None:
    with Hosts(3, "2gbit", "5gbit") as hosts:
        assert hosts.address(2) == "10.77.0.3"
        listener = subprocess.Popen(
            [*hosts.entry(2), sys.executable, "-c", _LISTEN], stdout=subprocess.PIPE, text=True
        )
        assert listener.stdout is not None
        assert listener.stdout.readline() == "ready\n"
        said = on(hosts, 0, sys.executable, "-c", f"{_CALL}call({hosts.address(2)!r})")
        assert said == "from 10.77.0.1\n"
        assert listener.communicate() == ("", None)
        bridge = f"{hosts.names[0].removesuffix('-0')}-net"
        for name, interface, rate in [
            (hosts.names[1], "eth0", 2),
            (bridge, "port1", 2),
            (hosts.names[1], "lo", 5),
        ]:
            shown = subprocess.run(
                ["tc", "-n", name, "qdisc", "show", "dev", interface], capture_output=True, text=True, check=True
            )
            assert "tbf" in shown.stdout
            assert f"rate {rate}Gbit" in shown.stdout
    assert hosts.names[0] not in namespaces_now()


@needs_hosts
def test_hosts_go_with_what_runs_on_them() -> None:
    started: list[subprocess.Popen[bytes]] = []
    hosts = Hosts(1)

    def work() -> None:
        with hosts:
            started.append(subprocess.Popen([*hosts.entry(0), "sleep", "60"]))
            while on(hosts, 0, "ip", "netns", "pids", hosts.names[0]).count("\n") < 1:
                pass
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work()
    assert started[0].wait(10) == -9
    assert hosts.names[0] not in namespaces_now()


@needs_hosts
def test_what_the_kernel_refuses_leaves_nothing() -> None:
    with pytest.raises(HostsError, match="rate fast"):
        Hosts(2, "fast")
    assert f"hp{os.getpid()}" not in namespaces_now()


@needs_hosts
def test_who_takes_more_memory_than_its_limit_is_killed_and_told() -> None:
    hungry = "import time; time.sleep(0.3); x = bytearray(300_000_000)"
    with Cgroups([0.5, 0.5], memory_bytes=150_000_000) as groups:
        workers = [subprocess.Popen([sys.executable, "-c", code]) for code in ("pass", hungry)]
        for rank, worker in enumerate(workers):
            groups.admit(rank, worker.pid, late=True)
        assert [worker.wait() for worker in workers] == [0, -9]
        assert groups.out_of_memory() == [1]
    assert not any(folder.exists() for folder in groups.memory_folders)


def test_without_root_or_tools_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda tool: None if tool == "tc" else tool)
    with pytest.raises(HostsError, match="hosts need tc"):
        Hosts(2)
    monkeypatch.setattr(shutil, "which", lambda tool: tool)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(HostsError, match="run as root"):
        Hosts(2)
