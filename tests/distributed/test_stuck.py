"""A rank that comes to no communication is named, with what the others wait for."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hybridpar.runtime.executor import ActionError
from hybridpar.runtime.process import _is_timeout, _stuck
from tests.support.runs import ROOT, WORKER

TIMEOUT_S = 4


@pytest.mark.parametrize(("shape", "rank", "how"), [("three_stage", 2, "stop"), ("three_stage", 0, "sleep")])
def test_a_rank_that_hangs_is_named(tmp_path: Path, shape: str, rank: int, how: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4", str(WORKER)]
    job = subprocess.Popen(
        [*command, shape, f"run.dir={tmp_path / 'run'}", f"train.timeout_s={TIMEOUT_S}", "train.mode=quiet"],
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "CUDA_VISIBLE_DEVICES": "",
            "HALT_RANK": str(rank),
            "HALT_BY": how,
        },
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    halted, told, said = 0, "", list[str]()
    with job:
        assert job.stderr is not None
        for line in job.stderr:
            said.append(line)
            if line.startswith("halted"):
                halted = int(line.split()[1])
            if "did not arrive" in line:
                told = line
                with contextlib.suppress(ProcessLookupError):
                    os.kill(halted, signal.SIGKILL)  # else torchrun would wait for it to end by itself
    assert job.returncode != 0
    assert re.match(r"hybridpar: rank [0-3]: rank [0-3] failed in 'wait ", told), said
    assert f"; rank {rank} (process {halted} on " in told
    assert len(re.findall(r"rank \d \(process", told)) == 1
    assert f"within {TIMEOUT_S} s" in told
    assert "raise train.timeout_s" in told


def test_what_is_no_timeout_is_not_taken_for_one() -> None:
    assert _is_timeout(ActionError("rank 0 failed in 'wait send': Timed out waiting 4000ms for send operation"))
    assert not _is_timeout(ActionError("rank 0 failed in 'wait send': Connection closed by peer"))
    assert not _is_timeout(ValueError("timeout"))


def test_without_a_stuck_rank_the_network_is_suspected() -> None:
    text = _stuck(RuntimeError("rank 0 failed: timed out\nmore"), [], 120.0)
    assert text.startswith("rank 0 failed: timed out; every rank waited for another for 120 s")
    assert "GLOO_SOCKET_IFNAME" in text
