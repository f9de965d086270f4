"""A job on several hosts, which are network namespaces here: what docs/launch.md tells is so."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.processes import ROOT
from tests.support.runs import COMMON

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("nsenter"),
        reason="needs root, ip, nsenter",
    ),
]


KILL = """
import os, signal
if os.environ.get("GROUP_RANK") == "1" and os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0":
    from hybridpar.runtime.job import Job
    step = Job.step
    def killed(job, *given, **more):
        if job.steps == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(job, *given, **more)
    Job.step = killed
"""
"""Kills the rank of the second host in its eighth step, once."""


def on_hosts(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        [str(ROOT / "scripts/launch/hosts"), *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "PATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def test_two_hosts_of_two_ranks_train(tmp_path: Path) -> None:
    done = on_hosts(
        "train", *COMMON, "plan=three_stage", "plan.effort=quick", f"run.dir={tmp_path}", RANKS="2", RATE="1gbit"
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["world"], summary["steps"]) == (4, 3)


def test_a_job_goes_on_where_a_rank_of_one_host_is_killed(tmp_path: Path) -> None:
    """The other host's launcher counts no restart; the job is a restarted one there too."""
    job = (*COMMON, "train.steps=60", "checkpoint.every=2", "plan=front_tail", "plan.effort=quick")
    (tmp_path / "sitecustomize.py").write_text(KILL)
    done = on_hosts(
        "train", *job, f"run.dir={tmp_path}/cut", "train.mode=plain", PYTHONPATH=f"{tmp_path}:{ROOT}", RESTARTS="1"
    )
    assert done.returncode == 0, done.stderr
    assert "continuing after step" in done.stdout
    assert on_hosts("train", *job, f"run.dir={tmp_path}/whole").returncode == 0
    cut, whole = ((tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("cut", "whole"))
    assert [json.loads(line)["loss"] for line in cut] == [json.loads(line)["loss"] for line in whole]


def test_restarts_that_would_hang_are_refused() -> None:
    done = on_hosts("train", *COMMON, RESTARTS="1", TORCH_DISABLE_SHARE_RDZV_TCP_STORE="0")
    assert done.returncode != 0
    assert "set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun, on every node" in done.stderr


def test_the_doctor_says_what_an_interface_that_is_not_named_does() -> None:
    fine = on_hosts("doctor", "format=json", "train.device=cpu")
    data = json.loads(fine.stdout)
    assert [rank["interface"] for rank in data["ranks"]] == ["eth0 (10.77.0.1)", "eth0 (10.77.0.2)"]
    assert [rank["unreachable"] for rank in data["ranks"]] == [[], []]
    lost = on_hosts("doctor", "format=json", "train.device=cpu", IFNAME="lo")
    assert lost.returncode == 1
    data = json.loads(lost.stdout)
    assert all(len(rank["unreachable"]) == 1 for rank in data["ranks"])
    wrong = [f["what"] for f in data["findings"] if f["status"] == "wrong"]
    assert "GLOO_SOCKET_IFNAME=lo is the loopback, which reaches no other node" in wrong
    assert "2 of 2 ranks do not reach all others" in wrong
