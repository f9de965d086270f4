"""A file of records that never grows beyond its bound and always covers the whole run."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hybridpar.monitor.record import SCHEMA_VERSION, Record, to_line

_SAMPLES = {"gpu", "host"}


class Log:
    """Appends records to a file of at most ``max_bytes``.

    A full file is thinned: every second tick goes, except that each GPU and node keeps its fullest moment, and
    ``stride`` doubles. A run of any length thus keeps samples from its beginning to its end, evenly spaced, if the
    writer skips ticks by ``stride``.
    """

    def __init__(self, path: Path, max_bytes: int) -> None:
        """Open ``path`` for appending and cut off a line that an earlier writer left unfinished.

        A file of another schema is moved away, to the same name with ``.old`` behind it. Raises OSError where the
        file cannot be written.
        """
        self.stride = 1
        """Ticks from one written sample to the next."""
        self._path = path
        self._max_bytes = max_bytes
        _move_foreign_away(path)
        self._size_bytes = _cut_unfinished_line(path)
        self._file = path.open("ab", buffering=0)

    def write(self, records: Iterable[Record]) -> bool:
        """Append the records of one tick, all of them or none.

        Returns False, with nothing written, where they do not fit even into the thinned file. Raises OSError,
        with nothing written, where the disk refuses.
        """
        text = "".join(map(to_line, records)).encode()
        while (size_bytes := self._size_bytes) + len(text) > self._max_bytes:
            self._thin()
            if self._size_bytes == size_bytes:
                return False
        if self._file.write(text) != len(text):
            os.ftruncate(self._file.fileno(), self._size_bytes)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
        self._size_bytes += len(text)
        return True

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _thin(self) -> None:
        thinned = self._path.with_name(self._path.name + ".tmp")
        ticks = _kept_ticks(self._path)
        try:
            with self._path.open("rb") as whole, thinned.open("wb") as file:
                file.writelines(line for line in whole if _tick(json.loads(line)) in ticks)
        except OSError:
            thinned.unlink(missing_ok=True)
            raise
        self._file.close()
        thinned.replace(self._path)
        self._file = self._path.open("ab", buffering=0)
        self._size_bytes = self._path.stat().st_size
        self.stride *= 2


def _kept_ticks(path: Path) -> set[float | None]:
    """Every second tick, the ticks at which a GPU or a node was fullest, and None for other lines."""
    fullest: dict[tuple[str, str | None], tuple[int, float]] = {}
    ticks: set[float] = set()
    with path.open("rb") as file:
        for line in file:
            data = json.loads(line)
            time_s = _tick(data)
            if time_s is None:
                continue
            ticks.add(time_s)
            whose, used_bytes = (data["host"], data.get("uuid")), data["memory_used_bytes"]
            if used_bytes is not None and used_bytes > fullest.get(whose, (-1, 0.0))[0]:
                fullest[whose] = (used_bytes, time_s)
    return {None, *sorted(ticks)[1::2], *(time_s for _, time_s in fullest.values())}


def _tick(data: dict[str, Any]) -> float | None:
    return data["time_s"] if data["kind"] in _SAMPLES else None


def _move_foreign_away(path: Path) -> None:
    """Rename a file whose first line is of another schema, as an earlier version left it in a run that goes on."""
    if not path.exists():
        return
    with path.open("rb") as file:
        first = file.readline()
    if not first.endswith(b"\n"):
        return  # cut short: it goes anyway
    try:
        schema = json.loads(first).get("schema")
    except (ValueError, AttributeError):
        schema = None  # no record of ours at all
    if schema != SCHEMA_VERSION:
        path.replace(path.with_name(path.name + ".old"))


def _cut_unfinished_line(path: Path) -> int:
    """Return the bytes of all whole lines, which are then the file."""
    with path.open("a+b") as file:
        file.seek(0)
        whole_bytes = size_bytes = 0
        for line in file:
            size_bytes += len(line)
            if line.endswith(b"\n"):
                whole_bytes = size_bytes
        if whole_bytes < size_bytes:
            os.ftruncate(file.fileno(), whole_bytes)
    return whole_bytes
