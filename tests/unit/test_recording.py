"""A recording in a report: curves, the distribution of occupancy, what went over the network for every step."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from hybridpar.monitor.record import Event, Traffic, to_line
from hybridpar.planning.costs import wire_bytes
from hybridpar.planning.program import Program
from hybridpar.report.account import Account
from hybridpar.report.comparison import programs_of
from hybridpar.report.devices import network_figure
from hybridpar.report.findings import Finding
from hybridpar.report.recording import BINS, Recording
from hybridpar.report.traffic import crossings, flows_of
from hybridpar.report.turns import turns_of
from tests.support.recordings import GIB, INTERVAL_S, NO_GPU, gpu_samples, host_samples, in_turns
from tests.support.reports import SLOWER, STEP_S, basis, ends, on_gpus, recorded, run_of
from tests.unit.test_course import plan_of


def told(account: Account, title: str) -> Finding:
    (finding,) = [f for f in account.findings if f.title == title]
    return finding


def test_a_gpu_has_curves_and_a_distribution() -> None:
    full, half_empty = recorded(list(gpu_samples(400))).gpus
    assert full.below_half == 0.0
    assert half_empty.below_half == 0.75
    assert sum(half_empty.while_busy) == 400
    assert sum(half_empty.while_busy[5:7]) == 300, "0.25 to 0.35"
    assert [x for x, _ in full.utilisation] == [INTERVAL_S * tick for tick in range(400)]
    assert {y for _, y in full.utilisation} == {0.97}


def test_an_idle_gpu_is_in_no_part_and_what_is_unknown_is_no_zero() -> None:
    idle = [replace(s, occupancy=None, occupancy_while_busy=None) for s in gpu_samples(10, 1)]
    (gpu,) = recorded(idle).gpus
    assert gpu.while_busy == (0,) * BINS
    assert gpu.below_half is None
    assert all(math.isnan(y) for _, y in gpu.occupancy)


def test_an_occupancy_of_one_is_in_the_last_part() -> None:
    (gpu,) = recorded([replace(s, occupancy_while_busy=1.0) for s in gpu_samples(3, 1)]).gpus
    assert gpu.while_busy[-1] == 3


def test_traffic_is_counted_per_step_and_a_new_sampler_begins_anew() -> None:
    first = list(host_samples(20, (0,), step_s=STEP_S, bytes_per_step=1000))
    later = [
        replace(s, time_s=s.time_s + 25 * INTERVAL_S)
        for s in host_samples(20, (0,), step_s=STEP_S, bytes_per_step=3000)
    ]
    whole = Recording.of([*first, *later], ends(1000))
    assert whole is not None
    moved = whole.hosts[0].moved["lo"]
    # The training's first counted step ends after the fifth; neither what lies before nor between counts.
    assert moved.steps == pytest.approx((19 - 2 + 19) * INTERVAL_S / STEP_S)
    assert moved.sent_bytes == pytest.approx((17 * 1000 + 19 * 3000) * INTERVAL_S / STEP_S)
    outside = Recording.of(first, ())
    assert outside is not None
    assert outside.hosts[0].moved == {}


@pytest.mark.parametrize("replicas", [1, 2])
def test_flows_are_all_bytes_on_the_wire(replicas: int) -> None:
    plan = plan_of(replicas)
    bare = replace(run_of(), plan=plan)
    programs: tuple[Program, ...] = programs_of(bare, basis())
    flows = flows_of(programs)

    expected = sum(
        wire_bytes(o, replicas if o.across else 1)
        for k, program in enumerate(programs)
        for o in program.operations
        if not (o.across and k)
    )
    assert sum(flows.values()) == pytest.approx(expected)
    assert {rank for pair in flows for rank in pair} <= set(range(plan.world))
    one = dict.fromkeys(range(plan.world), "here")
    assert crossings(flows, one)["here"].inside == pytest.approx(expected)
    apart = crossings(flows, {rank: f"host{rank}" for rank in range(plan.world)})
    assert sum(c.sent for c in apart.values()) == pytest.approx(expected)
    assert sum(c.received for c in apart.values()) == pytest.approx(expected)
    assert all(c.inside == 0 for c in apart.values())


def test_a_rank_has_the_colours_of_its_stages() -> None:
    account = Account.of(run_of())
    turns = turns_of(account.comparison)
    assert [t.stage for t in turns[1].turns] == ["front", "tail"]
    assert [t.stage for t in turns[2].turns] == ["middle 0"]
    assert all(0 < t.share < 1 for own in turns.values() for t in own.turns)
    assert turns[0].colour != turns[3].colour
    assert turns_of(None) == {}


def test_gpus_are_told_with_their_ranks_and_stages() -> None:
    account = Account.of(on_gpus(run_of()))
    first, second = told(account, "GPUs").rows
    assert first[0] == "node0 GPU 0"
    assert first[1].startswith("rank 0: front ")
    assert "; rank 1: front " in first[1]
    assert ", tail " in first[1]
    assert second[1].startswith("rank 2: middle 0 ")
    assert (first[2], first[5], second[5]) == ("97%", "0%", "75%")
    assert first[6:] == ("10 GiB", "80 GiB", "gpm+nvml")
    rows = told(account, "network").rows
    assert [row[0] for row in rows] == ["rank 0", "rank 1", "rank 2", "rank 3", "node0 lo (inside)"]
    assert rows[-1][1] == "unknown", "NCCL sends nothing over the loopback interface"
    assert account.lacking == ()


def test_errors_that_a_driver_reported_are_told() -> None:
    run = on_gpus(run_of())
    assert run.recording is not None
    errors = (
        Event(1.0, "node0", 1, "GPU-1", 79),
        Event(2.0, "node0", 1, "GPU-1", 31),
        Event(3.0, "node0", 1, None, 31),
    )
    summary = replace(run.recording.summary, events=errors)
    account = Account.of(replace(run, recording=replace(run.recording, summary=summary)))
    told_errors = [note for note in told(account, "GPUs").notes if "Xid" in note]
    assert told_errors == ["Xid errors of GPU 1 of node0, by NVIDIA's list: 31 (2 times), 79 (1 times)"]


def test_on_cpus_the_network_is_laid_beside_the_program() -> None:
    run = run_of()
    sent = round(sum(flows_of(programs_of(run, basis())).values()))
    records = in_turns(
        host_samples(60, range(4), step_s=STEP_S, bytes_per_step=round(1.1 * sent)), iter((NO_GPU,))
    )
    account = Account.of(replace(run, recording=recorded(records)))
    row = told(account, "network").rows[-1]
    assert row[0] == "node0 lo (inside)"
    assert row[3] == row[6] == "+10%"
    assert told(account, "hosts").rows[0][:3] == ("node0", "0-3", "2.16 of 4 (54%)")
    assert account.lacking == ()
    assert not [f for f in account.findings if f.title == "GPUs"]


def test_an_interface_that_carries_next_to_nothing_is_not_drawn() -> None:
    samples = [
        replace(s, network={**s.network, "eth0": Traffic(9, 9, 5e4, 5e4)}) if s.network else s
        for s in host_samples(9, (0,))
    ]
    figure = network_figure(recorded(samples).hosts[0])
    assert figure is not None
    assert [line.get_label() for line in figure.axes[0].lines] == ["lo sent", "lo received"]
    quiet = [replace(s, network={name: Traffic(9, 9, 9.0, 9.0) for name in s.network}) for s in samples]
    assert network_figure(recorded(quiet).hosts[0]) is None


def test_what_is_missing_is_said_once() -> None:
    account = Account.of(run_of())
    (text,) = account.lacking
    assert text.startswith("no monitor.jsonl with samples: ")
    titles = [f.title for f in account.findings]
    assert "network" in titles, "what the program sends is known all the same"
    assert not {"GPUs", "hosts"} & set(titles)
    no_occupancy = [replace(s, occupancy=None, occupancy_while_busy=None) for s in gpu_samples(10)]
    (text,) = Account.of(replace(run_of(), recording=recorded(no_occupancy))).lacking
    assert text.startswith("no occupancy of GPUs: ")


def test_a_stage_is_told_predicted_and_measured() -> None:
    account = Account.of(run_of())
    assert account.attribution is not None
    rows = told(account, "stages and their devices").rows
    assert [row[0] for row in rows] == ["front", "middle 0", "tail"]
    busy = account.attribution.stages[0]
    assert busy.measured.busy_s == pytest.approx(SLOWER * busy.predicted.busy_s)
    assert len(rows[0]) == 7, "no sample tells of its devices"


def test_a_folder_is_read_and_a_malformed_line_is_named(tmp_path: Path) -> None:
    lines = [to_line(r) for r in gpu_samples(5)]
    (tmp_path / "monitor.jsonl").write_text("".join(lines))
    (tmp_path / "monitor-1.jsonl").write_text("".join(to_line(r) for r in gpu_samples(5, host="node1")))
    found = Recording.load(tmp_path, ())
    assert found is not None
    assert [(g.host, g.gpu) for g in found.gpus] == [("node0", 0), ("node0", 1), ("node1", 0), ("node1", 1)]
    assert found.summary.gpus[1].total.peak_memory_bytes == 11 * GIB
    data = {**json.loads(lines[0]), "utilisation": "much"}
    (tmp_path / "monitor.jsonl").write_text(json.dumps(data) + "\n")
    with pytest.raises(Exception, match=r"monitor.jsonl:1.utilisation: expected float, got 'much'"):
        Recording.load(tmp_path, ())
    assert Recording.load(tmp_path / "nowhere", ()) is None
