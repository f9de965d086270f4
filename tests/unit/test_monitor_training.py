"""Whatever becomes of the sampler, a training goes on and ends as it would without one."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from hybridpar.errors import HybridparError, MonitorError
from hybridpar.monitor import sampler
from tests.support.monitoring import Meddler, gaps, hosts, is_alive, wait_for, write
from tests.support.runs import train_here
from tests.unit.test_monitor_replay import GPU

STEPS = 4


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def train(folder: Path, *overrides: str) -> list[float]:
    own = "train.callbacks=[tests.support.monitoring:Meddler]"
    train_here(folder, f"train.steps={STEPS}", "monitor=auto", "monitor.interval_s=0.12", own, *overrides)
    return losses(folder)


def sampled(process: psutil.Process, ticks: int = 1) -> None:
    """Wait until some more ticks have been written."""
    (path,) = [Path(json.loads(a)["path"]) for a in process.cmdline() if a.startswith("{")]
    before = len(hosts(path))
    wait_for(lambda: len(hosts(path)) >= before + ticks)


def end(process: psutil.Process) -> None:
    process.kill()
    wait_for(lambda: not is_alive(process.pid))


def kill(process: psutil.Process) -> None:
    sampled(process)
    end(process)


def halt(process: psutil.Process) -> None:
    sampled(process)
    process.send_signal(signal.SIGSTOP)


def fill_disk(process: psutil.Process) -> None:
    """Limit the file's size, which a write meets as it does a full disk: some of it is written, then nothing."""
    sampled(process)
    (path,) = [Path(json.loads(a)["path"]) for a in process.cmdline() if a.startswith("{")]
    limit = path.stat().st_size + 10
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, limit))
    wait_for(lambda: not is_alive(process.pid))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    folder = tmp_path_factory.mktemp("plain") / "run"
    train_here(folder, f"train.steps={STEPS}", "monitor=off")
    return losses(folder)


@pytest.mark.parametrize(
    ("deed", "told"),
    [
        (sampled, None),
        (kill, "the sampler ended with exit status -9"),
        (halt, "the sampler hung and did not end within 0.3 s"),
        (fill_disk, "monitoring ended: .*(File too large|No space left)"),
    ],
)
def test_a_training_goes_on_whatever_becomes_of_its_sampler(
    deed: Callable[[psutil.Process], None],
    told: str | None,
    undisturbed: list[float],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sampler, "CLOSE_TIMEOUT_S", 0.3)
    monkeypatch.setattr(Meddler, "deed", staticmethod(deed))
    folder = tmp_path / "run"
    assert train(folder) == undisturbed
    assert (folder / "summary.json").exists()
    assert not is_alive(Meddler.seen)
    assert hosts(folder / "monitor.jsonl")
    shown = capfd.readouterr().out
    lines = [line for line in shown.splitlines() if line.startswith("monitor: ")]
    assert len(lines) == (told is not None)
    if told is not None:
        assert re.search(told, lines[0])
        assert re.search(told, gaps(folder / "monitor.jsonl")[-1]) or deed is fill_disk  # which has no room for it
    assert "no GPU data: the job uses no GPU" in shown


def test_required_ends_the_training_where_gpu_data_ceases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Meddler, "deed", staticmethod(end))
    recording = write(tmp_path / "recorded.jsonl", GPU)
    with pytest.raises(MonitorError, match="required, but the sampler ended with exit status -9"):
        train(tmp_path / "run", "monitor.mode=required", f"monitor.replay={recording}")
    assert len(losses(tmp_path / "run")) < STEPS
    assert not is_alive(Meddler.seen)


def test_a_recording_that_is_missing_is_told_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(HybridparError, match=r"cannot read .*nowhere"):
        train(tmp_path / "run", f"monitor.replay={tmp_path}/nowhere.jsonl")
    assert not (tmp_path / "run").exists()


def test_a_damaged_recording_takes_no_summary_along(
    undisturbed: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damage(process: psutil.Process) -> None:
        kill(process)
        path = tmp_path / "run" / "monitor.jsonl"
        path.write_text(path.read_text() + "nonsense\n")

    monkeypatch.setattr(Meddler, "deed", staticmethod(damage))
    assert train(tmp_path / "run") == undisturbed
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert "is not JSON" in summary["gpu"]["reason"]


def test_ranks_are_sampled_by_their_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Meddler, "deed", staticmethod(lambda process: sampled(process, 3)))
    train(tmp_path / "run")
    last = hosts(tmp_path / "run" / "monitor.jsonl")[-1]
    assert [(rank.rank, rank.pid) for rank in last.ranks] == [(0, os.getpid())]
    assert last.ranks[0].cpu_cores is not None
    assert gaps(tmp_path / "run" / "monitor.jsonl") == ["the job uses no GPU on this node"]
