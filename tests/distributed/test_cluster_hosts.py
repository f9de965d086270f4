"""The cluster bench in small, for real: two hosts, the same work by everybody, and its bytes on the wire."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from hybridpar.cluster.describe import local
from hybridpar.cluster.topology import Link, Node
from hybridpar.model.chain import Chain
from hybridpar.planning.plan import Plan
from hybridpar.planning.request import Request
from hybridpar.planning.search import search
from hybridpar.profiling.analytic import estimate
from scripts.bench.beat import Beat
from scripts.bench.cluster import parity
from scripts.bench.cluster.cell import Entry
from scripts.bench.cluster.contestants.floor import Floor
from scripts.bench.cluster.folder import Folder
from scripts.bench.cluster.runner import Runner, Steps
from scripts.bench.cluster.tables import TABLES
from scripts.bench.cluster.training import comparable_work_of
from tests.support.hosts import needs_hosts
from tests.support.runs import ROOT

(SETTING,) = TABLES["small"]
OVERHEAD = 0.06
"""Headers, acknowledgements and barriers, as a share of what is sent."""


def front_tail(chain: Chain) -> Plan:
    """A plan for two hosts of one rank, with its prediction."""
    link = Link(1e-4, 125e6)
    cluster = replace(local(2, "cpu"), nodes=(Node(1), Node(1)), links=dict.fromkeys(("node", "rack"), link))
    request = Request(SETTING.global_batch, shape="front_tail", effort="quick")
    return search(chain, estimate(chain, cluster.device, "float32"), cluster, request).plan


@needs_hosts
def test_contestants_do_the_same_work_with_the_bytes_that_were_told(tmp_path: Path) -> None:
    work = comparable_work_of(SETTING)
    chain, loop = work.traced.chain, Floor(work, micro_batch=4)
    plan = front_tail(chain)
    plan.save(tmp_path / "plan.json")
    assert plan.prediction is not None
    parameters = sum(p.count for layer in chain.layers for p in layer.parameters)
    single = [loop.step(*work.samples(step)) for step in range(parity.STEPS)]
    runner = Runner(Folder(tmp_path), Beat(tmp_path / "beats.tsv"), lambda _: False)
    ours = {"plan": str(tmp_path / "plan.json")}
    for name, options, wire_bytes in [
        ("hybridpar", ours, plan.prediction.wire_bytes),
        ("ddp", {}, SETTING.hosts * 4 * parameters),  # a ring of two: every host sends as much as there is to sum
    ]:
        taken = runner.run(name, SETTING, Entry(name, name, options), Steps(0, 3, parity.STEPS))
        assert taken.error is None
        assert len(taken.steps_s) == 3
        assert parity.difference(taken.ranks[0]["losses"], single) < parity.AGREEMENT
        assert wire_bytes <= sum(taken.sent_bytes("eth0", 1)) <= wire_bytes * (1 + OVERHEAD)


@needs_hosts
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_command_makes_a_table_and_goes_on_where_it_was(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- cluster:small -->\n<!-- /cluster:small -->\n")
    short = ["--rounds", "1", "--profile-s", "4", "--probe-s", "4", "--tuning-s", "1"]
    names = ["--contestants", "ddp", "hybridpar", "floor"]
    command = [sys.executable, "-m", "scripts.bench.cluster", "small", *short, *names, "--out", str(tmp_path)]
    for launches in (True, False):
        done = subprocess.run(
            [*command, "--docs", str(page)], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode in {0, 1}, done.stderr
        assert ("round 1" in done.stderr) == launches
        assert "| same losses as one process | 1e-5 (lossy ones apart) | all | yes |" in page.read_text()
    cells = json.loads((tmp_path / "page-small.json").read_text())
    assert {"ddp", "floor", "hybridpar"} < {cell["entry"]["name"] for cell in cells}
    assert (tmp_path / "page-small.svg").exists()
