"""Recordings that are played in the place of sampling, and the text file that a node exporter reads."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from hybridpar.errors import ConfigError, HybridparError
from hybridpar.monitor import openmetrics
from hybridpar.monitor.openmetrics import Export, to_text
from hybridpar.monitor.record import (
    Event,
    Gap,
    GpuSample,
    HostSample,
    RankSample,
    Record,
    Traffic,
    read,
)
from hybridpar.monitor.replay import Replay
from hybridpar.monitor.sampler import check, start
from hybridpar.monitor.settings import Options
from hybridpar.monitor.summary import HostSummary, summarise
from tests.support.monitoring import FAST, gaps, hosts, samples, wait_for, write

GPU = GpuSample(
    10.0,
    "a",
    0,
    "GPU-0",
    window_s=0.5,
    utilisation=0.9,
    occupancy=0.25,
    throttle=("power_cap",),
    memory_used_bytes=3,
    sources={"utilisation": "nvml", "occupancy": "gpm", "throttle": "nvml"},
)
HOST = HostSample(
    10.0,
    "a",
    window_s=0.5,
    cpus=2,
    cpu_cores=1.5,
    memory_used_bytes=100,
    memory_total_bytes=400,
    network={'we"ird\\': Traffic(7, 8, 1.0, None)},
    ranks=(RankSample(3, 4711, cpu_cores=0.5, memory_bytes=9),),
    sampler_cpu_s=0.25,
    sources={"cpu_cores": "psutil"},
)
RECORDS: list[Record] = [
    Gap(9.0, "a", "told"),
    GPU,
    HOST,
    Event(10.5, "a", 0, "GPU-0", 79),
    replace(GPU, time_s=12.0, occupancy=0.5),
]


def test_a_recording_is_played_at_its_pace() -> None:
    source = Replay(RECORDS)
    assert source.read(1000.0) == [Gap(1000.0, "a", "told")]
    assert source.read(1000.9) == []
    gpu, host = source.read(1001.0)
    assert gpu == replace(
        GPU,
        time_s=1001.0,
        sources={"utilisation": "replay:nvml", "occupancy": "replay:gpm", "throttle": "replay:nvml"},
    )
    assert isinstance(host, HostSample)
    assert (host.time_s, host.sources, host.ranks) == (1001.0, {"cpu_cores": "replay:psutil"}, HOST.ranks)
    event, last, end = source.read(2000.0)  # a tick that came late
    assert event == Event(1001.5, "a", 0, "GPU-0", 79)
    assert isinstance(last, GpuSample)
    assert (last.time_s, last.occupancy) == (1003.0, 0.5)
    assert isinstance(end, Gap)
    assert (end.reason, end.lost) == ("the recording that is played has ended", False)
    assert source.read(3000.0) == []


def test_the_sampler_plays_a_recording_and_samples_nothing_else(tmp_path: Path) -> None:
    recording = write(tmp_path / "recorded.jsonl", *(replace(r, time_s=10.0) for r in RECORDS))
    path = tmp_path / "m.jsonl"
    with start(path, Options(interval_s=0.12, replay=str(recording)), uuids=()) as monitor:
        assert monitor.reason is None
        wait_for(lambda: path.exists() and len(list(read(path))) == len(RECORDS) + 1)
        assert monitor.news() == ["told", "the recording that is played has ended"]
    assert {source for s in samples(path) for source in s.sources.values()} == {"replay:nvml", "replay:gpm"}
    assert [h.cpu_cores for h in hosts(path)] == [1.5]


def test_a_recording_that_breaks_off_is_a_gap(tmp_path: Path) -> None:
    recording = write(tmp_path / "recorded.jsonl", GPU)
    recording.write_text(recording.read_text() + "nonsense\n")
    path = tmp_path / "m.jsonl"
    with start(path, Options(interval_s=0.12, replay=str(recording))) as monitor:
        (news,) = wait_for(monitor.news)
    assert re.search(r"no recorded data any more: .*recorded.jsonl:2 is not JSON", news)


def test_what_cannot_be_played_or_written_is_refused_before(tmp_path: Path) -> None:
    with pytest.raises(HybridparError, match=r"cannot read .*nowhere.jsonl"):
        check(Options(replay=str(tmp_path / "nowhere.jsonl")))
    (tmp_path / "old.jsonl").write_text('{"kind": "sample", "schema": 1}\n')
    with pytest.raises(HybridparError, match="schema 1 is not 2; read it with the version"):
        check(Options(replay=str(tmp_path / "old.jsonl")))
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ConfigError, match=r"monitor\.replay: .*empty.jsonl holds no records"):
        check(Options(replay=str(tmp_path / "empty.jsonl")))
    with pytest.raises(ConfigError, match=r"monitor\.openmetrics: .*make the folder"):
        check(Options(openmetrics=str(tmp_path / "nowhere" / "a.prom")))
    check(Options(openmetrics=str(tmp_path / "a.prom")))


TEXT = r"""# TYPE hybridpar_gpu_utilisation_ratio gauge
# HELP hybridpar_gpu_utilisation_ratio Part of the time in which any kernel ran.
hybridpar_gpu_utilisation_ratio{run="r",host="a",gpu="0",uuid="GPU-0",source="nvml"} 0.9
# TYPE hybridpar_gpu_occupancy_ratio gauge
# HELP hybridpar_gpu_occupancy_ratio Active warps over the most that fit, idle time included.
hybridpar_gpu_occupancy_ratio{run="r",host="a",gpu="0",uuid="GPU-0",source="gpm"} 0.25
"""


def test_the_text_by_hand() -> None:
    text = to_text([GPU, HOST], "r")
    assert text.startswith(TEXT)
    assert text.endswith("\n# EOF\n")
    assert 'gpu_throttled{run="r",host="a",gpu="0",uuid="GPU-0",reason="power_cap"} 1.0\n' in text
    assert 'gpu_throttled{run="r",host="a",gpu="0",uuid="GPU-0",reason="thermal"} 0.0\n' in text
    assert 'hybridpar_rank_memory_bytes{run="r",host="a",rank="3"} 9\n' in text
    assert r'network_sent_bytes_per_second{run="r",host="a",interface="we\"ird\\"} 1.0' in text
    assert "power" not in text.replace("power_", "")
    assert "workers_cpu_cores" not in text  # unknown
    assert "None" not in text


def test_the_text_is_what_parsers_ask_for() -> None:
    """Families stand together with one type and one help each, and samples have no time stamps."""
    two = [GPU, replace(GPU, gpu=1, uuid="GPU-1"), HOST]
    lines = to_text(two, "r").splitlines()
    families: list[str] = []
    for line in lines[:-1]:
        found = re.fullmatch(r"# (TYPE|HELP) (\w+) .*|(\w+)\{(?:\w+=\"(?:[^\"\\]|\\.)*\",?)+\} [-+.e\d]+", line)
        assert found, line
        name = found.group(2) or found.group(3)
        if found.group(1) == "TYPE":
            families.append(name)
            assert line.endswith(" gauge")
        assert name == families[-1]
    assert len(families) == len(set(families))
    assert lines[-1] == "# EOF"


def test_the_file_is_replaced_whole_and_seldom_and_ends_with_the_sampling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s, path, written = 0.0, tmp_path / "a.prom", []
    replaced = Path.replace

    def note(part: Path, target: Path) -> Path:
        written.append((part.parent == target.parent, part.suffix != ".prom", part.read_text()[-6:]))
        return replaced(part, target)

    monkeypatch.setattr(openmetrics.Path, "replace", note)
    export = Export(path, "r", lambda: now_s)
    for tick in range(20):
        assert export.step([replace(GPU, occupancy=tick / 100)]) == []
        now_s += 0.5
    assert written == [(True, True, "# EOF\n")] * 2
    assert "0.1\n" in path.read_text()
    assert [p.name for p in tmp_path.iterdir()] == ["a.prom"]
    export.close()
    assert list(tmp_path.iterdir()) == []
    export.close()


def test_a_file_that_cannot_be_written_is_told_once(tmp_path: Path) -> None:
    now_s = 0.0
    export = Export(tmp_path / "nowhere" / "a.prom", "r", lambda: now_s)
    (gap,) = export.step([GPU])
    assert re.fullmatch(r"monitor.openmetrics: .*a.prom cannot be written: No such file or directory", gap.reason)
    now_s += 10.0
    assert export.step([GPU]) == []
    export.close()


@pytest.mark.usefixtures("no_driver")
def test_the_sampler_writes_the_file_and_takes_it_away(tmp_path: Path) -> None:
    path, run = tmp_path / "a.prom", tmp_path / "some-run"
    with start(run / "m.jsonl", replace(FAST, openmetrics=str(path)), uuids=()):
        wait_for(path.exists)
        assert 'hybridpar_node_memory_used_bytes{run="some-run"' in path.read_text()
    assert not path.exists()
    assert gaps(run / "m.jsonl") == ["the job uses no GPU on this node"]


def test_hosts_and_events_in_a_summary(tmp_path: Path) -> None:
    """Cores 1.5 over 0.5 s and 0.5 over 1.5 s: 0.75."""
    later = replace(
        HOST,
        time_s=12.0,
        window_s=1.5,
        cpu_cores=0.5,
        memory_used_bytes=50,
        network={"eth0": Traffic(70, 80)},
        ranks=(RankSample(3, 4711, cpu_cores=1.5, workers_cpu_cores=2.0),),
        sampler_cpu_s=0.5,
    )
    path = write(tmp_path / "m.jsonl", *RECORDS, later)
    summary = summarise(path)
    assert summary is not None
    assert summary.hosts == (
        HostSummary("a", 2, 0.75, 100, 400, {"eth0": 70}, {"eth0": 80}, {3: 1.25}, {3: 2.0}, 0.5),
    )
    assert [event.xid for event in summary.events] == [79]
    assert summary.total is not None
    assert summary.total.throttled == {"power_cap": 1.0}
    alone = summarise(write(tmp_path / "n.jsonl", later))
    assert alone is not None
    assert (alone.total, alone.gpus) == (None, ())
