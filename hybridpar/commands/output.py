"""How commands speak: results on standard output, remarks on standard error, files that are asked for."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from hybridpar.config import Config
from hybridpar.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console


def console() -> Console:
    """Return a console; where no terminal sets the width, tables get enough."""
    from rich.console import Console  # noqa: PLC0415

    return Console(width=None if sys.stdout.isatty() else 160, highlight=False, soft_wrap=False)


def note(text: str) -> None:
    """Print a remark."""
    sys.stderr.write(f"{text}\n")


def check_out(config: Config) -> None:
    """Refuse, before any work is done, a file that could not be written after it."""
    if config.out is not None and not Path(config.out).resolve().parent.is_dir():
        raise ConfigError(f"out: {config.out} lies in no existing folder; make it first")


def write(path: str, text: str) -> None:
    """Write the file that ``out`` names. Raises ConfigError where it cannot be written."""
    try:
        Path(path).write_text(text)
    except OSError as e:
        raise ConfigError(f"out: cannot write {path}: {e.strerror}; name a file in an existing folder") from e
