"""The cluster bench's figures: names, tuning, rounds, cells, ratios, verdicts, table. Nothing here needs root."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hybridpar.errors import ConfigError
from scripts.bench.beat import Beat
from scripts.bench.cluster.agreement import Agreement
from scripts.bench.cluster.cell import Cell, Conditions, Entry, Round, resumed
from scripts.bench.cluster.folder import Folder
from scripts.bench.cluster.plots import draw, draw_links
from scripts.bench.cluster.rounds import Rounds
from scripts.bench.cluster.runner import Runner, Steps
from scripts.bench.cluster.setting import Setting
from scripts.bench.cluster.summary import Result, result
from scripts.bench.cluster.table import render
from scripts.bench.cluster.tables import TABLES, VGG16, tuned_at
from scripts.bench.cluster.tuning import Options, Try, tried, tune
from scripts.bench.cluster.verdicts import Verdict, verdicts

CONDITIONS = Conditions("abc", "123", "a machine", "some software", 1, 2)
FOUR = replace(VGG16, gbit_per_s=1.0)


def rank(step_s: float, sent: int = 0, peak_bytes: int = 0) -> dict[str, Any]:
    return {
        "step_s": [step_s, step_s],
        "cpu_s": [step_s / 2] * 2,
        "losses": [],
        "peak_bytes": peak_bytes,
        "bytes": {"eth0": [0, 2 * sent], "lo": [0, 0]},
        "error": None,
    }


def taken(number: int, step_s: float, ranks: int = 4) -> Round:
    return Round(number, "2026-11-29 12:00:00", 10.0, tuple(rank(step_s, 10**6) for _ in range(ranks)), 0.002)


def cell(name: str, *steps_s: float, setting: Setting = FOUR, **entry: Any) -> Cell:
    ours = name.startswith("hybridpar")
    made = Entry(name, "hybridpar" if ours else name, {}, **entry)
    ranks = 1 if name == "floor" else setting.world
    return Cell(setting, made, CONDITIONS, tuple(taken(n, s, ranks) for n, s in enumerate(steps_s)))


def compared(*cells: Cell, setting: Setting = FOUR, lossy: str = "", differs: str = "") -> Result:
    def agreed(own: Cell) -> Agreement:
        off = 0.5 if own.entry.name == differs else 0.0
        return Agreement(own.entry, CONDITIONS, (1.0 + off,), (1.0,), own.entry.name == lossy)

    return result(setting, cells, agreed)


def test_names_tell_what_is_not_as_usual() -> None:
    assert VGG16.name == "vgg16-16-4x1-3.3g"
    assert replace(VGG16, gbit_per_s=None, memory_mb=1200).name == "vgg16-16-4x1-1200mb"
    assert VGG16.work == replace(VGG16, gbit_per_s=3.3, memory_mb=5, cores=0.2).work
    assert VGG16.devices == replace(VGG16, images_per_rank=4, gbit_per_s=None).devices
    assert VGG16.links_name == replace(VGG16, model="alexnet", images_per_rank=4, classes=7).links_name
    assert VGG16.links_name != replace(VGG16, gbit_per_s=1.0).links_name
    settings = [s for own in TABLES.values() for s in own]
    assert len({s.name for s in settings}) == len(set(settings))


@pytest.mark.parametrize("wrong", [{"hosts": 0}, {"cores": 0.0}, {"gbit_per_s": -1.0}])
def test_impossible_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"setting.{next(iter(wrong))}"):
        replace(VGG16, **wrong)


def test_options_are_tuned_once_for_all_links_of_a_table() -> None:
    core = TABLES["core"]
    assert {tuned_at(s, core) for s in core} == {VGG16}
    batches = TABLES["batches"]
    assert {tuned_at(s, batches).images_per_rank for s in batches} == {8, 16, 32}


def test_tuning_walks_along_the_axes_within_its_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = [0.0]
    monkeypatch.setattr("scripts.bench.cluster.tuning.time.monotonic", lambda: now_s[0])
    grid: list[Options] = [{"a": a, "b": b} for a in range(3) for b in range(3)]

    def launch(options: Options, number: int) -> Try:
        assert number == len(tries)
        now_s[0] += 10.0
        tries.append(options)
        failing = options == {"a": 0, "b": 2}
        return Try(
            options, 10.0, None if failing else 9.0 - options["a"] - options["b"], "no" if failing else None
        )

    tries: list[Options] = []
    found = tune("ddp", grid, 55.0, CONDITIONS, launch)
    assert [(o["a"], o["b"]) for o in tries] == [(0, 0), (0, 1), (0, 2), (1, 1), (1, 0), (1, 2)]
    assert found.best == {"a": 1, "b": 2}
    assert len(found.tries) == 6
    tries = []
    assert tune("ddp", grid[:1], 55.0, CONDITIONS, launch).best == grid[0]
    assert tries == []
    failed = tune("ddp", grid[:2], 0.0, CONDITIONS, lambda o, _: Try(o, 1.0, None, "broken"))
    assert (failed.best, failed.error) == (None, "broken")


def test_a_try_costs_its_step_or_who_runs_alone_its_cpu_time() -> None:
    assert tried({}, taken(0, 3.0), alone=False).cost_s == 3.0
    assert tried({}, taken(0, 3.0, ranks=1), alone=True).cost_s == 1.5
    assert tried({}, replace(taken(0, 3.0), ranks=(), error="broken"), alone=False).error == "broken"


def test_a_cell_goes_on_under_the_same_conditions_only(tmp_path: Path) -> None:
    path, known = tmp_path / "cell.json", cell("ddp", 3.0, 4.0)
    known.save(path)
    fresh = replace(known, rounds=())
    assert resumed(path, fresh) == known
    assert resumed(path, replace(fresh, conditions=replace(CONDITIONS, commit="def"))) == known
    for other in (
        replace(fresh, conditions=replace(CONDITIONS, code="456")),
        replace(fresh, conditions=replace(CONDITIONS, steps=9)),
        replace(fresh, entry=replace(known.entry, options={"bucket_mb": 8})),
    ):
        assert resumed(path, other) == other
    assert known.sent_bytes() == 4 * 10**6
    assert known.round_s == {0: 3.0, 1: 4.0}


class FakeRunner(Runner):
    """Takes what it is told, and notes the turns."""

    def __init__(self, folder: Folder, step_s: dict[str, float]) -> None:
        super().__init__(folder, Beat(folder.beats), lambda name: name == "floor")
        object.__setattr__(self, "step_s", step_s)
        object.__setattr__(self, "turns", [])

    def run(self, name: str, setting: Setting, entry: Entry, steps: Steps, number: int = 0) -> Round:
        del name, setting, steps
        self.turns.append((number, entry.name))  # type: ignore[attr-defined]
        step_s = self.step_s[entry.name]  # type: ignore[attr-defined]
        if math.isnan(step_s):
            return replace(taken(number, 1.0), ranks=(), error="broken")
        return taken(number, step_s)


def test_rounds_take_turns_and_leave_out_who_failed_or_is_far_behind(tmp_path: Path) -> None:
    step_s = {"hybridpar": 1.0, "ddp": 9.0, "floor": 9.0, "slow": 1.7, "near": 1.5, "broken": math.nan}
    entries = [Entry(name, name) for name in step_s] + [Entry("absent", "absent", problem="no such library")]
    runner = FakeRunner(Folder(tmp_path), step_s)
    rounds = Rounds(Folder(tmp_path), runner, CONDITIONS, 2, math.inf, lambda _: None)
    rounds.run([(FOUR, entries)])
    turns = runner.turns  # type: ignore[attr-defined]
    assert [name for number, name in turns if number == 0] == list(step_s)
    assert [name for number, name in turns if number == 1] == ["ddp", "floor", "near", "hybridpar"]
    turns.clear()
    rounds.run([(FOUR, entries)])
    assert turns == []
    cells = [Cell.load(path) for path in Folder(tmp_path).cells(FOUR)]
    assert {c.entry.name: c.error for c in cells if c.error} == {"broken": "broken", "absent": "no such library"}
    late = Rounds(Folder(tmp_path), runner, CONDITIONS, 3, -math.inf, lambda _: None)
    late.run([(FOUR, entries)])
    assert turns == []


def test_ratios_are_paired_and_lossy_ones_are_no_rivals() -> None:
    found = compared(
        cell("hybridpar", 1.0, 2.0, 3.0, predicted_s=1.9, shape="front_tail"),
        cell("ddp", 2.0, 4.0, 6.0),
        cell("bf16", 0.5, 0.5),
        cell("fsdp2", 3.0),
        cell("floor", 1.8, 1.8, 1.8),
        cell("absent", problem="ImportError: none"),
        lossy="bf16",
    )
    assert [row.name for row in found.rows] == ["bf16", "floor", "hybridpar", "fsdp2", "ddp", "absent"]
    rows = {row.name: row for row in found.rows}
    assert rows["hybridpar"].to_ddp is not None
    assert rows["hybridpar"].to_ddp.median == 0.5
    assert rows["floor"].step_s == pytest.approx(0.9 / (4 * 0.45))
    assert rows["hybridpar"].error == pytest.approx(1.9 / 2.0 - 1)
    assert found.best_peer is rows["fsdp2"]
    assert found.ratio("hybridpar", found.best_peer) == pytest.approx(1 / 3)
    assert rows["absent"].step_s is None


def held(*results: Result) -> dict[str, Verdict]:
    return {v.what: v for v in verdicts(results)}


def test_verdicts_of_vgg16() -> None:
    def at(
        gbit: float, ours_s: float, peers: dict[str, float], predicted_s: float = 1.0, shape: str = "front_tail"
    ) -> Result:
        setting = replace(VGG16, gbit_per_s=gbit)
        own = cell("hybridpar", ours_s, setting=setting, predicted_s=predicted_s, shape=shape)
        return compared(own, *(cell(n, s, setting=setting) for n, s in peers.items()), setting=setting)

    slow = at(1.0, 1.0, {"ddp": 3.4}, predicted_s=0.9)
    middle = at(3.3, 1.0, {"ddp": 2.0, "torch_1f1b": 2.2, "floor": 1.8 * 1.8})
    fast = at(10.0, 1.0, {"ddp": 0.98, "floor": 1.8}, shape="data_parallel")
    found = held(slow, middle, fast)
    assert found["vgg16-16-4x1-1g: DDP's step over ours"].holds is False
    assert found["vgg16-16-4x1-3.3g: the best pipeline's step over ours"].holds is True
    assert found["vgg16-16-4x1-3.3g: our step over the floor"].found == "1.11"
    assert found["vgg16-16-4x1-10g: our step over the floor"].holds is False
    assert found["vgg16-16-4x1-10g: our step over that of ddp"].holds is True
    assert found["same losses as one process"].holds is True
    assert found["worst error of our predictions"].found == "10.0%"
    assert "vgg16-16-4x1-3.3g: the planner's choice over our best plan" not in found


def test_other_work_and_a_bad_choice_are_told() -> None:
    found = held(
        compared(
            cell("hybridpar", 1.2, predicted_s=1.0, shape="front_tail"),
            cell("hybridpar, three_stage", 1.0, predicted_s=1.1, shape="three_stage"),
            cell("ddp", 3.0),
            differs="ddp",
        )
    )
    assert found["same losses as one process"].found == "ddp (vgg16-16-4x1-1g)"
    assert found["same losses as one process"].holds is False
    assert found["vgg16-16-4x1-1g: the planner's choice over our best plan"].found == "1.2"
    assert found["our plans ranked as predicted"].holds is False
    assert held(compared(cell("ddp", 1.0)))["vgg16-16-4x1-1g: our step over that of ddp"].holds is None


@pytest.mark.parametrize("error", ["killed: rank 0 took more memory than 1500 MB (see a.log)", None])
def test_a_memory_limit_is_to_kill_data_parallelism_only(error: str | None) -> None:
    setting = replace(VGG16, memory_mb=1500)
    ddp = cell("ddp", setting=setting, problem=error) if error else cell("ddp", 3.0, setting=setting)
    found = held(compared(cell("hybridpar", 1.0, setting=setting), ddp, setting=setting))
    verdict = found["vgg16-16-4x1-3.3g-1500mb: DDP is killed for its memory, and our plan trains"]
    assert verdict.holds is (error is not None)
    assert "ours trains" in verdict.found


def test_pictures_are_drawn_of_what_was_measured(tmp_path: Path) -> None:
    settings = [replace(VGG16, gbit_per_s=g) for g in (1.0, 3.3)]
    results = [
        compared(cell("hybridpar", 1.0, setting=s, predicted_s=0.9), cell("ddp", 2.0, setting=s), setting=s)
        for s in settings
    ]
    draw(results, tmp_path / "bars.svg")
    assert "vgg16-16-4x1-3.3g" in (tmp_path / "bars.svg").read_text()
    assert draw_links(results, tmp_path / "links.svg")
    assert not draw_links(results[:1], tmp_path / "none.svg")
    assert {p.name for p in tmp_path.iterdir()} == {"bars.svg", "links.svg"}


def test_the_table_has_everybody() -> None:
    found = compared(
        cell("hybridpar", 1.0, predicted_s=0.9, shape="front_tail"),
        cell("ddp", 2.0),
        cell("fsdp2", problem="ImportError: a | b\nnone"),
    )
    text = render([found], verdicts([found]), {"machine": "mine"})
    assert "- machine: mine" in text
    assert "| **hybridpar** | 1.000 | 1.000 to 1.000 | 0.500 (0.500 to 0.500) |" in text
    assert "| 4 MB | 0 MB |" in text
    assert "| fsdp2 | failed: none |" in text
    widths = {
        line.count("|")
        for line in text.splitlines()
        if line.startswith(("| contestant", "| **", "| ddp", "| fsdp2"))
    }
    assert len(widths) == 1
