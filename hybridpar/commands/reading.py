"""What a run did: ``report``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from hybridpar.commands.output import console, note, write
from hybridpar.errors import ConfigError

if TYPE_CHECKING:
    from hybridpar.report.account import Account

OPTIONS = ("out=", "pictures=", "advice=")


def report(arguments: Sequence[str]) -> None:
    """Lay predicted over measured, and advise: ``report RUN [RUN2 ...] [out=FILE.html] [pictures=FOLDER]``.

    ``advice=false`` leaves the advice out.
    """
    from hybridpar.report import run_text  # noqa: PLC0415
    from hybridpar.report.account import Account  # noqa: PLC0415

    options = dict(a.split("=", 1) for a in arguments if a.startswith(OPTIONS))
    folders = [Path(a).expanduser() for a in arguments if not a.startswith(OPTIONS)]
    named = any("=" in str(folder) and not folder.exists() for folder in folders)
    if not folders or named or options.get("advice", "true") not in {"true", "false"}:
        raise ConfigError(
            f"report {' '.join(arguments)}: takes the folders of one or more runs, out=FILE.html for a page, "
            "pictures=FOLDER for pictures of one run's step, and advice=false to leave the advice out"
        )
    accounts = [Account.load(folder) for folder in folders]
    if options.get("advice") != "false":
        accounts = [_advised(account) for account in accounts]
    _report_files(accounts, options.get("out"), options.get("pictures"))
    run_text.show(accounts, console())


def _advised(account: Account) -> Account:
    from hybridpar.advice.advise import advise  # noqa: PLC0415

    return replace(account, advised=advise(account))


def _report_files(accounts: Sequence[Account], out: str | None, pictures: str | None) -> None:
    """Write the page and the pictures that are asked for."""
    from hybridpar.report.figure import require_matplotlib  # noqa: PLC0415
    from hybridpar.report.findings import missing  # noqa: PLC0415
    from hybridpar.report.overlay import FILES, draw  # noqa: PLC0415
    from hybridpar.report.page import page  # noqa: PLC0415

    if pictures is not None:
        first, *others = accounts
        if others:
            raise ConfigError(f"pictures={pictures}: are of one run's step; ask for them run by run")
        if first.comparison is None:
            raise ConfigError(f"pictures={pictures}: {missing(first.run)}")
        draw(first.run, first.comparison, Path(pictures))
        note(f"pictures saved to {pictures}: {', '.join(FILES)}")
    if out is not None:
        require_matplotlib("out")
        write(out, page(accounts))
        note(f"page saved to {out}")
