"""The doctor: what it calls wrong, what it advises, and that it is quiet where all is well."""

from __future__ import annotations

import io
import json
import socket
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from rich.console import Console

from hybridpar.cluster.limits import Limit
from hybridpar.doctor import devices, machine, network, packages
from hybridpar.doctor.devices import Driver
from hybridpar.doctor.finding import Diagnosis, Finding, Rank, merge, ok, wrong
from hybridpar.doctor.network import Interface
from hybridpar.doctor.reach import Address, Listener, unreachable
from hybridpar.report import doctor as report
from tests.support.command import run

KNOWN = (
    Interface("eth0", ("10.0.0.7",)),
    Interface("ib0", ("10.1.0.7", "2001:db8::7")),
    Interface("lo", ("127.0.0.1",)),
)


def assert_wrong(found: Finding | None, what: str, remedy: str) -> None:
    assert found is not None
    assert found.status == "wrong"
    assert what in found.what
    assert remedy in (found.remedy or "")


# Packages


def test_versions_out_of_range_and_missing_packages_are_wrong() -> None:
    asked = [Requirement("torch>=2.11"), Requirement("hydra-core>=1.3.2,<1.4"), Requirement("rich>=13.7")]
    versions = {"torch": "2.14.1+cu130", "hydra-core": "1.4.0"}
    outside, missing = packages.compare(asked, versions.get)
    assert_wrong(outside, "hydra-core 1.4.0 lies outside", "pip install 'hydra-core<1.4,>=1.3.2'")
    assert_wrong(missing, "rich is not installed", "pip install 'rich>=13.7'")
    (fine,) = packages.compare(asked[:1], versions.get)
    assert fine == ok("packages", "1 package in range: torch 2.14.1+cu130, ...")


def test_an_extra_is_wrong_only_where_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    there = packages.installed
    monkeypatch.setattr(packages, "installed", lambda name: None if name == "deepspeed" else there(name))
    (noted,) = (f for f in packages.check_packages() if "deepspeed" in f.what)
    assert (noted.status, noted.remedy) == ("note", "pip install 'hybridpar[zero]'")
    assert_wrong(
        next(f for f in packages.check_packages({"zero"}) if "deepspeed" in f.what),
        "deepspeed is not installed",
        "pip install 'hybridpar[zero]'",
    )


def test_a_package_that_cannot_be_imported_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "vision_of_another_torch.py").write_text("raise RuntimeError('operator nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    assert packages.check_imports(["json"]) == []
    (found,) = packages.check_imports(["vision_of_another_torch"])
    assert_wrong(found, "operator nms does not exist", "together")


# Devices


def test_a_driver_that_is_too_old_for_torch() -> None:
    driver = Driver("550.54", (12, 4), ("0: H100, 79 GiB of 80 GiB free",))
    (old,) = devices.check_driver(driver, "13.0", monitored=False)
    assert_wrong(old, "driver 550.54 runs CUDA up to 12.4, but torch is built for CUDA 13.0", "torch for CUDA 12")
    fine = devices.check_driver(driver, "12.9", monitored=False)  # minor versions are compatible
    assert [f.status for f in fine] == ["ok", "ok"]
    assert "79 GiB of 80 GiB free" in fine[1].what


def test_no_driver_is_wrong_only_where_the_monitor_is_required() -> None:
    (noted,) = devices.check_driver("no library", "13.0", monitored=False)
    assert noted.status == "note"
    (required,) = devices.check_driver("no library", "13.0", monitored=True)
    assert_wrong(required, "no library", "monitor=auto")


def test_gpus_that_torch_does_not_see(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_count", lambda: 0)
    driver = Driver("580.1", (13, 0), ("0: A",) * 2)
    unseen = devices.check_torch(driver, "auto", 1, {})[1]
    assert unseen.status == "wrong"
    hidden = devices.check_torch(driver, "auto", 1, {"CUDA_VISIBLE_DEVICES": ""})[1]
    assert (hidden.status, hidden.what) == ("note", "CUDA_VISIBLE_DEVICES= leaves 0 of 2 GPUs")
    few = devices.check_torch("no driver", "cuda", 4, {})[-1]
    assert_wrong(few, "0 GPUs for 4 ranks per node", "train.device=cpu")
    assert [f.status for f in devices.check_torch("no driver", "auto", 4, {})] == ["ok"]


# Machine


def test_more_threads_than_cores() -> None:
    quota = Limit(2.0, "/sys/fs/cgroup/pod")
    found = machine.check_cores(quota, 64, 1, cpu=True)
    assert_wrong(found, "2 cores (/sys/fs/cgroup/pod), 1 rank with 64 threads each", "OMP_NUM_THREADS=2")
    assert machine.check_cores(quota, 2, 1, cpu=True).status == "ok"
    assert machine.check_cores(Limit(0.45), 1, 1, cpu=True).status == "ok"
    assert machine.check_cores(quota, 1, 4, cpu=True).status == "note"
    assert machine.check_cores(quota, 64, 1, cpu=False).status == "ok"


def test_too_few_file_descriptors() -> None:
    assert machine.check_files(8, 1024).status == "ok"
    assert_wrong(machine.check_files(512, 1024), "1024 file descriptors, but 512 ranks", "ulimit -n 8432")
    assert machine.check_files(512, -1).status == "ok"


def test_little_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.check_shared_memory(needed=True, path=tmp_path / "none").status == "note"
    monkeypatch.setattr(machine, "LEAST_SHARED_BYTES", 1 << 60)
    assert machine.check_shared_memory(needed=False, path=tmp_path).status == "note"
    assert_wrong(machine.check_shared_memory(needed=True, path=tmp_path), "too little", "--shm-size")


def test_a_run_folder_without_room_or_below_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.check_run_dir(tmp_path / "a" / "b").status == "ok"
    (tmp_path / "file").touch()
    assert_wrong(machine.check_run_dir(tmp_path / "file" / "run"), "cannot be made or written", "run.dir")
    monkeypatch.setattr(machine, "LEAST_FREE_BYTES", 1 << 60)
    assert_wrong(machine.check_run_dir(tmp_path), "too little", "run.dir")


# Network


@pytest.mark.parametrize(
    ("value", "nodes", "status"),
    [
        ("eth0", 2, "ok"),
        ("eth0,ib0", 2, "ok"),
        ("eth1", 1, "wrong"),
        ("eth", 1, "wrong"),
        ("^lo", 1, "wrong"),
        ("lo", 1, "note"),
        ("lo", 2, "wrong"),
    ],
)
def test_gloo_takes_exact_names(value: str, nodes: int, status: str) -> None:
    found = network.check_gloo({"GLOO_SOCKET_IFNAME": value}, KNOWN, nodes=nodes)
    assert found.status == status
    assert status != "wrong" or "one of eth0, ib0" in (found.remedy or "")


@pytest.mark.parametrize(
    ("value", "nodes", "status"),
    [
        ("eth", 2, "ok"),
        ("=eth0", 2, "ok"),
        ("=eth", 2, "wrong"),
        ("^lo", 2, "ok"),
        ("^=eth0,ib0", 2, "wrong"),
        ("lo", 1, "note"),
        ("ens", 1, "wrong"),
    ],
)
def test_nccl_takes_prefixes_and_exceptions(value: str, nodes: int, status: str) -> None:
    found = network.check_nccl({"NCCL_SOCKET_IFNAME": value}, KNOWN, nodes=nodes)
    assert found is not None
    assert found.status == status
    assert network.check_nccl({}, KNOWN, nodes=nodes) is None


def test_without_a_name_gloo_uses_the_address_of_the_host_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the loopback where the host name is not to be resolved: the trap of jobs of several nodes."""

    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert network.check_gloo({}, KNOWN, nodes=1).status == "note"
    assert_wrong(
        network.check_gloo({}, KNOWN, nodes=2), "gloo uses the loopback", "one of eth0, ib0 on every node"
    )
    lost = network.check_master({"MASTER_ADDR": "nowhere.invalid"}, nodes=2)
    assert_wrong(
        lost, "MASTER_ADDR=nowhere.invalid cannot be resolved: Name or service not known", "--rdzv-endpoint"
    )


def test_the_launchers_address() -> None:
    assert network.check_master({}, nodes=2) is None
    fine = network.check_master({"MASTER_ADDR": "127.0.0.1"}, nodes=1)
    assert fine is not None
    assert fine.status == "ok"
    assert_wrong(network.check_master({"MASTER_ADDR": "127.0.0.1"}, nodes=2), "is the loopback", "first node")


def test_no_interface_but_the_loopback() -> None:
    assert network.check_interfaces(KNOWN, nodes=2).what == "interfaces: eth0 (10.0.0.7), ib0 (10.1.0.7)"
    assert network.check_interfaces(KNOWN[2:], nodes=1).status == "note"
    assert network.check_interfaces(KNOWN[2:], nodes=2).status == "wrong"
    assert any(i.loopback for i in network.interfaces())


def test_who_answers_and_who_does_not() -> None:
    """A listener of this machine that is not the rank's own is no answer: every node has a loopback."""
    with Listener("127.0.0.1") as one, Listener("127.0.0.1") as other:
        strange = Address("127.0.0.1", other.address.port, "of a rank on another node")
        assert unreachable([one.address, other.address]) == ()
        (text,) = unreachable([one.address, strange])
        assert text == "rank 1 at 127.0.0.1: another process answers there"
    (closed,) = unreachable([one.address])
    assert closed == "rank 0 at 127.0.0.1: Connection refused"


# What is printed


def test_where_something_is_wrong_is_said_unless_it_is_everywhere() -> None:
    bad, fine = wrong("cores", "too many threads", "set OMP_NUM_THREADS=1"), ok("job", "ranks meet")
    ranks = tuple(
        Rank(f"host{n}", 40 + n, n, "cpu", f"eth0 (10.0.0.{n})", ("rank 0 at 10.0.0.0: refused",) * n)
        for n in (0, 1)
    )
    diagnosis = Diagnosis(merge([[fine], [bad, fine]]), ranks)
    console = Console(width=160, record=True, file=io.StringIO())
    report.show(diagnosis, console)
    text = console.export_text()
    assert "too many threads [node 1]; set OMP_NUM_THREADS=1" in text
    assert "ranks meet\n" in "\n".join(line.rstrip() for line in text.splitlines()) + "\n"
    assert "rank 1 does not reach rank 0 at 10.0.0.0: refused" in text
    assert "1 of 2" in text
    assert text.rstrip().endswith("1 thing wrong")
    data = report.as_data(diagnosis)
    assert (data["wrong"], data["findings"][1]["ranks"]) == (1, [1])


def test_the_command_tells_of_this_machine(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nosuch0")
    out, _ = run(capsys, "doctor", "format=json", code=1)
    data = json.loads(out)
    (bad,) = (f for f in data["findings"] if "nosuch0" in f["what"])
    assert bad["status"] == "wrong"
    assert {f["topic"] for f in data["findings"]} >= {
        "packages",
        "devices",
        "cores",
        "memory",
        "open files",
        "network",
    }
    assert data["ranks"] == []
    out, _ = run(capsys, "doctor", code=1)
    assert "GLOO_SOCKET_IFNAME=nosuch0 names an interface that is missing" in out
