"""NVML's figures of GPUs, from a stub of its library that the real binding loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hybridpar.errors import MonitorError
from hybridpar.monitor.record import Event, GpuSample, read
from hybridpar.monitor.sampler import start
from tests.support.monitoring import FAST, UUIDS, gaps, hosts, record, samples, wait_for

CLASSIC = {
    "utilisation": 0.9,
    "memory_utilisation": 0.1,
    "memory_used_bytes": 6_000_000_000,
    "memory_total_bytes": 80_000_000_000,
    "sm_clock_hz": 1.4e9,
    "sm_clock_max_hz": 1.98e9,
    "memory_clock_hz": 2.6e9,
    "temperature_c": 61.0,
    "power_w": 350.5,
    "power_limit_w": 700.0,
    "energy_j": 1234.5,
}
COUNTED = {
    "graphics_activity": 0.8,
    "sm_activity": 0.7,
    "occupancy": 0.2,
    "occupancy_while_busy": 0.25,
    "tensor_activity": 0.25,
    "dram_activity": 0.5,
    "pcie_sent_bytes_per_s": 10 * 2**20,
    "pcie_received_bytes_per_s": 20 * 2**20,
    "nvlink_sent_bytes_per_s": 30 * 2**20,
    "nvlink_received_bytes_per_s": 40 * 2**20,
}
TRAFFIC = [name for name in COUNTED if name.endswith("_bytes_per_s")]


def figures(sample: GpuSample) -> dict[str, Any]:
    """What is known of a GPU, but for the reasons of its clocks."""
    apart = {"time_s", "host", "gpu", "uuid", "window_s", "sources", "throttle"}
    return {name: value for name, value in vars(sample).items() if name not in apart and value is not None}


def test_stub_values_arrive_with_their_sources(nvml: Path, tmp_path: Path) -> None:
    path = tmp_path / "run" / "monitor.jsonl"
    ticks = record(path, ticks=4)
    hopper, older, lost = next(tick for tick in ticks[1:] if tick[0].occupancy is not None)
    assert (hopper.gpu, hopper.uuid) == (0, UUIDS[0])
    assert figures(hopper) == pytest.approx(CLASSIC | COUNTED)
    assert hopper.window_s is not None
    assert hopper.window_s >= 0.12
    by_gpm = dict.fromkeys([*COUNTED, "window_s"], "gpm")
    assert hopper.sources == dict.fromkeys([*CLASSIC, "throttle"], "nvml") | by_gpm
    assert (hopper.throttle, older.throttle, lost.throttle) == (("power_cap",), (), None)
    of_older = CLASSIC | {"utilisation": 0.4, "memory_used_bytes": 1_000_000_000}
    steady = {name: value for name, value in figures(older).items() if name not in TRAFFIC}
    assert steady == pytest.approx(of_older)
    assert older.sources == dict.fromkeys([*CLASSIC, "throttle", *TRAFFIC], "nvml")
    sent, received, sent_over_links, received_over_links = (getattr(older, name) for name in TRAFFIC)
    assert received / sent == pytest.approx(2, rel=0.01)
    assert received_over_links / sent_over_links == pytest.approx(4 / 3, rel=0.02)
    assert sent_over_links / sent == pytest.approx(3.072, rel=0.02)
    assert lost == GpuSample(time_s=hopper.time_s, host=hopper.host, gpu=2, uuid=UUIDS[2])
    assert [reason.split()[0] for reason in gaps(path)] == [UUIDS[1], UUIDS[2], UUIDS[2]]
    assert gaps(path)[-1] == f"{UUIDS[2]} gives no figures by nvml: GPU is lost"
    counts = json.loads(nvml.read_text())
    assert counts["allocated"] == counts["freed"] == 2
    assert counts["listening"] == 0
    assert counts["windows"] > 0
    assert counts["shortest_s"] >= 0.12


@pytest.mark.usefixtures("nvml")
def test_uuids_choose_the_gpus_and_their_order(tmp_path: Path) -> None:
    tick = record(tmp_path / "m.jsonl", 1, uuids=(UUIDS[1], "GPU-unknown", UUIDS[0]))[0]
    assert [(s.gpu, s.uuid) for s in tick] == [(1, UUIDS[1]), (None, "GPU-unknown"), (0, UUIDS[0])]
    assert tick[1].utilisation is None
    assert any("GPU-unknown" in reason for reason in gaps(tmp_path / "m.jsonl"))


@pytest.mark.usefixtures("nvml")
@pytest.mark.parametrize("uuid", ["MIG-00000000-dddd", "GPU-00000000-dddd"])
def test_a_slice_is_read_through_its_parent(uuid: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA tells the digits of its UUID as if they were a GPU's."""
    monkeypatch.setenv("NVML_STUB", "no_rates")
    ticks = record(tmp_path / "m.jsonl", 4, uuids=(uuid,))
    known = next(tick[0] for tick in ticks if tick[0].occupancy is not None)
    assert (known.gpu, known.uuid) == (0, uuid)
    assert known.utilisation == pytest.approx(0.8)
    assert known.sources["utilisation"] == "gpm"


@pytest.mark.usefixtures("nvml")
def test_a_slice_of_an_unknown_instance_never_stands_for_the_whole_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NVML_STUB_FAIL", "nvmlDeviceGetGpuInstanceId/*:3@1")
    with start(tmp_path / "m.jsonl", FAST, uuids=["MIG-00000000-dddd"]) as monitor:
        assert "does not tell of which GPU it is a MIG slice" in (monitor.reason or "")


@pytest.mark.usefixtures("nvml")
@pytest.mark.parametrize(
    ("code", "why"), [(4, "which this user may not read"), (3, "which needs Hopper or later")]
)
def test_why_there_is_no_occupancy(code: int, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVML_STUB_FAIL", f"nvmlGpmSampleGet/*:{code}@1")
    ticks = record(tmp_path / "m.jsonl", 1, uuids=UUIDS[:1])
    assert ticks[0][0].utilisation == 0.9
    (gap,) = gaps(tmp_path / "m.jsonl")
    assert gap.startswith(f"{UUIDS[0]} gives no occupancy, {why}: ")


@pytest.mark.parametrize(
    ("variation", "unknown"),
    [
        ("odd", {"tensor_activity", "dram_activity"}),
        ("idle", {"occupancy_while_busy"}),
        ("no_sample", {"occupancy", "graphics_activity", "occupancy_while_busy", "tensor_activity"}),
        ("no_metrics", {"occupancy", "graphics_activity", "occupancy_while_busy", "tensor_activity"}),
    ],
)
def test_what_a_call_refuses_is_none(
    variation: str, unknown: set[str], nvml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NVML_STUB", variation)
    found = [tick[0] for tick in record(tmp_path / "m.jsonl", 3, uuids=UUIDS[:1])]
    best = max(found, key=lambda s: len(s.sources))
    assert all(getattr(best, name) is None for name in unknown)
    assert not unknown & set(best.sources)
    assert best.utilisation == pytest.approx(0.9)
    assert (best.occupancy is None) == ("occupancy" in unknown)
    counts = json.loads(nvml.read_text())
    assert counts["allocated"] == counts["freed"] == 2


@pytest.mark.parametrize(
    ("call", "unknown"),
    [
        ("nvmlDeviceGetUtilizationRates", {"memory_utilisation"}),
        ("nvmlDeviceGetMemoryInfo_v2", {"memory_used_bytes", "memory_total_bytes"}),
        ("nvmlDeviceGetMaxClockInfo", {"sm_clock_max_hz"}),
        ("nvmlDeviceGetClockInfo", {"sm_clock_hz", "memory_clock_hz"}),
        ("nvmlDeviceGetTemperature", {"temperature_c"}),
        ("nvmlDeviceGetPowerUsage", {"power_w"}),
        ("nvmlDeviceGetEnforcedPowerLimit", {"power_limit_w"}),
        ("nvmlDeviceGetTotalEnergyConsumption", {"energy_j"}),
    ],
)
def test_every_call_may_be_refused_and_is_not_repeated_then(
    call: str, unknown: set[str], nvml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NVML_STUB_FAIL", f"{call}/0:3@1")
    ticks = record(tmp_path / "m.jsonl", 3, uuids=UUIDS[:1])
    known = next(tick[0] for tick in ticks if tick[0].occupancy is not None)
    assert set(CLASSIC) - set(figures(known)) == unknown
    assert known.sources["utilisation"] == ("gpm" if "Rates" in call else "nvml")
    assert gaps(tmp_path / "m.jsonl") == []
    asked = 2 if call == "nvmlDeviceGetClockInfo" else 1  # each of two clocks, once
    assert json.loads(nvml.read_text())[call] == asked


@pytest.mark.usefixtures("nvml")
def test_a_clock_that_is_refused_says_nothing_of_another_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NVML_STUB", "no_memory_clock")
    last = record(tmp_path / "m.jsonl", 3, uuids=UUIDS[:1])[-1][0]
    assert (last.sm_clock_hz, last.memory_clock_hz) == (1.4e9, None)


def test_another_refusal_is_for_the_moment_only(
    nvml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NVML_STUB_FAIL", "nvmlDeviceGetPowerUsage/0:999@1")
    record(tmp_path / "m.jsonl", 3, uuids=UUIDS[:1])
    assert json.loads(nvml.read_text())["nvmlDeviceGetPowerUsage"] >= 3


def test_a_gpu_that_is_lost_is_told_once_and_the_other_goes_on(
    nvml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.jsonl"
    monkeypatch.setenv("NVML_STUB_FAIL", "*/0:15@9")
    with start(path, FAST, "auto", UUIDS[:2]) as monitor:
        wait_for(lambda: any("gpm any more" in gap for gap in gaps(path)) and len(samples(path)) >= 40)
        told = monitor.news()
        assert monitor.reason is None
    lost = [f"{UUIDS[0]} gives no figures by {source} any more: GPU is lost" for source in ("nvml", "gpm")]
    assert sorted(gaps(path)) == sorted([*lost, gaps(path)[0]])
    assert sorted(told) == sorted(lost)
    first, other = [s for s in samples(path) if s.gpu == 0], [s for s in samples(path) if s.gpu == 1]
    assert figures(first[0])
    assert first[-1].sources == {}
    assert other[-1].utilisation == 0.4
    counts = json.loads(nvml.read_text())
    assert counts["allocated"] == counts["freed"] == 2
    assert counts["listening"] == 0


@pytest.mark.usefixtures("nvml")
def test_a_driver_that_disappears_is_one_sentence_and_ends_what_requires_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.jsonl"
    monkeypatch.setenv("NVML_STUB_FAIL", "*/*:9@13")
    with start(path, FAST, "required", UUIDS[:2]) as monitor:
        message = "monitor=required, but GPU-0.*, GPU-1.* give no figures by nvml any more: Driver Not Loaded"
        with pytest.raises(MonitorError, match=message):
            wait_for(monitor.news)
        before = len(hosts(path))
        wait_for(lambda: len(hosts(path)) > before)  # the node is sampled on
    assert sum("by nvml any more" in gap for gap in gaps(path)) == 1


@pytest.mark.usefixtures("nvml")
def test_xid_errors_are_events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVML_STUB", "xid")
    record(tmp_path / "m.jsonl", 3)
    (event,) = [r for r in read(tmp_path / "m.jsonl") if isinstance(r, Event)]
    assert (event.gpu, event.uuid, event.xid, event.source) == (0, UUIDS[0], 79, "nvml")


@pytest.mark.usefixtures("nvml")
def test_who_may_not_hear_of_xid_errors_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVML_STUB_FAIL", "nvmlDeviceRegisterEvents/*:4@1")
    record(tmp_path / "m.jsonl", 1, uuids=UUIDS[:1])
    assert gaps(tmp_path / "m.jsonl") == ["no Xid errors: Insufficient Permissions"]


def test_without_counters_of_pcie_one_gpu_per_tick_is_looked_at(
    nvml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each look takes NVML 20 ms per direction: on a node of eight GPUs all at once would take most of a tick."""
    monkeypatch.setenv("NVML_STUB", "no_counters")
    monkeypatch.setenv("NVML_STUB_FAIL", "nvmlGpmQueryDeviceSupport/*:3@1")
    ticks = record(tmp_path / "m.jsonl", 4, uuids=UUIDS[:2])
    looked = [[s.pcie_sent_bytes_per_s for s in tick] for tick in ticks]
    kib = 500 * 1024
    assert looked[:4] == [[kib, None], [None, kib], [kib, None], [None, kib]]
    assert ticks[0][0].pcie_received_bytes_per_s == 600 * 1024
    assert json.loads(nvml.read_text())["nvmlDeviceGetPcieThroughput"] == 2 * len(ticks)


def test_a_tick_makes_few_calls(nvml: Path, tmp_path: Path) -> None:
    ticks = record(tmp_path / "m.jsonl", 4, uuids=UUIDS[:1])
    counts = json.loads(nvml.read_text())
    per_tick = {name: count / len(ticks) for name, count in counts.items() if count >= len(ticks)}
    calls = {name: count for name, count in per_tick.items() if name.startswith("nvml")}
    assert all(count < 2 or name == "nvmlDeviceGetClockInfo" for name, count in calls.items())
    assert len(calls) <= 11
