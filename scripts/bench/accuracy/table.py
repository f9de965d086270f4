"""The table as Markdown, and its place in a document."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from hybridpar.planning.plan import Plan
from scripts.bench.accuracy.draw import describe
from scripts.bench.accuracy.summary import Row, Verdict

COLUMNS = (
    *("plan", "shape", "drawn", "predicted s", "measured s", "error", "speed", "error at it", "rank"),
    *("live bytes", "resident MB", "error"),
)
"""Of the table; the last one has no title. Speed: the machine's, relative to when the profile was taken."""
CROWDED_CORES = 0.1
"""Other work above this makes a measurement doubtful; the table says so."""


def render(
    table: Sequence[Row],
    held: Sequence[Verdict],
    plans: dict[str, Plan],
    about: dict[str, str],
) -> str:
    """Return the table, the verdicts and what they rest on. ``about`` is told line by line."""
    lines = [f"- {what}: {said}" for what, said in about.items()]
    lines += ["", "| | required | found | holds |", "|---|---|---|---|"]
    lines += [f"| {v.what} | {v.wanted} | {v.found} | {'yes' if v.holds else '**no**'} |" for v in held]
    lines += [
        "",
        f"| {' | '.join(COLUMNS)} | |",
        f"{'|---' * (len(COLUMNS) + 1)}|",
    ]
    places = _places(table)
    lines += [_line(n, row, places) for n, row in enumerate(table, 1)]
    lines += ["", "```"]
    lines += [f"{r.predicted.name}  {describe(plans[r.predicted.name])}" for r in table]
    lines.append("```")
    return "\n".join(lines)


def _places(table: Sequence[Row]) -> dict[str, int]:
    """Return the place of every measured plan by its measured time, from 1."""
    able = sorted((r for r in table if r.step_s is not None), key=lambda r: r.step_s or 0.0)
    return {r.predicted.name: n for n, r in enumerate(able, 1)}


def _line(number: int, row: Row, places: dict[str, int]) -> str:
    p = row.predicted
    cells = [p.name, p.shape, p.kind, f"{p.step_s:.3f}"]
    if row.step_s is None:
        cells += ["failed", *[""] * (len(COLUMNS) - len(cells) - 1), row.failure or ""]
        return f"| {' | '.join(cells)} |"
    predicted, measured = max(p.resident_bytes) / 1e6, max(row.resident_bytes) / 1e6
    cells += [
        f"{row.step_s:.3f}",
        _percent(row.error),
        "" if row.speed is None else f"{row.speed:.2f}",
        _percent(row.even_error),
        f"{number} / {places[p.name]}",
        f"{row.live_error_bytes:+d}",
        f"{predicted:.0f} / {measured:.0f}",
        _percent(row.resident_error),
        f"{row.foreign_cores:.2f} cores of other work" if row.foreign_cores > CROWDED_CORES else "",
    ]
    return f"| {' | '.join(cells)} |"


def _percent(error: float | None) -> str:
    return "" if error is None else f"{error:+.1%}"


def render_actions(table: Sequence[Row]) -> str:
    """Return, per plan that ran, seconds of a step by kind of action, the mean over the ranks."""
    lines = ["| plan | action | predicted s | measured s |", "|---|---|---|---|"]
    for row in table:
        if row.step_s is None:
            continue
        name, ranks = row.predicted.name, row.measured[0].ranks
        predicted = _with_rest(_mean(row.predicted.actions_s), row.predicted.step_s)
        measured = _with_rest(_mean([r.actions_s for r in ranks]), row.step_s)
        lines += [
            f"| {name} | {action} | {predicted.get(action, 0):.4f} | {measured.get(action, 0):.4f} |"
            for action in sorted(predicted.keys() | measured.keys())
        ]
    return "\n".join(lines)


def _with_rest(actions_s: dict[str, float], step_s: float) -> dict[str, float]:
    """Return the seconds with those of the step in which no action but a wait goes on."""
    busy = sum(seconds for name, seconds in actions_s.items() if not name.startswith("wait"))
    return {**actions_s, "waits and all else": step_s - busy}


def _mean(ranks: Sequence[dict[str, float]]) -> dict[str, float]:
    total: dict[str, float] = defaultdict(float)
    for own in ranks:
        for name, seconds in own.items():
            total[name] += seconds / len(ranks)
    return total
