"""An explanation as text: a few lines, or tables."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from hybridpar.planning.explanation import Account, Explanation
from hybridpar.planning.flips import Flip, Flips
from hybridpar.planning.microbatches import Effect
from hybridpar.planning.search import Planned
from hybridpar.planning.timesplit import StageTime
from hybridpar.report.text import in_bytes, in_time, plural, titled

WHERE = {
    "node": "within the node",
    "rack": "between nodes",
    "site": "between racks",
    "wan": "between sites",
}


def show(explanation: Explanation, planned: Planned, console: Console) -> None:
    """Print the long form where the explanation is one, otherwise the short form."""
    if explanation.full:
        _show_tables(explanation, planned, console)
        return
    for account in explanation.accounts:
        console.print(_time_line(account))
        console.print(_axes_line(account))
    if explanation.flips is not None:
        console.print(_flips_line(explanation.flips))
    console.print(
        "More: explain=true (all shapes, time by stage, flips by bandwidth, batch and speed, other micro-batches)"
    )


def _time_line(account: Account) -> str:
    split = account.split
    total = split.total
    plan = account.candidate.plan
    assert plan is not None
    parts = [
        f"{stage.kind} {_share(split.stage(i).busy_s, split.period_s)}" for i, stage in enumerate(plan.stages)
    ]
    return (
        f"{account.candidate.shape}: of {in_time(split.period_s)} a rank works {in_time(total.busy_s)} "
        f"({', '.join(parts)}), waits {in_time(total.exposed_s)} for communication and "
        f"{in_time(total.bubble_s)} for other ranks (means)"
    )


def _axes_line(account: Account) -> str:
    a = account.axes
    return (
        f"  {in_bytes(a.synchronised_bytes)} synchronised + {in_bytes(a.exchanged_bytes)} exchanged, devices "
        f"{a.busy_share:.0%} busy, balance {a.balance:.2f}, one rank 10% slower: +{a.straggler:.1%}, input "
        f"{a.input_samples_per_s:,.0f}/s ({in_bytes(a.input_bytes_per_s)}/s) to {_readers(a.readers)}"
    )


def _readers(readers: int) -> str:
    return "one rank" if readers == 1 else f"each of {readers}"


def _flips_line(flips: Flips) -> str:
    """Write the flips of the short form, which are those of the bandwidth."""
    first = flips.found[0]
    now = f"{_value(first, first.now)} {WHERE[flips.link_level]}"
    found = [_flip(flip, flips) for flip in flips.found if flip.at is not None]
    if found:
        return f"Flips: {'; '.join(found)} (now {now})"
    return f"Flips: none; {flips.leader} stays ahead of {flips.challengers[0]} at 1/64 to 64 times the {now}"


def _flip(flip: Flip, flips: Flips) -> str:
    """Write one flip: ``data_parallel overtakes above 31 Gbit/s``."""
    assert flip.at is not None
    why = f": {flips.leader} is impossible there ({flip.reason})" if flip.reason else ""
    return f"{flip.challenger} overtakes {flip.direction} {_value(flip, flip.at)}{why}"


def _value(flip: Flip, value: float) -> str:
    if flip.quantity == "bandwidth":
        return f"{value:.3g} Gbit/s"
    if flip.quantity == "global_batch":
        return plural(int(value), "sample")
    return f"{value:.3g}x speed"


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.0%}" if whole else "-"


def _show_tables(explanation: Explanation, planned: Planned, console: Console) -> None:
    console.print(_axes_table(explanation))
    console.print(_time_table(explanation))
    if explanation.obstacles:
        console.print(_obstacles_table(explanation))
    if explanation.flips is not None:
        console.print(_flips_table(explanation.flips))
    console.print(_effects_table(explanation, planned))


def _axes_table(explanation: Explanation) -> Table:
    table = titled("five axes: bytes per step of the rank with the most; input of the rank that reads most")
    table.add_column("shape")
    for name in (
        "synchronised",
        "exchanged",
        "devices busy",
        "load balance",
        "one rank 10% slower",
        "samples/s",
        "input/s",
        "readers",
    ):
        table.add_column(name, justify="right")
    for account in explanation.accounts:
        a = account.axes
        table.add_row(
            account.candidate.shape,
            in_bytes(a.synchronised_bytes),
            in_bytes(a.exchanged_bytes),
            f"{a.busy_share:.1%}",
            f"{a.balance:.3f}",
            f"+{a.straggler:.1%}",
            f"{a.input_samples_per_s:,.1f}",
            in_bytes(a.input_bytes_per_s),
            str(a.readers),
        )
    return table


def _time_table(explanation: Explanation) -> Table:
    table = titled("time of a step by stage: ms per rank, mean over all ranks")
    table.add_column("shape")
    table.add_column("stage")
    for name in ("compute", "update", "exposed communication", "bubble", "together"):
        table.add_column(name, justify="right")
    for account in explanation.accounts:
        plan, split = account.candidate.plan, account.split
        assert plan is not None
        for i, stage in enumerate(plan.stages):
            table.add_row(account.candidate.shape if i == 0 else "", stage.kind, *_cells(split.stage(i)))
        if len(plan.stages) > 1:
            table.add_row("", "all", *_cells(split.total))
    return table


def _cells(time: StageTime) -> list[str]:
    columns = (time.compute_s, time.update_s, time.exposed_s, time.bubble_s, time.total_s)
    return [f"{abs(round(seconds * 1e3, 3)):.3f}" for seconds in columns]


def _obstacles_table(explanation: Explanation) -> Table:
    table = titled("shapes without a plan")
    for name in ("shape", "binding constraint", "by how much"):
        table.add_column(name)
    for obstacle in explanation.obstacles:
        table.add_row(obstacle.shape, obstacle.constraint, obstacle.detail)
    return table


def _flips_table(flips: Flips) -> Table:
    table = titled(f"where {flips.leader} loses its lead, from 1/64 to 64 times of now")
    for name in ("quantity", "now", "flips"):
        table.add_column(name)
    names = {
        "bandwidth": f"bandwidth {WHERE[flips.link_level]}",
        "global_batch": "global batch",
        "device_speed": "device speed",
    }
    for flip in flips.found:
        what = f"none {flip.direction}" if flip.at is None else _flip(flip, flips)
        first = flip.direction == "above"
        table.add_row(names[flip.quantity] if first else "", _value(flip, flip.now) if first else "", what)
    return table


def _effects_table(explanation: Explanation, planned: Planned) -> Table:
    now_s = planned.chosen.prediction.step_s
    table = titled(f"{planned.shape} with other micro-batches, now {in_time(now_s)}")
    table.add_column("stage")
    table.add_column("now", justify="right")
    table.add_column("next smaller")
    table.add_column("next larger")
    for stage in explanation.effects:
        cells = [_effect(effect, now_s) for effect in (stage.smaller, stage.larger)]
        table.add_row(stage.kind, str(stage.micro_batch), *cells)
    return table


def _effect(effect: Effect | None, now_s: float) -> str:
    if effect is None:
        return "none"
    if effect.step_s is None or effect.memory_bytes is None:
        return f"{effect.micro_batch}: {effect.reason}"
    change = effect.step_s / now_s - 1
    return f"{effect.micro_batch}: {in_time(effect.step_s)} ({change:+.1%}), {in_bytes(effect.memory_bytes)}"
