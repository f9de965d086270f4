"""Progress of something that takes a while, on one line of a terminal or as plain lines."""

from __future__ import annotations

from typing import TextIO

_CLEAR_LINE = "\r\x1b[2K"


class Progress:
    """Writes to ``stream``; on a terminal an update replaces the one before. ``quiet``: nothing is written."""

    def __init__(self, stream: TextIO, *, quiet: bool = False) -> None:
        self._stream, self._quiet, self._live = stream, quiet, stream.isatty()
        self._open = False

    def update(self, text: str) -> None:
        """Say how far it is."""
        self._write(text, stays=not self._live)

    def note(self, text: str) -> None:
        """Say something that stays."""
        self._write(text, stays=True)

    def _write(self, text: str, *, stays: bool) -> None:
        if self._quiet:
            return
        self._stream.write(f"{_CLEAR_LINE if self._open else ''}{text}{chr(10) if stays else ''}")
        self._stream.flush()
        self._open = not stays
