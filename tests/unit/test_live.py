"""The live view of a run: it follows what the run writes, says when it is over, and ends when it is told to."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from hybridpar.commands import watching
from hybridpar.errors import RecordError
from hybridpar.monitor.record import GpuSample, Record, to_line
from hybridpar.report.advice import Advice, Advised, Forecast
from hybridpar.report.follow import TAIL_BYTES, Followed
from hybridpar.report.live import LATEST, SILENT_S, Moment, Watch
from hybridpar.report.live_text import line, view
from tests.support.command import run
from tests.support.recordings import BEGIN_S, NO_GPU, gpu_samples, host_samples, uuid_of
from tests.support.reports import folder_of, run_of

STEP_S = 0.1


@pytest.fixture
def going(tmp_path: Path) -> Path:
    """The folder of a run that goes on."""
    folder = folder_of(tmp_path / "demo")
    (folder / "summary.json").rename(folder / "ended.json")
    return folder


def end(folder: Path) -> None:
    (folder / "ended.json").rename(folder / "summary.json")


def add_steps(folder: Path, *numbers: int, step_s: float = STEP_S, samples: int = 24) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        for step in numbers:
            record = {"step": step, "loss": 0.5, "samples": samples, "step_s": step_s}
            file.write(json.dumps({**record, "time_s": BEGIN_S + STEP_S * (step + 1)}) + "\n")


def add_samples(folder: Path, *records: Record) -> None:
    with (folder / "monitor.jsonl").open("a") as file:
        file.writelines(map(to_line, records))


def shown(moment: Moment, advised: Advised | None = None, now_s: float = BEGIN_S) -> str:
    out = StringIO()
    Console(file=out, width=160).print(view(moment, advised, now_s))
    return out.getvalue()


# A file


def test_a_followed_file_gives_every_whole_line_once(tmp_path: Path) -> None:
    path = tmp_path / "file"
    followed = Followed(path)
    assert followed.lines() == []
    path.write_bytes(b"one\ntw")
    assert followed.lines() == [b"one"]
    assert followed.lines() == []
    with path.open("ab") as file:
        file.write(b"o\nthree\n")
    assert followed.lines() == [b"two", b"three"]


def test_a_replaced_or_shortened_file_is_read_anew(tmp_path: Path) -> None:
    path, other = tmp_path / "file", tmp_path / "other"
    path.write_bytes(b"one\ntwo\n")
    followed = Followed(path)
    followed.lines()
    other.write_bytes(b"one\nthree\n")
    other.replace(path)
    assert followed.lines() == [b"one", b"three"]
    path.write_bytes(b"four\n")
    assert followed.lines() == [b"four"]


def test_of_a_long_file_only_the_end_is_read(tmp_path: Path) -> None:
    path = tmp_path / "file"
    lines = [b"%09d" % i for i in range(TAIL_BYTES // 5)]
    path.write_bytes(b"\n".join(lines) + b"\n")
    assert Followed(path).lines() == lines[-(TAIL_BYTES // 10) :], "what the beginning cuts is left out"


# A moment


def test_a_watch_follows_steps_and_samples(going: Path) -> None:
    watch = Watch(going)
    first = watch.look()
    assert (first.step, first.step_s, first.news_s, first.ended) == (None, None, None, False)
    assert "no step yet" in shown(first)
    add_steps(going, *range(100))
    add_samples(going, *gpu_samples(3), *host_samples(3, range(4)), NO_GPU)
    second = watch.look()
    assert second.step is not None
    assert second.step.step == 99
    assert second.step_s == STEP_S
    assert [(g.gpu, g.time_s) for g in second.gpus] == [(0, BEGIN_S + 1.0), (1, BEGIN_S + 1.0)]
    assert second.hosts[0].time_s == BEGIN_S + 1.0
    assert second.gaps == (NO_GPU.reason,)
    add_steps(going, *range(100, 100 + LATEST), step_s=0.3)
    add_steps(going, 100 + LATEST, samples=7, step_s=9.0)
    assert watch.look().step_s == 0.3, "of the latest full steps"
    end(going)
    assert watch.look().ended


def test_a_run_that_goes_on_from_an_earlier_step_begins_anew(going: Path) -> None:
    watch = Watch(going)
    add_steps(going, *range(30))
    watch.look()
    add_steps(going, 10, 11, step_s=0.7)
    moment = watch.look()
    assert moment.step is not None
    assert (moment.step.step, moment.step_s) == (11, 0.7)


def test_a_device_that_the_run_has_left_is_not_shown(going: Path) -> None:
    old = [replace(s, host="gone") for s in gpu_samples(1, 1)]
    add_samples(going, *old, *(replace(s, time_s=s.time_s + 1000) for s in gpu_samples(1, 1)))
    assert [gpu.host for gpu in Watch(going).look().gpus] == ["node0"]


def test_a_silent_run_is_told_apart_from_one_that_ended(going: Path) -> None:
    add_steps(going, *range(10))
    moment = Watch(going).look()
    news_s = BEGIN_S + 1.0
    assert moment.news_s == news_s
    assert moment.silent_s(news_s + SILENT_S) is None
    assert moment.silent_s(news_s + SILENT_S + 1) == SILENT_S + 1
    assert "nothing new for 100 s: the run may have been ended" in shown(moment, now_s=news_s + 100)
    slow = replace(moment, step_s=10.0)
    assert slow.silent_s(news_s + 150) is None, "a step takes that long"
    assert "the run has ended" in shown(replace(moment, ended=True), now_s=news_s + 100)


def test_a_malformed_line_is_named(going: Path) -> None:
    (going / "metrics.jsonl").write_text("{\n")
    with pytest.raises(RecordError, match=r"metrics.jsonl has a line that is not JSON"):
        Watch(going).look()
    (going / "metrics.jsonl").write_text('{"step": "one"}\n')
    with pytest.raises(RecordError, match=r"metrics.jsonl: step: expected a number, got 'one'"):
        Watch(going).look()


# The view


def test_gpus_have_bars_with_their_stages(going: Path) -> None:
    for record in run_of().timings:
        replace(record, host="node0", gpu=uuid_of(record.rank // 2)).save(going)
    unknown = GpuSample(BEGIN_S, "node0", 7, "GPU-7", throttle=("power",))
    add_samples(going, *gpu_samples(1), unknown)
    add_steps(going, *range(20))
    text = shown(Watch(going).look())
    (first,) = [row for row in text.splitlines() if row.startswith("node0 GPU 0")]
    assert "front; front, tail" in first
    assert "97%" in first
    assert "76%" in first
    assert "10 GiB of 80 GiB" in first
    (last,) = [row for row in text.splitlines() if row.startswith("node0 GPU 7")]
    assert last.count("unknown") == 4
    assert last.rstrip().endswith("power")
    (middle,) = [row for row in text.splitlines() if row.startswith("middle 0")]
    assert "97%" in middle
    assert "100 ms/step (" in text
    assert "240.0 samples/s" in text


def test_on_cpus_the_ranks_are_shown(going: Path) -> None:
    add_samples(going, *host_samples(2, range(4)), NO_GPU)
    moment = Watch(going).look()
    text = shown(moment)
    assert "no data: the job uses no GPU on this node" in text
    (rank,) = [row for row in text.splitlines() if row.startswith("1 ")]
    assert rank.split()[:4] == ["1", "front,", "tail", "0.50"]
    assert "lo 10.0 MB/s out, 10.0 in" in text
    assert line(moment).startswith("no step yet  node0 2.0 of 4 CPUs")


def test_advice_is_shown_where_there_is_any(going: Path) -> None:
    forecast = Forecast(0.1, 0.08, 24, 24, 2**30, 2**30, "estimated")
    advice = Advice(
        "micro_batch", "front", "larger micro-batches", ("a",), ("plan.front.micro_batch=6",), forecast
    )
    moment = Watch(going).look()
    text = shown(moment, Advised((advice,)))
    assert "1. larger micro-batches plan.front.micro_batch=6" in text
    assert "predicted: step 100 ms → 80 ms (+25% samples/s)" in text
    assert "advice" not in shown(moment)
    assert "not judged: no evidence" in shown(moment, Advised(lacking=("no evidence",)))


# The command


def test_a_finished_run_is_shown_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = folder_of(tmp_path / "demo")
    add_steps(folder, *range(5))
    out, _ = run(capsys, "monitor", str(folder))
    assert "demo  the run has ended" in out
    assert "step 5 " in out
    assert "\x1b" not in out


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in (
        ((str(tmp_path / "nowhere"),), "there is no folder"),
        ((str(tmp_path),), f"{tmp_path} is no run's folder: it lacks plan.json or metrics.jsonl"),
        ((), "takes one run's folder, every=SECONDS"),
        ((str(tmp_path), str(tmp_path)), "takes one run's folder"),
        ((str(tmp_path), "colour=red"), "takes one run's folder"),
        ((str(tmp_path), "every=often"), "every: often is no number of seconds"),
        ((str(tmp_path), "every=0"), "every: 0 is below 0.1 s"),
        ((str(tmp_path), "every=nan"), "every: nan is below 0.1 s or without end"),
        ((str(tmp_path), "once=1"), "once: 1 is neither true nor false"),
    ):
        _, err = run(capsys, "monitor", *arguments, code=2)
        assert err.startswith("hybridpar: ")
        assert said in err
        assert err.count("\n") == 1


def at_every_look(monkeypatch: pytest.MonkeyPatch, *events: Callable[[], None]) -> list[float]:
    """Let something happen instead of each sleep."""
    left, slept = list(events), []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        left.pop(0)()

    monkeypatch.setattr(watching.time, "sleep", sleep)
    return slept


def interrupt() -> None:
    raise KeyboardInterrupt


def test_without_a_terminal_there_is_a_line_for_new_steps_until_the_end(
    going: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    add_steps(going, 0)
    add_samples(going, *gpu_samples(1))
    slept = at_every_look(monkeypatch, lambda: add_steps(going, 1, 2), lambda: None, lambda: end(going))
    out, err = run(capsys, "monitor", str(going), "every=7")
    assert slept == [7.0] * 3
    rows = [row for row in out.splitlines() if row.startswith("step ")]
    assert len(rows) == 2, "of the view, and the line"
    assert rows[1].startswith("step 3  loss 0.5000  100 ms/step (3.751 ms predicted)  240.0 samples/s  ")
    assert rows[1].endswith("GPU 0 busy 97% occupancy 76%  GPU 1 busy 97% occupancy 76%")
    assert out.splitlines()[-1] == "the run has ended"
    assert not err


def test_ctrl_c_is_the_usual_end(
    going: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    at_every_look(monkeypatch, interrupt)
    _, err = run(capsys, "monitor", str(going), code=0)
    assert not err


def test_on_a_terminal_the_view_is_drawn_again_until_the_end(going: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = StringIO()
    monkeypatch.setattr(watching, "console", lambda: Console(file=out, force_terminal=True, width=120, height=60))
    add_steps(going, 0)
    slept = at_every_look(monkeypatch, lambda: add_steps(going, 1), lambda: end(going))
    assert watching.monitor([str(going)]) == 0
    assert slept == [watching.TERMINAL_S] * 2
    text = out.getvalue()
    assert "step 1 " in text
    assert "step 2 " in text
    assert text.count("the run has ended") >= 1
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l"), "the cursor is back"


INTERRUPTIBLE = """
import runpy, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
runpy.run_module("hybridpar", run_name="__main__", alter_sys=True)
"""
"""As started from a terminal; a shell has what it starts in the background ignore interrupts."""


def test_a_real_terminal_is_left_as_it_was(going: Path) -> None:
    add_steps(going, 0)
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTIBLE, "monitor", str(going), "every=0.2"],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "50"},
    )
    os.close(theirs)
    try:
        text = until(ours, lambda text: text.count(b"step 1 ") >= 2)
        process.send_signal(signal.SIGINT)
        text += until(ours, lambda _: False)  # who is not read from cannot end
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    assert text.rindex(b"\x1b[?25h") > text.rindex(b"\x1b[?25l")
    assert b"Traceback" not in text


def until(terminal: int, enough: Callable[[bytes], bool], limit_s: float = 60.0) -> bytes:
    """Read a terminal until there is enough, or nobody writes to it any more."""
    text, end_s = b"", time.monotonic() + limit_s
    while not enough(text) and time.monotonic() < end_s:
        if select.select([terminal], [], [], 0.1)[0]:
            try:
                text += os.read(terminal, 65536)
            except OSError:
                break
    return text
