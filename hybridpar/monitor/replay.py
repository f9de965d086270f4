"""Plays a recording in the place of all other sources, at the pace in which it was made."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from hybridpar.monitor.record import Gap, GpuSample, HostSample, Record

MARK = "replay:"
"""Before the name of a figure's source."""


class Replay:
    """The records of a file, read as they come due."""

    name = "recorded"
    gaps: Sequence[str] = ()

    def __init__(self, records: Iterable[Record]) -> None:
        """Begin a recording, whose first record is due at the first tick.

        Args:
            records: ordered by time. Where reading them raises, ``read`` does.

        """
        self._records: Iterator[Record] = iter(records)
        self._next = next(self._records, None)
        self._shift_s: float | None = None
        self._told_end = False

    def read(self, time_s: float) -> list[Record]:
        """Return the records that are due by ``time_s``, with times of now and with sources marked as replayed.

        At the end of the recording there is a gap, once.
        """
        due: list[Record] = []
        if self._next is not None and self._shift_s is None:
            self._shift_s = time_s - self._next.time_s
        while self._next is not None and self._next.time_s + (self._shift_s or 0.0) <= time_s:
            due.append(_played(self._next, self._shift_s or 0.0))
            self._next = next(self._records, None)
        if self._next is None and not self._told_end:
            self._told_end = True
            host = due[-1].host if due else ""
            due.append(Gap(time_s, host, "the recording that is played has ended"))
        return due

    def close(self) -> None:
        """Leave the file to the end of the process."""


def _played(record: Record, shift_s: float) -> Record:
    changes: dict[str, Any] = {"time_s": record.time_s + shift_s}
    if isinstance(record, GpuSample | HostSample):
        changes["sources"] = {name: f"{MARK}{source}" for name, source in record.sources.items()}
    return replace(record, **changes)
