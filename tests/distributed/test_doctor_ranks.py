"""The doctor under torchrun: every rank, and whether they reach each other."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from tests.support.processes import ROOT


def test_ranks_tell_where_they_are_and_that_they_meet() -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3")
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "hybridpar", "doctor", "format=json", "train.device=cpu"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    data = json.loads(done.stdout)
    assert [rank["unreachable"] for rank in data["ranks"]] == [[], [], []]
    assert len({rank["process"] for rank in data["ranks"]}) == 3
    (met,) = (f for f in data["findings"] if f["topic"] == "job")
    assert (met["status"], met["ranks"]) == ("ok", [0, 1, 2])
    assert met["what"] == "3 ranks reach each other and communicate by gloo"
    (cores,) = (f for f in data["findings"] if f["topic"] == "cores")
    assert "3 ranks with 1 thread each" in cores["what"]
    assert (done.returncode == 0) == (data["wrong"] == 0), done.stderr
