"""Cgroups with a CPU quota per rank."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.bench import cgroups
from scripts.bench.cgroups import CgroupError, Cgroups, controller_root, group_of
from scripts.bench.children import ROOT


def able() -> bool:
    """Whether this process may make cgroups."""
    try:
        Cgroups([0.5]).close()
    except CgroupError:
        return False
    return True


needs_cgroups = pytest.mark.skipif(not able(), reason="needs root and a writable CPU controller")


def start(groups: Cgroups, rank: int, code: str) -> subprocess.Popen[str]:
    """A Python process that joins a rank's group as a torchrun worker does."""
    return subprocess.Popen(
        [sys.executable, *groups.entry, "-c", code],
        env={**os.environ, "RANK": str(rank)},
        stdout=subprocess.PIPE,
        text=True,
    )


def sleeper(groups: Cgroups) -> subprocess.Popen[str]:
    """A process that is in a group and sleeps."""
    worker = start(groups, 0, "import time; print('ready', flush=True); time.sleep(60)")
    assert worker.stdout is not None
    assert worker.stdout.readline() == "ready\n"
    return worker


@needs_cgroups
def test_a_rank_is_inside_its_own_group_with_its_threads_and_quota() -> None:
    code = "import os; print(os.getpid()); print(open('/proc/self/cgroup').read())"
    with Cgroups([0.45, 0.2]) as groups:
        first, second = (start(groups, rank, code).communicate()[0] for rank in (0, 1))
        names = [f.name for f in groups.folders]
        assert names[0] in first
        assert names[1] in second
        assert names[0] not in second
        quotas = [_quota(f) for f in groups.folders]
        assert quotas == [(4500, 10_000), (2000, 10_000)]
    assert not any(f.exists() for f in groups.folders)


@needs_cgroups
def test_a_worker_joins_when_it_is_ready() -> None:
    show = "print(open('/proc/self/cgroup').read(), '---')"
    code = f"from scripts.bench.cgroups import join_own; {show}; join_own(); {show}"
    with Cgroups([0.45, 0.2]) as groups:
        ran = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, **groups.environment, "RANK": "1", "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
        )
        before, after, _ = ran.stdout.split("---")
        assert groups.folders[1].name not in before
        assert groups.folders[1].name in after


def _quota(folder: Path) -> tuple[int, int]:
    if (folder / "cpu.max").exists():
        quota, period = (folder / "cpu.max").read_text().split()
        return int(quota), int(period)
    return int((folder / "cpu.cfs_quota_us").read_text()), int((folder / "cpu.cfs_period_us").read_text())


@needs_cgroups
def test_groups_go_and_their_processes_end_when_the_work_fails() -> None:
    started: list[subprocess.Popen[str]] = []
    groups = Cgroups([0.5])

    def work() -> None:
        with groups:
            started.append(sleeper(groups))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work()
    assert started[0].wait(10) == -9
    started[0].communicate()
    assert not groups.folders[0].exists()


@needs_cgroups
def test_the_quota_holds_a_busy_rank_back() -> None:
    """CPU seconds of a spinning process, which count the same on a busy machine, stay below its share."""
    code = (
        "import time\nend = time.perf_counter() + 1\nbefore = time.process_time()\n"
        "while time.perf_counter() < end: pass\nprint(time.process_time() - before)"
    )
    with Cgroups([0.2]) as groups:
        spent_s = float(start(groups, 0, code).communicate()[0])
    assert spent_s < 0.35


@pytest.mark.parametrize("cores", [[], [0.5, 0.01]])
def test_impossible_shares_are_refused(cores: list[float]) -> None:
    with pytest.raises(CgroupError, match=r"at least 0\.1"):
        Cgroups(cores)


def test_what_cannot_be_written_is_told_and_nothing_stays(tmp_path: Path) -> None:
    with pytest.raises(CgroupError, match="run as root"):
        Cgroups([0.5], root=tmp_path / "missing")
    assert list(tmp_path.iterdir()) == []


def test_where_the_controller_is(tmp_path: Path) -> None:
    unified = tmp_path / "unified"
    unified.mkdir()
    mounts = tmp_path / "mounts"
    second = f"cgroup2 {unified} cgroup2 rw 0 0\n"
    mounts.write_text(f"tmpfs /tmp tmpfs rw 0 0\n{second}")
    with pytest.raises(CgroupError, match="no cpu controller"):
        controller_root(mounts=mounts)
    (unified / "cgroup.controllers").write_text("cpuset cpu memory\n")
    assert controller_root(mounts=mounts) == unified
    mounts.write_text(f"{second}cgroup /first/cpu cgroup rw,relatime,cpu 0 0\n")
    assert controller_root(mounts=mounts) == Path("/first/cpu")
    mounts.write_text("cgroup /first/cpuset cgroup rw,cpuset 0 0\n")
    with pytest.raises(CgroupError):
        controller_root(mounts=mounts)


def test_the_folder_of_a_rank() -> None:
    assert group_of(Path("/groups/hybridpar-7"), 2) == Path("/groups/hybridpar-7-rank2")


@needs_cgroups
def test_a_group_that_does_not_empty_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed process that stays for ever cannot be had in a test; one that nobody kills stands for it."""
    groups = Cgroups([0.5])
    worker = sleeper(groups)
    with monkeypatch.context() as patched:
        patched.setattr(cgroups, "REMOVAL_S", 0.0)
        patched.setattr(cgroups, "_members", lambda _: [])
        with pytest.raises(CgroupError, match="cannot be removed"):
            groups.close()
    groups.close()
    worker.communicate()
    assert not groups.folders[0].exists()
