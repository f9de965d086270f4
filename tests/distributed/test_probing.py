"""The probe in real processes: a description that plans, and errors before any work."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import yaml

from hybridpar.cluster import describe
from hybridpar.cluster.topology import COLLECTIVES
from hybridpar.config import compose
from hybridpar.planner import make_plan, prepare

ROOT = Path(__file__).parents[2]


def run(arguments: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", **environment},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )


def probe(ranks: int, folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m", "hybridpar", "probe"]
    return run([*launcher, "train.device=cpu", *overrides], folder)


def test_two_ranks_give_a_cluster_that_plans(tmp_path: Path) -> None:
    done = probe(2, tmp_path, "probe.budget_s=3")
    assert done.returncode == 0, done.stderr
    cluster = describe.load(tmp_path / "cluster.yaml")
    assert cluster.world == 2
    assert set(cluster.links) == {"node"}
    assert set(cluster.collectives["node"]) == set(COLLECTIVES)
    assert "probing messages, level node" in done.stderr
    assert done.stderr.count("probing the devices") == 1, "rank 0 alone reports"
    assert "all_reduce" in done.stdout
    config = compose(["model=small_vgg", "cluster=from_file", f"cluster.path={tmp_path / 'cluster.yaml'}"])
    assert make_plan(config, prepare(config)).plan.world == 2


def test_four_ranks_as_nodes_of_their_own_are_measured_between_nodes(tmp_path: Path) -> None:
    done = probe(4, tmp_path, "probe.budget_s=4", "probe.ranks_per_node=2", "probe.out=c.yaml")
    assert done.returncode == 0, done.stderr
    cluster = describe.load(tmp_path / "c.yaml")
    assert [node.devices for node in cluster.nodes] == [2, 2]
    assert set(cluster.links) == set(cluster.collectives) == {"node", "rack"}
    data = yaml.safe_load((tmp_path / "c.yaml").read_text())
    assert (data["source"], data["versions"]["backend"]) == ("measured", "gloo")
    assert len(data["measured"]["kernel_s"]) == 4
    assert {s["ranks"] for s in data["measured"]["series"] if s["what"] == "all_reduce"} == {2}


def test_a_file_that_cannot_be_written_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    done = probe(2, tmp_path, "probe.out=none/c.yaml")
    assert done.returncode != 0
    assert done.stderr.count("cannot write none/c.yaml: there is no folder") == 1
    assert "probing" not in done.stderr


def test_a_probe_of_one_process_is_told_how_to_start(tmp_path: Path) -> None:
    done = run(["hybridpar", "probe"], tmp_path)
    assert done.returncode == 2
    assert done.stderr == (
        "hybridpar: a probe measures the links between processes and needs at least 2; start it as "
        "torchrun --nproc-per-node 4 -m hybridpar probe\n"
    )


def test_keys_of_other_commands_are_named(tmp_path: Path) -> None:
    done = run(["hybridpar", "probe", "out=c.yaml"], tmp_path, WORLD_SIZE="2", RANK="0")
    assert done.returncode == 2
    assert "name its file with probe.out=c.yaml" in done.stderr
    done = run(["hybridpar", "probe", "probe.budget_s=0"], tmp_path)
    assert "probe.budget_s: 0.0 must be above 0 seconds" in done.stderr
