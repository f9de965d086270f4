"""Stopping: a training that is asked to end (SIGTERM) does so after a step, the same one on all ranks."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from hybridpar.runtime.process import Process

_KEY = "stop"


class Stop:
    """Listens for SIGTERM while it is entered; elsewhere than in a process's main thread it hears nothing.

    All ranks ask ``after`` at the end of every step. The first that has heard the signal after step k names
    step k + 1: no rank can end that one before this rank takes part in it, so all read of it in time.
    """

    def __init__(self, process: Process) -> None:
        self._process = process
        self._heard = False
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

    def after(self, steps: int) -> bool:
        """Return whether the training ends here, ``steps`` steps being over; the same on all ranks."""
        if self._process.world == 1:
            return self._heard
        if self._heard:
            self._process.propose(_KEY, str(steps + 1))
        last = self._process.posted(_KEY)
        return last is not None and steps >= int(last)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self._heard = True
