"""A report of runs on the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from hybridpar.report.advice import Advised, advice_finding
from hybridpar.report.comparison import Comparison
from hybridpar.report.findings import Finding, beside, findings, missing
from hybridpar.report.run import Run
from hybridpar.report.text import titled


def show(runs: Sequence[tuple[Run, Comparison | None]], advised: Sequence[Advised], console: Console) -> None:
    """Print several runs side by side, then what there is to say of each, its advice last."""
    if len(runs) > 1:
        _print(beside(runs), console)
    for number, ((run, comparison), told) in enumerate(zip(runs, advised, strict=True)):
        if number:
            console.rule()
        for finding in findings(run, comparison):
            _print(finding, console)
        if comparison is None:
            console.print(Text(str(missing(run))))
        _print(advice_finding(told), console)


def _print(finding: Finding, console: Console) -> None:
    table = titled(finding.title)
    table.show_header = any(finding.columns)
    for number, name in enumerate(finding.columns):
        table.add_column(Text(name), justify="left" if number < finding.texts else "right", overflow="fold")
    for row in finding.rows:
        table.add_row(*map(Text, row))
    console.print(table)
    for note in finding.notes:
        console.print(Text(note, style="dim"))
    console.print()
