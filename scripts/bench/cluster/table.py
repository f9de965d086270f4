"""The results as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from scripts.bench.cluster.cell import Cell
from scripts.bench.cluster.field import OURS
from scripts.bench.cluster.summary import Result, Row
from scripts.bench.cluster.verdicts import Verdict
from scripts.bench.turns import Ratio
from scripts.launch.namespaces import INTERFACE

COLUMNS = (
    *("contestant", "s per step", "spread", "over DDP", "over best peer", "floor's share", "predicted"),
    *("sent between hosts", "inside", "memory per rank", "losses", "rounds", "options"),
)
HOLDS = {True: "yes", False: "**no**", None: "not measured"}


def render(results: Sequence[Result], held: Sequence[Verdict], about: dict[str, str]) -> str:
    """Return what the tables rest on, what of the requirement holds, and a table per setting."""
    lines = [f"- {what}: {said}" for what, said in about.items()]
    lines += ["", "| | wanted | found | holds |", "|---|---|---|---|"]
    lines += [f"| {v.what} | {v.wanted} | {v.found} | {HOLDS[v.holds]} |" for v in held]
    for result in results:
        lines += ["", *_table(result)]
    return "\n".join(lines)


def _table(result: Result) -> list[str]:
    s = result.setting
    links = "as fast as the machine is" if s.gbit_per_s is None else f"{s.gbit_per_s:g} Gbit/s each way"
    ranks = f"{s.hosts} hosts x {s.ranks_per_host} rank(s) of {s.cores:g} core"
    memory = "" if s.memory_mb is None else f", {s.memory_mb} MB of memory each"
    work = f"{s.model}, {s.image}x{s.image} images, {s.classes} classes, {s.images_per_rank} images per rank"
    return [
        f"**{s.name}**: {work}, {ranks}{memory}, links {links}",
        "",
        f"| {' | '.join(COLUMNS)} |",
        f"{'|---' * len(COLUMNS)}|",
        *(_line(row) for row in result.rows),
    ]


def _line(row: Row) -> str:
    cell = row.cell
    if row.step_s is None:
        error = (cell.error or "not run").strip().splitlines()[-1].replace("|", "/")
        return f"| {row.name} | failed: {error[:200]} {'|' * (len(COLUMNS) - 1)}"
    floor = "" if row.floor_s is None else f"{row.floor_s / row.step_s:.0%}"
    cells = [
        f"**{row.name}**" if row.name == OURS else row.name,
        f"{row.step_s:.3f}",
        _spread(row),
        _ratio(row.to_ddp),
        _ratio(row.to_best),
        floor,
        _predicted(row),
        _megabytes(cell.sent_bytes(INTERFACE)),
        _megabytes(cell.sent_bytes("lo")),
        _megabytes(cell.peak_bytes),
        _losses(row),
        str(len(cell.able)),
        _options(cell),
    ]
    return f"| {' | '.join(cells)} |"


def _spread(row: Row) -> str:
    steps_s = row.cell.steps_s
    return "" if row.cell.entry.contestant == "floor" else f"{min(steps_s):.3f} to {max(steps_s):.3f}"


def _ratio(ratio: Ratio | None) -> str:
    return "" if ratio is None else f"{ratio.median:.3f} ({ratio.low:.3f} to {ratio.high:.3f})"


def _predicted(row: Row) -> str:
    predicted_s, error = row.cell.entry.predicted_s, row.error
    return "" if predicted_s is None or error is None else f"{predicted_s:.3f} ({error:+.1%})"


def _megabytes(count: float | None) -> str:
    return "" if count is None else f"{count / 1e6:.0f} MB"


def _losses(row: Row) -> str:
    agreement = row.agreement
    if agreement is None:
        return "not compared"
    if agreement.difference is None:
        return agreement.note or "not compared"
    lossy = "lossy, " if agreement.lossy else ""
    return f"{lossy}{agreement.difference:.0e}"


def _options(cell: Cell) -> str:
    """Return the tuned options, the plan by its shape."""
    shape = [cell.entry.shape] if cell.entry.shape is not None else []
    return ", ".join([*shape, *(f"{key} {value}" for key, value in cell.entry.options.items() if key != "plan")])
