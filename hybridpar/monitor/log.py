"""A file of records that never grows beyond its bound and always covers the whole run."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hybridpar.monitor.record import Gap, Sample, to_line


class Log:
    """Appends records to a file of at most ``max_bytes``.

    A full file is thinned: every second tick goes, except that each GPU keeps its fullest moment, and ``stride``
    doubles. A run of any length thus keeps samples from its beginning to its end, evenly spaced, if the writer
    skips ticks by ``stride``.
    """

    def __init__(self, path: Path, max_bytes: int) -> None:
        """Open ``path`` for appending and cut off a line that an earlier writer left unfinished.

        Raises OSError where the file cannot be written.
        """
        self.stride = 1
        """Ticks from one written sample to the next."""
        self._path = path
        self._max_bytes = max_bytes
        _cut_unfinished_line(path)
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def write(self, records: Iterable[Sample | Gap]) -> bool:
        """Append the records of one tick, each as one whole line.

        Returns False, with nothing written, where they do not fit even into the thinned file. Raises OSError
        where the disk refuses.
        """
        text = "".join(map(to_line, records))
        while (size_bytes := self._file.tell()) + len(text) > self._max_bytes:
            self._thin()
            if self._file.tell() == size_bytes:
                return False
        self._file.write(text)
        return True

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _thin(self) -> None:
        self._file.close()
        thinned = self._path.with_name(self._path.name + ".tmp")
        ticks = _kept_ticks(self._path)
        with self._path.open("rb") as whole, thinned.open("wb") as file:
            file.writelines(line for line in whole if _tick(json.loads(line)) in ticks)
        thinned.replace(self._path)
        self._file = self._path.open("a", encoding="utf-8", buffering=1)
        self.stride *= 2


def _kept_ticks(path: Path) -> set[float | None]:
    """Every second tick, the ticks at which a GPU was fullest, and None for the lines that are no samples."""
    fullest: dict[tuple[str, str | None], tuple[int, float]] = {}
    ticks: set[float] = set()
    with path.open("rb") as file:
        for line in file:
            data = json.loads(line)
            time_s = _tick(data)
            if time_s is None:
                continue
            ticks.add(time_s)
            gpu, used_bytes = (data["host"], data["uuid"]), data["memory_used_bytes"]
            if used_bytes is not None and used_bytes > fullest.get(gpu, (-1, 0.0))[0]:
                fullest[gpu] = (used_bytes, time_s)
    return {None, *sorted(ticks)[1::2], *(time_s for _, time_s in fullest.values())}


def _tick(data: dict[str, Any]) -> float | None:
    return data["time_s"] if data["kind"] == "sample" else None


def _cut_unfinished_line(path: Path) -> None:
    with path.open("a+b") as file:
        file.seek(0)
        whole_bytes = size_bytes = 0
        for line in file:
            size_bytes += len(line)
            if line.endswith(b"\n"):
                whole_bytes = size_bytes
        if whole_bytes < size_bytes:
            os.ftruncate(file.fileno(), whole_bytes)
