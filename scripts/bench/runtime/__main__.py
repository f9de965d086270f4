"""Measure a contest of the runtime, in turns, and write its row into a document.

Needs root for the control groups that grant every rank its share of a core, and a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from scripts.bench.about import machine, software
from scripts.bench.accuracy.launch import on_ranks
from scripts.bench.cgroups import CgroupError
from scripts.bench.children import LaunchFailedError
from scripts.bench.runtime.contests import CONTESTS, OF_OPTIONS, Setting
from scripts.bench.runtime.models import CHAIN_OF_LINEARS
from scripts.bench.runtime.options import OPTIONS
from scripts.bench.runtime.rivals import Ours
from scripts.bench.turns import compare

TIMEOUT_S = 3600.0


def main() -> int:
    """Measure; 0 when done, 2 for a mistake or a failure."""
    arguments = _arguments()
    contest = CONTESTS[arguments.contest]
    setting = Setting(
        arguments.contest,
        arguments.model or contest.model,
        arguments.global_batch or contest.global_batch,
        arguments.micro_batch or contest.micro_batch,
        arguments.bucket_mib,
        arguments.segments,
        tuple(arguments.options or OF_OPTIONS[arguments.contest]) if arguments.contest in OF_OPTIONS else (),
    )
    folder = arguments.out or Path("runs") / f"runtime-{setting.contest}-{setting.model}"
    folder.mkdir(parents=True, exist_ok=True)
    raw, log = folder / "turns.json", folder / "log"
    worker = ["-m", "scripts.bench.runtime.worker", json.dumps(dataclasses.asdict(setting))]
    rest = [str(arguments.rounds), str(arguments.steps), str(raw.absolute())]
    try:
        on_ranks([*worker, *rest], [arguments.cores] * contest.world, log, TIMEOUT_S, late=True)
    except (CgroupError, LaunchFailedError) as e:
        sys.stderr.write(f"runtime: {e}\n")
        return 2
    text = _render(setting, arguments, contest.world, json.loads(raw.read_text()))
    (folder / "table.md").write_text(text)
    sys.stdout.write(text)
    return 0


def _render(setting: Setting, arguments: argparse.Namespace, world: int, found: dict[str, Any]) -> str:
    """Return the table of a contest, and how it was taken."""
    turns, batch = found["turns"], setting.global_batch
    ours = [turn["step_s"] for turn in turns[Ours.name]]
    ranks = f"{world} rank(s) of {arguments.cores:g} core"
    sizes = (
        f"{batch} samples per step, micro-batches of {setting.micro_batch}, buckets of {setting.bucket_mib} MiB"
    )
    if setting.contest == "middle":
        sizes += f", {setting.segments} segment(s) per rank"
    date, rounds = (
        time.strftime("%Y-%m-%d", time.gmtime()),
        f"{arguments.rounds} rounds of {arguments.steps} steps",
    )
    options = setting.contest in OF_OPTIONS
    ratio_of = "with it / default" if options else "ours / theirs"
    lines = [
        f"- contest: {setting.contest}, {setting.model}, {ranks}, {sizes}",
        f"- taken: {date}, {rounds}, {machine()}; {software()}",
        "",
        f"| rival | median s per step | CPU ms per sample | {ratio_of}, median of the rounds | 95 % interval |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, own in turns.items():
        step_s = statistics.median(turn["step_s"] for turn in own)
        cpu_ms = statistics.median(turn["cpu_s"] for turn in own) / batch * 1e3
        row = f"| {name} | {step_s:.4g} | {cpu_ms:.3g} |"
        if name == Ours.name:
            lines.append(f"{row} | |")
            continue
        theirs = [turn["step_s"] for turn in own]
        ratio = compare(theirs, ours) if options else compare(ours, theirs)
        lines.append(f"{row} {ratio.median:.3f} | {ratio.low:.3f} to {ratio.high:.3f} |")
    if setting.model == CHAIN_OF_LINEARS and not options:
        other = next(own for name, own in turns.items() if name != Ours.name)
        pairs = zip(turns[Ours.name], other, strict=True)
        each_s = statistics.median(a["cpu_s"] - b["cpu_s"] for a, b in pairs) / found["actions"]
        more = f"{each_s * 1e6:.1f} us of CPU time more per action than the loop"
        lines += ["", f"{found['actions']} actions per step: {more}"]
    return "\n".join(lines) + "\n"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m scripts.bench.runtime", description=__doc__)
    parser.add_argument("contest", choices=CONTESTS)
    parser.add_argument("--model", help="of torchvision; default: the contest's")
    parser.add_argument("--global-batch", type=int, help="samples per step; default: the contest's")
    parser.add_argument("--micro-batch", type=int, help="default: the contest's")
    parser.add_argument("--bucket-mib", type=int, default=8, help="our gradient buckets; default: %(default)s")
    parser.add_argument("--segments", type=int, default=2, help="of our pipeline, per rank; default: %(default)s")
    parser.add_argument(
        "--options", nargs="+", choices=OPTIONS, help="of a contest of options; default: all it has"
    )
    parser.add_argument("--cores", type=float, default=0.45, help="of every rank; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=15, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=2, help="of a turn; default: %(default)s")
    parser.add_argument("--out", type=Path, help="folder; default: runs/runtime-CONTEST-MODEL")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
