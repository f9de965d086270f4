"""What the doctor found, as text and as JSON."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hybridpar.doctor.finding import Diagnosis
from hybridpar.report.text import plural, spans
from hybridpar.schema import to_data

_STYLES = {"ok": "green", "note": "yellow", "wrong": "bold red"}


def as_data(diagnosis: Diagnosis) -> dict[str, Any]:
    """Return the findings and ranks as JSON data."""
    return {
        "wrong": diagnosis.wrong,
        "findings": [{**to_data(found), "ranks": list(ranks)} for found, ranks in diagnosis.findings],
        "ranks": [to_data(rank) for rank in diagnosis.ranks],
    }


def show(diagnosis: Diagnosis, console: Console) -> None:
    """Print the findings with their remedies, the ranks of a job, and how many things are wrong."""
    table = Table(box=None, pad_edge=False, show_header=False)
    several = len(diagnosis.ranks) > 1
    for found, ranks in diagnosis.findings:
        text = Text(f"{found.what}{_where(diagnosis, ranks)}")
        if found.remedy is not None:
            text.append(f"; {found.remedy}", style="bold" if found.status == "wrong" else "")
        table.add_row(Text(found.status, style=_STYLES[found.status]), found.topic, text)
    console.print(table)
    if several:
        console.print(_ranks(diagnosis))
    for rank, place in enumerate(diagnosis.ranks):
        for missing in place.unreachable:
            console.print(f"rank {rank} does not reach {missing}", soft_wrap=True)
    count = diagnosis.wrong
    console.print("nothing is wrong" if not count else f"{plural(count, 'thing')} wrong", style="bold")


def _where(diagnosis: Diagnosis, ranks: tuple[int, ...]) -> str:
    """Say on which nodes something was found, unless it is on all of them."""
    everywhere = {rank.node for rank in diagnosis.ranks}
    here = {diagnosis.ranks[rank].node for rank in ranks} if everywhere else set()
    return "" if here == everywhere else f" [node {spans(tuple(sorted(here)))}]"


def _ranks(diagnosis: Diagnosis) -> Table:
    table = Table("rank", "node", "host", "process", "device", "interface", "reaches", box=None, pad_edge=False)
    everyone = len(diagnosis.ranks)
    for rank, at in enumerate(diagnosis.ranks):
        reached = "all" if not at.unreachable else f"{everyone - len(at.unreachable)} of {everyone}"
        table.add_row(str(rank), str(at.node), at.host, str(at.process), at.device, at.interface, reached)
    return table
