"""The front of throughput against memory: nothing on it is beaten, and every point can be had."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from hybridpar import cli
from hybridpar.cluster.topology import Node
from hybridpar.errors import MemoryLimitError, PlanError
from hybridpar.planning.compile import compile as compile_program
from hybridpar.planning.costs import Costs
from hybridpar.planning.pareto import STEPS, Front, batches_between, front, undominated, with_memory
from hybridpar.planning.plan import validate
from hybridpar.planning.request import Pin, Request, Space
from hybridpar.planning.scorer import shortage
from hybridpar.planning.search import assess, search
from tests.support.paper import chain_of, cluster_of, profile_of

CHAIN = chain_of(8, 16, 8)
"""Narrow: a batch's activations weigh as much as the parameters, and plans can trade memory for time."""
PROFILE = replace(profile_of(CHAIN), dtype="float64")
TWO = cluster_of(2, bytes_per_s=1e4, memory_bytes=1e9)
REQUEST = Request(
    16, precision="float64", effort="exact", space=Space(in_flight=(None,), micro_batches=(1, 4, 16))
)


@pytest.fixture(scope="module")
def found() -> Front:
    return front(CHAIN, PROFILE, TWO, REQUEST, (8, 16))


def test_no_point_beats_another(found: Front) -> None:
    assert len(found.points) > 2
    for a, b in combinations(found.points, 2):
        assert not a.dominates(b)
        assert not b.dominates(a)
    memory = [point.memory_bytes for point in found.points]
    assert memory == sorted(memory)


def test_every_point_is_a_plan_for_its_limit(found: Front) -> None:
    """The limit alone gives the plan again, and the plan fits it."""
    for point in found.points:
        small = with_memory(TWO, point.limit_bytes)
        validate(point.plan, CHAIN)
        assert assess(point.plan, CHAIN, PROFILE, small) == point.plan
        assert point.memory_bytes <= point.limit_bytes
        batch = point.plan.global_batch
        assert search(CHAIN, PROFILE, small, replace(REQUEST, global_batch=batch)).plan == point.plan


def test_the_memory_of_a_point_is_what_has_to_fit(found: Front) -> None:
    for point in found.points:
        program = compile_program(point.plan, CHAIN, point.plan.global_batch, "train")
        assert shortage(program, Costs(PROFILE, with_memory(TWO, point.memory_bytes))) is None
        assert shortage(program, Costs(PROFILE, with_memory(TWO, point.memory_bytes - 1))) is not None


def test_the_front_of_a_single_batch_ends_in_the_ordinary_plan() -> None:
    one = front(CHAIN, PROFILE, TWO, REQUEST, (16,))
    ordinary = search(CHAIN, PROFILE, TWO, REQUEST)
    assert one.points[-1].plan == ordinary.plan
    assert one.points[-1].limit_bytes == 1e9
    assert len(one.points) > 1
    assert one.searches <= 1 + STEPS


def test_batches_without_a_plan_are_named_and_the_others_stay() -> None:
    pinned = replace(REQUEST, pins={"front": Pin(micro_batch=8)}, shape="data_parallel")
    some = front(CHAIN, PROFILE, TWO, pinned, (8, 16))
    assert {point.plan.global_batch for point in some.points} == {16}
    ((batch, reason),) = some.refused
    assert batch == 8
    assert "micro_batch" in reason
    with pytest.raises(PlanError, match="micro_batch"):
        front(CHAIN, PROFILE, TWO, pinned, (4, 8))
    with pytest.raises(MemoryLimitError):
        front(CHAIN, PROFILE, with_memory(TWO, 8.0), REQUEST, (8,))


def test_equal_and_beaten_points_are_left_out(found: Front) -> None:
    small, large = found.points[0], found.points[-1]
    beaten = replace(large, memory_bytes=large.memory_bytes + 1)
    assert large.dominates(beaten)
    assert not large.dominates(large)
    twin = replace(small, limit_bytes=small.limit_bytes + 1)
    assert undominated([beaten, large, small, twin]) == (small, large)


@pytest.mark.parametrize(
    ("least", "most", "configured", "batches"),
    [
        (32, 256, 64, (32, 64, 128, 256)),
        (24, 100, 48, (24, 32, 48, 64, 100)),
        (5, 5, 64, (5,)),
        (1, 3, 2, (1, 2, 3)),
    ],
)
def test_a_range_has_its_ends_powers_of_two_and_the_configured_batch(
    least: int, most: int, configured: int, batches: tuple[int, ...]
) -> None:
    assert batches_between(least, most, configured) == batches


def test_memory_is_lowered_on_every_node() -> None:
    cluster = replace(TWO, nodes=(Node(1, memory_bytes=5e8), Node(1)))
    assert [with_memory(cluster, 1e8).memory_bytes(r) for r in (0, 1)] == [1e8, 1e8]
    assert [with_memory(cluster, 7e8).memory_bytes(r) for r in (0, 1)] == [5e8, 7e8]


# The command


SMALL = (
    "model=small_vgg",
    "cluster=p100_4x1_40g",
    "plan=data_parallel",
    "plan.effort=quick",
    "plan.least_micro_batch=4",
)
RANGE = (*SMALL, "plan.global_batch_range=[16,32]")


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        cli.main(("plan", *arguments))
    out, err = capsys.readouterr()
    assert ended.value.code == 0, err
    return out


def test_the_table_has_a_row_per_point_and_the_data_its_plans(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "front.json"
    printed = run(capsys, *RANGE, f"out={file}", f"pictures={tmp_path}")
    data = json.loads(file.read_text())
    rows = [line for line in printed.splitlines() if "data_parallel" in line]
    assert len(rows) == len(data["points"]) > 1
    assert {point["global_batch"] for point in data["points"]} <= {16, 32}
    assert data["without_plan"] == []
    root = ET.fromstring((tmp_path / "pareto.svg").read_text())  # noqa: S314 - our own
    text = " ".join(root.itertext())
    assert "samples/s" in text
    assert "global batch 16" in text
    assert (tmp_path / "pareto.png").stat().st_size > 1000


def test_a_row_can_be_planned_again_alone(capsys: pytest.CaptureFixture[str]) -> None:
    data = json.loads(run(capsys, *RANGE, "format=json"))
    point = data["points"][0]
    again = run(
        capsys,
        *SMALL,
        f"train.global_batch={point['global_batch']}",
        f"cluster.device.memory_bytes={point['limit_bytes']:.0f}",
        "format=json",
    )
    assert json.loads(again) == point["plan"]
