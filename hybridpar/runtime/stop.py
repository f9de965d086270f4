"""Stopping: a training that is asked to end (SIGTERM, callbacks) does so after a step, the same on all ranks."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from hybridpar.runtime.process import Process


class Agreement:
    """Where all ranks end, once one wants to.

    All ranks ask ``after`` at the end of every step. The first one that wants the end after step k names step
    k + 1: no rank can end that one before this rank takes part in it, so all read of it in time.
    """

    def __init__(self, process: Process, key: str) -> None:
        self._process, self._key = process, key
        self.wanted = False
        """Whether this rank wants the end."""

    def after(self, steps: int) -> bool:
        """Return whether all end here, ``steps`` steps being over; the same on all ranks."""
        if self._process.world == 1:
            return self.wanted
        if self.wanted:
            self._process.propose(self._key, str(steps + 1))
        last = self._process.posted(self._key)
        return last is not None and steps >= int(last)


class Stop(Agreement):
    """Listens for SIGTERM while it is entered; elsewhere than in a process's main thread it hears nothing."""

    def __init__(self, process: Process) -> None:
        super().__init__(process, "stop")
        self._before: Any = None

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._hear)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self.wanted = True
