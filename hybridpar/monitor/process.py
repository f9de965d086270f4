"""The sampler process: ``python -m hybridpar.monitor.process SETTINGS``, with the settings as JSON.

It answers on standard output with one JSON line, ``{"reason": null}`` once it samples or a sentence why it does
not, and with a second one where it ends early. It ends when standard input closes or its parent is gone.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import sys
import time
from pathlib import Path

from hybridpar.errors import ConfigError
from hybridpar.monitor.log import Log
from hybridpar.monitor.nvml import Reader, Unavailable, open_reader
from hybridpar.monitor.record import Gap
from hybridpar.monitor.settings import Settings
from hybridpar.schema import from_data


def main() -> None:
    """Sample until told to end; whatever goes wrong becomes one sentence in the file and on standard output."""
    settings = from_data(Settings, json.loads(sys.argv[1]), "settings", ConfigError)
    try:
        log = Log(Path(settings.path), settings.max_bytes)
    except Exception as e:  # noqa: BLE001 - the boundary of the process: every failure becomes a sentence
        _answer(f"cannot write {settings.path}: {e}")
        return
    reason = None
    try:
        reason = _serve(log, settings)
    except Exception as e:  # noqa: BLE001 - the boundary of the process: every failure becomes a sentence
        reason = f"the GPU sampler failed: {type(e).__name__}: {e}"
    if reason is not None:
        with contextlib.suppress(OSError, ValueError):
            log.write([_gap(reason)])
        _answer(reason)
    with contextlib.suppress(OSError):
        log.close()


def _serve(log: Log, settings: Settings) -> str | None:
    """Sample until told to end; returns a sentence where it comes to that before."""
    reader = open_reader(settings.uuids)
    if isinstance(reader, Unavailable):
        return reader.reason
    try:
        log.write([_gap(gap) for gap in reader.gaps])
        _answer(None)
        return _sample(reader, log, settings)
    finally:
        reader.close()


def _sample(reader: Reader, log: Log, settings: Settings) -> str | None:
    """Write samples at multiples of the interval after the start; a late tick is skipped and shifts no other."""
    start_s, tick = time.monotonic(), 0
    while True:
        passed = max(tick, int((time.monotonic() - start_s) / settings.interval_s))
        tick = next_tick(passed, log.stride)
        if _told_to_end(start_s + tick * settings.interval_s, settings.parent):
            return None
        if not log.write(reader.read(time.time())):
            return f"monitoring ended: {settings.path} is full at max_bytes={settings.max_bytes}"


def next_tick(passed: int, stride: int) -> int:
    """Return the first multiple of ``stride`` after the last tick that has passed."""
    return (passed // stride + 1) * stride


def _told_to_end(deadline_s: float, parent: int) -> bool:
    """Wait until the deadline, or less where standard input closes or the parent is gone.

    Standard input alone does not tell: a process that the parent forked may hold the pipe open after its death.
    """
    while os.getppid() == parent:
        left_s = deadline_s - time.monotonic()
        if left_s <= 0:
            return False
        if select.select([sys.stdin], [], [], min(left_s, 1.0))[0]:
            return True
    return True


def _gap(reason: str) -> Gap:
    return Gap(time_s=time.time(), host=socket.gethostname(), reason=reason)


def _answer(reason: str | None) -> None:
    with contextlib.suppress(OSError):
        sys.stdout.write(json.dumps({"reason": reason}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
