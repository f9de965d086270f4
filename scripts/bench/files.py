"""Files of a bench: written whole, told apart by their content, and tables put into documents."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from hybridpar.errors import ConfigError


def write_json(path: Path, data: Any) -> None:
    """Write a file that is whole or not there at all; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(data, indent=1) + "\n")
    part.replace(path)


def digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def insert(document: Path, marker: str, text: str) -> None:
    """Put ``text`` between a document's lines of ``marker``. Raises ConfigError where they are missing."""
    begin, end = f"<!-- {marker} -->", f"<!-- /{marker} -->"
    before, found, rest = document.read_text().partition(begin)
    _, ended, after = rest.partition(end)
    if not found or not ended:
        raise ConfigError(f"{document} has no lines {begin} and {end}; add them where the table shall stand")
    document.write_text(f"{before}{begin}\n{text}\n{end}{after}")
