"""The page of a run: whole, self-contained, and right in a browser; its pictures and its trace."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import replace
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import pytest

from hybridpar.report.account import Account
from hybridpar.report.advice import Advice, Advised, Forecast
from hybridpar.report.comparison import compare
from hybridpar.report.history import Evaluations, Step, Steps
from hybridpar.report.overlay import FILES, both_traces, draw, timelines
from hybridpar.report.page import page
from hybridpar.report.trace import PROCESSES
from tests.support.recordings import host_samples
from tests.support.reports import SLOWER, on_gpus, recorded, run_of

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def html() -> str:
    run = run_of()
    return page([Account.of(run)])


@pytest.fixture(scope="module")
def full() -> str:
    """All that a page can have: two runs, one on GPUs and one on CPUs, both recorded, with advice."""
    forecast = Forecast(0.1, 0.08, 24, 24, 2**30, 2**31, "estimated")
    advice = Advice(
        "micro_batch", "front", "take more " * 9, ("because of " * 9,), ("plan.front.micro_batch=8",), forecast
    )
    on_cpus = replace(run_of("cpus"), recording=recorded(list(host_samples(60, range(4)))))
    accounts = [Account.of(on_gpus(run_of("gpus"))), Account.of(on_cpus)]
    return page([replace(account, advised=Advised((advice,))) for account in accounts])


class Reader(HTMLParser):
    """Collects what a page refers to, its ids, and whether its elements are closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.ids: Counter[str] = Counter()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in {"meta", "link"}:
            self.open.append(tag)
        for name, value in attrs:
            if name in {"href", "src", "xlink:href"}:
                self.references.append(str(value))
            if name == "id":
                self.ids[str(value)] += 1

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in {"meta", "link"}:
            self.open.pop()


def test_a_page_needs_nothing_else_and_is_well_formed(html: str) -> None:
    read = Reader(html)
    assert not read.open
    assert not [r for r in read.references if not r.startswith(("#", "data:"))]
    assert not re.search(r"@import|<script|url\((?!#)", html)
    assert max(read.ids.values()) == 1
    assert {r[1:] for r in read.references if r.startswith("#")} <= read.ids.keys()


def test_a_page_shows_what_the_terminal_says(html: str) -> None:
    run = run_of()
    for finding in Account.of(run).findings:
        for row in finding.rows:
            for cell in row:
                assert escape(cell) in html
    assert html.count("<svg ") == 6, "loss, accuracy, time of steps, timelines, memory, placement"
    assert page([Account.of(run)]) == html, "the same run gives the same page"


def test_everything_took_half_as_long_again() -> None:
    comparison = compare(run_of())
    assert comparison is not None
    for found, expected in zip(comparison.measured_shares, comparison.predicted_shares, strict=True):
        assert found.busy_s == pytest.approx(SLOWER * expected.busy_s)
    assert all(d.measured_s == pytest.approx(SLOWER * d.predicted_s, abs=1e-12) for d in comparison.deviations)


def test_names_are_not_taken_for_markup() -> None:
    run = run_of("<b>&amp;")
    text = page([Account.of(run)])
    assert "<b>" not in text
    assert "&lt;b&gt;&amp;amp;" in text


def test_devices_hosts_and_networks_are_drawn(full: str) -> None:
    Reader(full)
    for label in ("utilisation and occupancy of node0 GPU 1", "distribution of the occupancy"):
        assert full.count(f'aria-label="{label}"') == 1
    for label in ("busy CPUs of node0", "network of node0"):
        assert full.count(f'aria-label="{label}"') == 2
    assert full.count("<h2>advice</h2>") == 2
    assert "no monitor.jsonl" not in full


def test_runs_stand_side_by_side() -> None:
    runs = [run_of("one"), run_of("two", steps=80)]
    text = page([Account.of(run) for run in runs])
    Reader(text)
    assert "side by side" in text
    assert text.count("<section>") == 2


def test_a_page_of_a_run_that_has_just_begun() -> None:
    run = replace(run_of(), steps=Steps.of(()), evaluations=Evaluations.of(()), summary=None, timings=())
    text = page([Account.of(run)])
    Reader(text)
    assert "no timeline was recorded under this plan" in text


def test_a_diverged_run_is_drawn() -> None:
    run = run_of()
    lost = Steps.of(Step(i, math.nan, 24, 0.1) for i in range(40))
    Reader(page([replace(Account.of(run), run=replace(run, steps=lost))]))


def test_colours_have_names_that_a_dark_page_gives_other_values(html: str) -> None:
    svg = html[html.index("<svg ") :]
    for colour in ("#1a1a1a", "#5a5a5a", "#f1f1f1", "#222222"):
        assert colour not in svg
    names = set(re.findall(r"var\(--(\w+)\)", html))
    for block in re.findall(r":root \{ (.*?) \}", html):
        assert names <= set(re.findall(r"--(\w+):", block))


# Pictures


def test_both_timelines_have_one_scale(tmp_path: Path) -> None:
    run = run_of()
    comparison = compare(run)
    assert comparison is not None
    for path in draw(run, comparison, tmp_path):
        assert path.stat().st_size > 1000
    assert {p.name for p in tmp_path.iterdir()} == set(FILES)
    svg = (tmp_path / "timelines.svg").read_text()
    assert svg.count("predicted: step of") == svg.count("measured: step of") == 1
    assert svg.count("rank 3</text>") == 2
    drawn = [p.get_path().get_extents() for p in timelines(comparison).axes[0].patches if p.get_gid() == "idle"]
    assert [box.x0 for box in drawn] == [drawn[0].x0] * 2
    assert drawn[1].width / drawn[0].width == pytest.approx(SLOWER, rel=0.02)


def test_the_trace_has_both_timelines_as_processes() -> None:
    run = run_of()
    comparison = compare(run)
    assert comparison is not None
    found = both_traces(run, comparison)
    events = json.loads(json.dumps(found))["traceEvents"]
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert names == {
        0: "predicted node0",
        1: "predicted node1",
        PROCESSES: "measured node0",
        PROCESSES + 1: "measured node1",
    }
    ends = [
        max(e["ts"] + e["dur"] for e in events if e["ph"] == "X" and e["pid"] // PROCESSES == k) for k in (0, 1)
    ]
    assert ends[1] == pytest.approx(SLOWER * ends[0], rel=0.02)
    assert any(e.get("cat") == "wait" for e in events)
    flows = Counter((e["id"], e["ph"]) for e in events if e["ph"] in {"s", "f"})
    assert set(flows.values()) == {1}


# In a browser


def browse(folder: Path, html: str, width: int, *, dark: bool = False) -> tuple[int, int, str]:
    """Open a page in a frame, which may be narrower than a window; widths of content and view, and errors."""
    told = "parent.postMessage([document.documentElement.scrollWidth, innerWidth], '*')"
    (folder / "page.html").write_text(html.replace("</body>", f"<script>{told}</script></body>"))
    listen = "onmessage = e => { document.title = e.data.join(' ') }"
    frame = f'<iframe src="page.html" width="{width}" height="4000" style="border:0"></iframe>'
    (folder / "frame.html").write_text(f"<script>{listen}</script>{frame}")
    assert CHROMIUM
    done = subprocess.run(
        [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--enable-logging=stderr",
            f"--user-data-dir={folder / 'profile'}",
            *(["--blink-settings=preferredColorScheme=0"] if dark else []),
            "--virtual-time-budget=3000",
            "--window-size=1400,4100",
            "--dump-dom",
            (folder / "frame.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    content, view = re.search(r"<title>(\d+) (\d+)</title>", done.stdout).groups()  # type: ignore[union-attr]
    return int(content), int(view), "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (400, True)])
def test_a_browser_shows_it_without_errors_and_without_sideways_scrolling(
    full: str, tmp_path: Path, width: int, dark: bool
) -> None:
    content, view, errors = browse(tmp_path, full, width, dark=dark)
    assert view == width
    assert content <= width
    assert not errors
