"""A report of runs on the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from hybridpar.report.account import Account
from hybridpar.report.findings import Finding, beside
from hybridpar.report.text import titled


def show(accounts: Sequence[Account], console: Console) -> None:
    """Print several runs side by side, then what there is to say of each, its advice last."""
    if len(accounts) > 1:
        _print(beside([(account.run, account.comparison) for account in accounts]), console)
    for number, account in enumerate(accounts):
        if number:
            console.rule()
        for finding in account.findings:
            _print(finding, console)
        for text in account.lacking:
            console.print(Text(text))
        if account.advice is not None:
            _print(account.advice, console)


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
