"""A rank that comes to no communication is named, with what the others wait for."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import cast

import pytest
import torch.distributed as dist

from hybridpar.errors import StuckError
from hybridpar.runtime.executor import ActionError
from hybridpar.runtime.process import _limit, _stuck, is_timeout
from hybridpar.runtime.saver import Saver
from hybridpar.sections import CheckpointConfig
from tests.support.processes import ROOT
from tests.support.runs import WORKER

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


def test_other_limits_are_not_told_as_that_of_a_communication(tmp_path: Path) -> None:
    """Those of the store, through which ranks plan, and of a save were once told as ``train.timeout_s``."""
    waiting = dist.DistStoreError("wait timeout after 7200000ms, keys: /shared/3")
    assert is_timeout(waiting)
    assert _limit(waiting, timedelta(seconds=4)) is None
    assert _limit(RuntimeError("Timed out waiting 4000ms"), timedelta(seconds=4)) == 4
    told = _stuck(waiting, ["rank 2 (process 7 on host)"], None)
    assert "the ranks wait 2:00:00 at most for each other to plan" in told
    assert "see what rank 2 (process 7 on host) does" in told
    assert "timeout_s" not in told

    class Late:
        def allreduce(self, _: object) -> Late:
            return self

        def wait(self) -> None:
            raise RuntimeError("Timed out waiting 1800000ms for send operation to complete")

    saver = Saver(tmp_path, CheckpointConfig(every=1), 0, cast("dist.ProcessGroup", Late()))
    with pytest.raises(
        StuckError, match=r"has not written its part of a checkpoint to .* within 0:30:00; look at"
    ):
        saver._agree(failed=False)


def test_what_is_no_timeout_is_not_taken_for_one() -> None:
    assert is_timeout(ActionError("rank 0 failed in 'wait send': Timed out waiting 4000ms for send operation"))
    assert not is_timeout(ActionError("rank 0 failed in 'wait send': Connection closed by peer"))
    assert not is_timeout(ValueError("timeout"))


def test_without_a_stuck_rank_the_network_is_suspected() -> None:
    text = _stuck(RuntimeError("rank 0 failed: timed out\nmore"), [], 120.0)
    assert text.startswith("rank 0 failed: timed out; every rank waited for another for 120 s")
    assert "GLOO_SOCKET_IFNAME" in text
