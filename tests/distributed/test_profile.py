"""``hybridpar profile`` on several ranks at once."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from hybridpar.profiling.record import Profile

NARROW = (
    "model=small_vgg",
    "model.options.width=4",
    "model.options.classifier_width=16",
    "model.in_shape=[1,8,8]",
)
QUICK = ("train.device=cpu", "profile.cache=false", "profile.budget_s=60", "profile.micro_batches=[1,4]")


def test_two_ranks_under_torchrun_write_one_profile(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "hybridpar",
        "profile",
    ]
    done = subprocess.run(
        [*command, *NARROW, *QUICK, f"out={path}"], capture_output=True, text=True, check=False, timeout=200
    )
    assert done.returncode == 0, done.stderr
    profile = Profile.load(path)
    assert profile.micro_batches == (1, 4)
    assert len(profile.rank_speeds) == 2
    assert any(layer.rank_spread > 0 for layer in profile.layers)
    assert done.stderr.count("profile saved to") == 1
    assert len(re.findall(r"^round 1 through 2 sizes", done.stderr, re.MULTILINE)) == 1, "rank 0 alone tells"
