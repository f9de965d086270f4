"""The cluster bench's launches: ranks on hosts, their limits, what they saw, and how they fail."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from scripts.bench.beat import Beat
from scripts.bench.cluster.cell import Entry, Round
from scripts.bench.cluster.folder import Folder
from scripts.bench.cluster.runner import Runner, Steps
from scripts.bench.cluster.setting import Setting
from tests.support.cluster_worker import SENT_BYTES
from tests.support.hosts import needs_hosts

SETTING = Setting("small", hosts=2, ranks_per_host=2, gbit_per_s=10.0, cores=0.4)
WORKER = ("-m", "tests.support.cluster_worker")


@pytest.fixture
def runner(tmp_path: Path) -> Iterator[Runner]:
    beat = Beat(tmp_path / "beats.tsv")  # not entered: this is not about time
    yield Runner(Folder(tmp_path), beat, lambda name: name == "alone", WORKER)
    left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    assert f"hp{os.getpid()}x" not in left


def launched(runner: Runner, setting: Setting, contestant: str = "fake", **options: float) -> Round:
    entry = Entry(contestant, contestant, {"step_s": 1.0, **options})
    return runner.run("launch", setting, entry, Steps(timed=4, losses=2), 3)


@needs_hosts
def test_ranks_are_on_their_hosts_and_count_what_goes_over_the_wire(runner: Runner, tmp_path: Path) -> None:
    taken = launched(runner, SETTING)
    assert taken.error is None
    assert taken.number == 3
    about = [json.loads((tmp_path / f"launches/launch/about{rank}.json").read_text()) for rank in range(4)]
    assert [a["environment"] for a in about] == [
        {"RANK": str(r), "LOCAL_RANK": str(r % 2), "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": str(r // 2)}
        for r in range(4)
    ]
    for rank, own in enumerate(about):
        before, after = own["cgroups"]
        assert f"-rank{rank}" not in before
        assert f"-rank{rank}" in after
    assert taken.steps_s == [4.0] * 4
    assert taken.cpu_s == [4.0] * 4
    # Every host has two ranks that send; headers and acknowledgements come on top.
    for counted in (taken.sent_bytes("eth0", 2), taken.received_bytes("eth0", 2)):
        assert len(counted) == 2
        assert counted == pytest.approx([2 * SENT_BYTES / 4] * 2, rel=0.1)
    assert taken.sent_bytes("lo", 2) == [0, 0]


@needs_hosts
def test_who_runs_alone_is_one_process(runner: Runner) -> None:
    taken = launched(runner, SETTING, "alone")
    assert taken.error is None
    assert len(taken.ranks) == 1


@needs_hosts
def test_a_rank_that_fails_ends_the_launch_with_its_error(runner: Runner) -> None:
    taken = launched(runner, SETTING, fail=1)
    assert taken.ranks == ()
    assert taken.error is not None
    assert "rank 1 ended with 1; ValueError: told to fail" in taken.error


@needs_hosts
def test_a_rank_that_is_killed_by_others_is_told(runner: Runner) -> None:
    taken = launched(runner, SETTING, die=0)
    assert taken.error is not None
    assert "rank 0 was ended by SIGKILL" in taken.error


@needs_hosts
def test_a_rank_that_takes_too_much_memory_is_told(runner: Runner) -> None:
    taken = launched(runner, replace(SETTING, ranks_per_host=1, memory_mb=100), hog=2**28)
    assert taken.error is not None
    assert "took more memory than 100 MB" in taken.error
