"""hybridpar beside its peers on several hosts of this machine: one command for a table, resumable.

Needs Linux, root, network namespaces and control groups, and a machine that does nothing else meanwhile.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
import time
from pathlib import Path

from hybridpar.errors import ConfigError, HybridparError
from hybridpar.schema import to_data
from scripts.bench.about import code, commit, machine, versions
from scripts.bench.beat import Beat
from scripts.bench.cgroups import CgroupError, Cgroups
from scripts.bench.children import ROOT
from scripts.bench.cluster.agreement import Agreements, known
from scripts.bench.cluster.cell import Cell, Conditions
from scripts.bench.cluster.contestants import CONTESTANTS, find
from scripts.bench.cluster.field import Field
from scripts.bench.cluster.folder import Folder
from scripts.bench.cluster.plans import Planner
from scripts.bench.cluster.plots import draw, draw_links
from scripts.bench.cluster.rounds import Rounds
from scripts.bench.cluster.runner import Runner
from scripts.bench.cluster.setting import Setting
from scripts.bench.cluster.summary import Result, result
from scripts.bench.cluster.table import render
from scripts.bench.cluster.tables import TABLES, tuned_at
from scripts.bench.cluster.verdicts import verdicts
from scripts.bench.files import insert, write_json
from scripts.launch.namespaces import Hosts, HostsError

CORE_MINUTES = 60.0


def main() -> int:
    """Run what is not done yet; 0 when all of the requirement holds, 1 when not, 2 for a mistake or a failure."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda n, _: sys.exit(128 + n))  # leave by way of the clean-up of hosts
    arguments = _arguments()
    try:
        return _run(arguments)
    except (HybridparError, HostsError, CgroupError) as e:
        sys.stderr.write(f"cluster: {e}\n")
        return 2


def _run(arguments: argparse.Namespace) -> int:
    began_s = time.monotonic()
    settings = [s for s in TABLES[arguments.table] if arguments.only in s.name]
    if not settings:
        names = ", ".join(s.name for s in TABLES[arguments.table])
        raise ConfigError(
            f"--only {arguments.only}: no setting of {arguments.table} has this in its name ({names})"
        )
    conditions = Conditions(commit(), code(), machine(), versions(), arguments.warm_up, arguments.steps)
    folder = Folder(arguments.out / conditions.code)
    if not arguments.render:
        Hosts(1).close()  # refused before any work is done
        Cgroups([settings[0].cores]).close()
        _measure(arguments, settings, conditions, folder, began_s + arguments.minutes * 60)
    results = [_result(folder, setting) for setting in settings]
    held = verdicts(results)
    text = render(results, held, _about(arguments, conditions, results))
    sys.stdout.write(f"{text}\n")
    if arguments.docs is not None:
        _publish(arguments, results, text)
    return int(any(v.holds is False for v in held))


def _measure(
    arguments: argparse.Namespace,
    settings: list[Setting],
    conditions: Conditions,
    folder: Folder,
    deadline_s: float,
) -> None:
    """Plan, tune, compare losses, then measure in rounds."""
    folder.path.mkdir(parents=True, exist_ok=True)
    with Beat(folder.beats) as beat:
        runner = Runner(folder, beat, lambda name: find(name).alone)
        planner = Planner(folder, arguments.profile_s, arguments.probe_s, _say)
        field = Field(
            folder,
            planner,
            runner,
            conditions,
            arguments.contestants,
            arguments.candidates,
            arguments.tuning_s,
            find,
            _say,
        )
        fields = [(s, field.entries(s, tuned_at(s, TABLES[arguments.table]))) for s in settings]
        agreements = Agreements(folder, runner, conditions, _say)
        for setting, entries in fields:
            for entry in entries:
                if entry.problem is None:
                    agreements.of(setting, entry)
        Rounds(folder, runner, conditions, arguments.rounds, deadline_s, _say).run(fields)


def _result(folder: Folder, setting: Setting) -> Result:
    """Return what a folder has of a setting."""
    cells = [Cell.load(path) for path in folder.cells(setting)]
    return result(setting, cells, lambda cell: known(folder.parity(setting, cell.entry), cell.entry))


def _publish(arguments: argparse.Namespace, results: list[Result], text: str) -> None:
    """Put the tables into the document, and pictures and raw data beside it."""
    document: Path = arguments.docs
    stem = f"{document.stem}-{arguments.table}"
    draw(results, document.with_name(f"{stem}.svg"))
    pictures = [f"![step times]({stem}.svg)"]
    if draw_links(results, document.with_name(f"{stem}-links.svg")):
        pictures.append(f"![step times over links]({stem}-links.svg)")
    write_json(document.with_name(f"{stem}.json"), [to_data(row.cell) for r in results for row in r.rows])
    raw = f"Every launch with its raw times and counters: [{stem}.json]({stem}.json)."
    insert(document, f"cluster:{arguments.table}", "\n\n".join([text, *pictures, raw]))


def _about(arguments: argparse.Namespace, conditions: Conditions, results: list[Result]) -> dict[str, str]:
    """Return when, where and how the tables were made."""
    rounds = [r for result in results for row in result.rows for r in row.cell.rounds]
    dates = sorted(r.date for r in rounds)
    commits = {row.cell.conditions.commit for result in results for row in result.rows}
    beats = [r.beat_s for r in rounds if r.beat_s is not None]
    speed = (
        f"the slowest launch's beat took {max(beats) / min(beats):.2f} times the fastest one's" if beats else ""
    )
    return {
        "command": f"`python -m scripts.bench.cluster {arguments.table}`",
        "taken": f"{dates[0]} to {dates[-1]} UTC" if dates else "never",
        "machine": conditions.machine,
        "software": f"hybridpar {', '.join(sorted(commits)) or conditions.commit}, {conditions.versions}",
        "a launch": f"{conditions.warm_up} step(s) of warm-up, {conditions.steps} timed",
        "machine's speed": speed or "not known",
    }


def _say(text: str) -> None:
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {text}\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m scripts.bench.cluster", description=__doc__)
    add = parser.add_argument
    add("table", choices=TABLES)
    add("--only", default="", metavar="TEXT", help="settings with this in their name")
    add("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS), help="default: all")
    add("--candidates", action="store_true", help="also our best plan of every shape, not the chosen one alone")
    add("--rounds", type=int, default=3, help="default: %(default)s")
    add("--warm-up", type=int, default=1, help="steps of a launch that do not count; default: %(default)s")
    add("--steps", type=int, default=2, help="timed steps of a launch; default: %(default)s")
    add("--minutes", type=float, help="no second round begins that would end later; default: 60 for core")
    add("--tuning-s", type=float, default=60.0, help="of each contestant; default: %(default)s")
    add("--profile-s", type=float, default=120.0, help="budget of a profile; default: %(default)s")
    add("--probe-s", type=float, default=40.0, help="budget of a probe; default: %(default)s")
    add("--out", type=Path, default=ROOT / "runs" / "cluster", help="default: runs/cluster")
    add("--docs", type=Path, help="document that takes the tables, with pictures and raw data beside it")
    add("--render", action="store_true", help="measure nothing, show what there is")
    given = parser.parse_args()
    for name in ("rounds", "steps"):
        if getattr(given, name) < 1:
            parser.error(f"--{name}: {getattr(given, name)} is below 1")
    if given.minutes is None:
        given.minutes = CORE_MINUTES if given.table == "core" else math.inf
    given.out, given.docs = _below(given.out), given.docs and _below(given.docs)
    os.chdir(ROOT)  # what is written down names files from here
    return given


def _below(path: Path) -> Path:
    """Return a path as seen from the root of this tree, where it lies below it."""
    path = path.resolve()
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


if __name__ == "__main__":
    sys.exit(main())
