"""The report of a long run: a small page that shows every extreme, read without being held."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest

from hybridpar.report.account import Account
from hybridpar.report.page import page
from hybridpar.report.thinning import MOST_POINTS
from scripts.bench.report import EVALUATIONS, lengthen
from tests.support.reports import folder_of

MOST_PAGE_BYTES = 20e6


def check(tmp_path: Path, steps: int, monitor_bytes: int, gpus: int) -> None:
    folder = tmp_path / "long"
    extremes = lengthen(folder_of(tmp_path / "short"), folder, steps, monitor_bytes, gpus)
    account = Account.load(folder)
    run = account.run
    assert run.steps.count == steps
    assert run.evaluations.count == steps // EVALUATIONS
    assert run.steps.step_s == pytest.approx(0.1, rel=0.01)
    assert (extremes.step, extremes.loss) in run.steps.losses
    assert (extremes.step, extremes.step_s) in run.steps.seconds
    assert len(run.steps.losses) <= MOST_POINTS
    assert run.recording is not None
    assert len(run.recording.gpus) == gpus
    for gpu in run.recording.gpus:
        assert min(y for _, y in gpu.occupancy) == 0.96 * extremes.occupancy
        assert gpu.while_busy[0] == 1
    html = page([account])
    assert len(html.encode()) < MOST_PAGE_BYTES
    assert html.count("<svg ") == 6 + gpus + 1 + 2


def test_a_page_of_many_steps_is_small_and_shows_every_extreme(tmp_path: Path) -> None:
    check(tmp_path, 20_000, 2**20, 2)


@pytest.mark.slow
def test_a_page_of_a_million_steps_and_of_a_full_monitor_file(tmp_path: Path) -> None:
    check(tmp_path, 10**6, 32 * 2**20, 8)


def test_a_run_is_read_and_not_held(tmp_path: Path) -> None:
    folder = tmp_path / "long"
    lengthen(folder_of(tmp_path / "short"), folder, 20_000, 2**19, 1)
    held_bytes = (folder / "metrics.jsonl").stat().st_size
    tracemalloc.start()
    Account.load(folder)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < held_bytes / 2
