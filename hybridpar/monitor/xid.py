"""Xid errors: what the driver reports of GPUs, through NVML's events."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any

import pynvml

MOST_AT_ONCE, MOST = 16, 200
"""Errors that are noted in a tick, and in all: a broken GPU may report thousands, and the first ones tell."""


class Xids:
    """An open event set over some GPUs."""

    def __init__(self, devices: Mapping[int, Any]) -> None:
        """Listen from now on, to those that have events.

        Args:
            devices: NVML's handles by any number.

        Raises:
            pynvml.NVMLError: none has events, or this user may not hear of them.

        """
        self._numbers = {_address(handle): number for number, handle in devices.items()}
        self._noted = 0
        self._events = pynvml.nvmlEventSetCreate()
        refusals = [error for error in map(self._register, devices.values()) if error is not None]
        if len(refusals) == len(devices):
            self.close()
            raise refusals[0]

    def read(self) -> list[tuple[int | None, int]]:
        """Return what was reported since the last call, without waiting: the device's number, and the Xid."""
        found: list[tuple[int | None, int]] = []
        while len(found) < MOST_AT_ONCE and self._noted < MOST:
            try:
                data = pynvml.nvmlEventSetWait_v2(self._events, 0)
            except pynvml.NVMLError:
                break  # there is no more, or the driver is gone, which its other figures tell
            found.append((self._numbers.get(_address(data.device)), int(data.eventData)))
            self._noted += 1
        return found

    def _register(self, handle: Any) -> pynvml.NVMLError | None:
        try:
            pynvml.nvmlDeviceRegisterEvents(handle, pynvml.nvmlEventTypeXidCriticalError, self._events)
        except pynvml.NVMLError as e:
            return e
        return None

    def close(self) -> None:
        """Give the event set back."""
        try:
            pynvml.nvmlEventSetFree(self._events)
        except pynvml.NVMLError:
            return  # a driver that is gone has taken it along


def _address(handle: Any) -> int | None:
    return ctypes.cast(handle, ctypes.c_void_p).value
