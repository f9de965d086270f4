"""The monitor's process, its file and what that amounts to; with a stub NVML, and without any driver."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from hybridpar.errors import ConfigError, HybridparError, MonitorError
from hybridpar.monitor import sampler
from hybridpar.monitor.log import Log
from hybridpar.monitor.process import next_tick
from hybridpar.monitor.record import Gap, GpuSample, HostSample, Record, read, to_line
from hybridpar.monitor.sampler import start
from hybridpar.monitor.settings import Options
from hybridpar.monitor.summary import summarise
from hybridpar.schema import to_data
from hybridpar.sections import MonitorConfig
from tests.support.monitoring import FAST, UUIDS, gaps, hosts, is_alive, samples, wait_for

ROOT = Path(__file__).parents[2]


@pytest.mark.usefixtures("no_driver")
def test_without_driver_the_node_is_sampled_all_the_same(tmp_path: Path) -> None:
    path = tmp_path / "monitor.jsonl"
    with start(path, FAST) as monitor:
        assert monitor.reason == "no NVIDIA driver: NVML library not found"
        wait_for(lambda: len(hosts(path)) >= 2)
        assert monitor.news() == []
    monitor.close()
    assert (monitor.reason, monitor.pid) == ("no NVIDIA driver: NVML library not found", None)
    assert gaps(path) == [monitor.reason]
    summary = summarise(path)
    assert summary is not None
    assert (summary.total, summary.gpus, len(summary.hosts)) == (None, (), 1)


@pytest.mark.parametrize(("variation", "part"), [("no_module", "kernel module"), ("no_gpu", "no GPU")])
@pytest.mark.usefixtures("nvml")
def test_a_driver_without_gpus_says_so(
    variation: str, part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NVML_STUB", variation)
    with start(tmp_path / "m.jsonl") as monitor:
        assert part in (monitor.reason or "")


@pytest.mark.usefixtures("no_driver")
def test_required_raises_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(MonitorError, match="NVML library not found"):
        start(tmp_path / "m.jsonl", mode="required")
    with pytest.raises(MonitorError, match="uses no GPU"):
        start(tmp_path / "m.jsonl", mode="required", uuids=())


def test_off_starts_nothing(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    monitor = start(path, mode="off")
    assert (monitor.pid, path.exists()) == (None, False)
    assert "off" in (monitor.reason or "")


def test_values_out_of_range_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"monitor\.interval_s: 0\.01"):
        Options(interval_s=0.01)
    with pytest.raises(ConfigError, match=r"monitor\.max_bytes: 10"):
        Options(max_bytes=10)
    with pytest.raises(ConfigError, match=r"monitor\.mode: 'on'"):
        start(tmp_path / "m.jsonl", mode="on")  # type: ignore[arg-type]


def test_a_path_that_cannot_be_written_is_a_reason(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot start" in (start(tmp_path / "file" / "m.jsonl").reason or "")
    assert "cannot write" in (start(tmp_path).reason or "")


@pytest.mark.usefixtures("nvml")
def test_a_driver_that_hangs_holds_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVML_STUB", "hang")
    monkeypatch.setattr(sampler, "PATIENCE_S", 0.2)
    monkeypatch.setattr(sampler, "CLOSE_TIMEOUT_S", 0.1)
    monitor = start(tmp_path / "m.jsonl")
    assert "did not answer within 0.2 s" in (monitor.reason or "")
    assert monitor.news() == []
    (told,) = monitor.close()
    assert told == monitor.reason == "the sampler hung and did not end within 0.1 s"
    assert gaps(tmp_path / "m.jsonl") == [told]


@pytest.mark.usefixtures("nvml")
def test_required_waits_for_a_driver_but_not_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVML_STUB", "hang")
    monkeypatch.setattr(sampler, "START_TIMEOUT_S", 0.2)
    with pytest.raises(MonitorError, match="required, but the sampler did not answer within 0"):
        start(tmp_path / "m.jsonl", mode="required")


@pytest.mark.usefixtures("nvml")
def test_a_driver_that_takes_its_time_is_heard_of_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "PATIENCE_S", 0.0)
    with start(tmp_path / "m.jsonl", FAST, uuids=UUIDS[:1]) as monitor:
        assert "may do so yet" in (monitor.reason or "")
        assert wait_for(monitor.news) == ["there is data of GPUs from now on"]
        assert monitor.reason is None
        wait_for(lambda: samples(tmp_path / "m.jsonl"))


@pytest.mark.usefixtures("nvml")
def test_a_sampler_that_dies_is_news_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVML_STUB", "crash")
    with start(tmp_path / "m.jsonl", FAST) as monitor:
        (news,) = wait_for(monitor.news)
        assert "exit status -6" in news
        assert monitor.news() == []
    assert "exit status -6" in (monitor.reason or "")
    assert gaps(tmp_path / "m.jsonl")[-1] == news


@pytest.mark.usefixtures("nvml")
def test_a_sampler_that_dies_ends_what_requires_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVML_STUB", "crash")
    with (
        start(tmp_path / "m.jsonl", FAST, "required") as monitor,
        pytest.raises(MonitorError, match="required, but the sampler ended with exit status -6; set monitor=auto"),
    ):
        wait_for(monitor.news)


def test_a_sampler_that_cannot_import_says_what(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pynvml.py").write_text("raise ImportError('no such binding')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert "ImportError: no such binding" in (start(tmp_path / "m.jsonl").reason or "")


def test_the_sampler_ends_with_its_parent_though_a_fork_holds_the_pipe(nvml: Path, tmp_path: Path) -> None:
    script = (
        "import os, time\nfrom pathlib import Path\nfrom hybridpar.monitor.sampler import start\n"
        "from hybridpar.monitor.settings import Options\n"
        f"m = start(Path({str(tmp_path / 'm.jsonl')!r}), Options(interval_s=0.12))\n"
        "worker = os.fork()\n"
        "if worker: print(m.pid, worker, flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=ROOT) as parent:
        assert parent.stdout is not None
        pid, worker = map(int, parent.stdout.readline().split())
        try:
            assert is_alive(pid)
            parent.send_signal(signal.SIGKILL)
            wait_for(lambda: not is_alive(pid))
            assert is_alive(worker)
        finally:
            os.kill(worker, signal.SIGKILL)
    counts = json.loads(nvml.read_text())
    assert counts["allocated"] == counts["freed"] == 2


@pytest.mark.parametrize(
    ("passed", "stride", "tick"), [(0, 1, 1), (3, 1, 4), (0, 4, 4), (4, 4, 8), (7, 4, 8), (11, 4, 12)]
)
def test_ticks_keep_to_the_grid(passed: int, stride: int, tick: int) -> None:
    assert next_tick(passed, stride) == tick


def test_neither_side_imports_torch() -> None:
    modules = "hybridpar.monitor.sampler, hybridpar.monitor.process, hybridpar.monitor.record"
    script = (
        f"import sys, {modules}\nprint(sorted(m for m in sys.modules if m.split('.')[0] in ('torch', 'numpy')))"
    )
    shown = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, cwd=ROOT)
    assert shown.stdout.strip() == "[]"


def sample(time_s: float, gpu: int = 0, **values: Any) -> GpuSample:
    return GpuSample(time_s=time_s, host="node0", gpu=gpu, uuid=f"GPU-{gpu}", **values)


def test_a_full_file_is_thinned_and_keeps_the_fullest_moment(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    log = Log(path, max_bytes=40_000)
    assert log.write([Gap(0.0, "node0", "told once")])
    for tick in range(200):
        node = HostSample(tick, "node0", memory_used_bytes=999 if tick == 6 else 10)
        assert log.write([sample(tick, memory_used_bytes=999 if tick == 4 else 10), node])
        assert path.stat().st_size <= 40_000
    log.close()
    times = [s.time_s for s in samples(path)]
    assert log.stride >= 8
    assert 4.0 in times
    assert 6.0 in times
    assert [h.time_s for h in hosts(path)] == times
    assert times[-1] == 199.0
    assert times == sorted(times)
    assert min(t for t in times if t not in {4.0, 6.0}) < 100
    assert gaps(path) == ["told once"]
    assert not list(tmp_path.glob("*.tmp"))


def test_a_file_without_room_for_one_tick_refuses_it(tmp_path: Path) -> None:
    log = Log(tmp_path / "m.jsonl", max_bytes=100)
    assert not log.write([sample(1.0)])
    log.close()


@pytest.mark.usefixtures("nvml")
def test_the_sampler_keeps_to_the_bound_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    bound = 65536
    line = to_line(sample(1.0))
    path.write_text("".join(to_line(sample(float(t))) for t in range((bound - 1) // len(line) - 1)))
    before = len(samples(path))
    with start(path, Options(interval_s=0.12, max_bytes=bound)) as monitor:
        wait_for(lambda: any(s.uuid == UUIDS[0] for s in samples(path)))
        assert monitor.reason is None
    assert path.stat().st_size <= bound
    assert len(samples(path)) < before


@pytest.mark.usefixtures("nvml")
def test_a_line_cut_short_is_passed_over_and_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text(to_line(sample(1.0)) + to_line(sample(2.0))[:40])
    assert samples(path) == [sample(1.0)]
    log = Log(path, max_bytes=10_000)
    log.write([sample(3.0)])
    log.close()
    assert samples(path) == [sample(1.0), sample(3.0)]


@pytest.mark.usefixtures("no_driver")
def test_a_file_of_an_earlier_version_is_moved_away(tmp_path: Path) -> None:
    """A run that goes on after an update: its recording goes on, too, and what cannot be read with it stays."""
    path = tmp_path / "m.jsonl"
    path.write_text('{"kind": "sample", "schema": 1}\n')
    with start(path, FAST, uuids=()):
        wait_for(lambda: hosts(path))
    assert (tmp_path / "m.jsonl.old").read_text() == '{"kind": "sample", "schema": 1}\n'


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("nonsense", "m.jsonl:1 is not JSON"),
        ("[1]", "kind"),
        ('{"kind": "gap", "schema": 99}', "schema 99 is not 2; read it with"),
        ('{"kind": "gap", "schema": 2, "time_s": 1, "host": "a"}', "reason: missing"),
    ],
)
def test_a_malformed_line_is_named(line: str, part: str, tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text(line + "\n")
    with pytest.raises(HybridparError, match=part):
        list(read(tmp_path / "m.jsonl"))


def test_summary_by_hand(tmp_path: Path) -> None:
    """GPU 0 is busy 0.8 and 0.2 of two windows, at occupancies 0.4 and 0.05: (0.4 + 0.05) / (0.8 + 0.2)."""
    gpm = {"occupancy": "gpm", "utilisation": "nvml"}
    lines: list[Record] = [
        sample(
            10.0, 0, utilisation=0.9, graphics_activity=0.8, occupancy=0.4, occupancy_while_busy=0.5, sources=gpm
        ),
        sample(
            10.0, 1, utilisation=0.1, memory_used_bytes=70, memory_total_bytes=100, sources={"utilisation": "gpm"}
        ),
        sample(20.0, 0, utilisation=0.5, graphics_activity=0.2, occupancy=0.05, occupancy_while_busy=0.25),
        sample(20.0, 1, memory_used_bytes=50, memory_total_bytes=100, sources={"utilisation": "nvml"}),
        Gap(20.0, "node0", "why"),
        Gap(21.0, "node0", "why"),
    ]
    path = tmp_path / "m.jsonl"
    path.write_text("".join(map(to_line, lines)))
    summary = summarise(path, tmp_path / "missing.jsonl")
    assert summary is not None
    assert (summary.start_s, summary.end_s, summary.gaps) == (10.0, 20.0, ("why",))
    total, (first, second) = summary.total, summary.gpus
    assert (total.samples, first.total.samples, second.total.samples) == (4, 2, 2)
    assert total.mean_utilisation == pytest.approx((0.9 + 0.1 + 0.5) / 3)
    assert first.total.mean_utilisation == pytest.approx(0.7)
    assert first.total.mean_occupancy == pytest.approx(0.225)
    assert first.total.mean_occupancy_while_busy == pytest.approx(0.45)
    assert first.total.peak_memory_bytes is None
    assert (first.memory_total_bytes, first.sources) == (None, gpm)
    assert second.total.mean_occupancy is None
    assert (second.total.peak_memory_bytes, second.memory_total_bytes) == (70, 100)
    assert second.sources == {"utilisation": "gpm+nvml"}
    assert (total.peak_memory_bytes, total.mean_tensor_activity) == (70, None)
    later = summarise(path, since_s=15.0)
    assert later is not None
    assert later.total.mean_utilisation == pytest.approx(0.5)
    assert summarise(path, until_s=5.0) is None
    assert summarise(tmp_path / "missing.jsonl") is None


@pytest.mark.parametrize("mode", ["auto", "off", "required"])
def test_config_group_says_what_the_code_does(mode: sampler.Mode) -> None:
    config = yaml.safe_load((ROOT / "conf" / "monitor" / f"{mode}.yaml").read_text())
    assert config == to_data(MonitorConfig(mode=mode))
