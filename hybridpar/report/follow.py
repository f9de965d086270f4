"""New lines of a file that another process appends to, and now and then replaces."""

from __future__ import annotations

import os
from pathlib import Path

TAIL_BYTES = 128 * 2**10
"""Of a long file, what is looked at first."""


class Followed:
    """A file of lines. What a call returns, later ones leave out, unless the file was replaced."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._inode: int | None = None
        self._read_bytes = 0

    def lines(self) -> list[bytes]:
        """Return the whole lines that came since the last call; of a new or replaced file, its last ones.

        A file that is not there has none. Raises OSError where it cannot be read.
        """
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            return []
        with file:
            status = os.fstat(file.fileno())
            anew = status.st_ino != self._inode or status.st_size < self._read_bytes
            if anew:
                self._inode, self._read_bytes = status.st_ino, max(0, status.st_size - TAIL_BYTES)
            inside = anew and self._read_bytes > 0
            file.seek(self._read_bytes)
            text = file.read()
        whole, _, _ = text.rpartition(b"\n")
        if not whole and not text.startswith(b"\n"):
            return []
        self._read_bytes += len(whole) + 1
        lines = whole.split(b"\n")
        return lines[inside:]  # the first one was cut by where reading began
