"""The sampler process: ``python -m hybridpar.monitor.process SETTINGS``, with the settings as JSON.

It answers on standard output (``hybridpar.monitor.answer``).
It ends when standard input closes or its parent is gone.
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

from hybridpar.errors import ConfigError, HybridparError
from hybridpar.monitor.answer import Answer, to_line
from hybridpar.monitor.log import Log
from hybridpar.monitor.openmetrics import Export
from hybridpar.monitor.record import Gap, Record
from hybridpar.monitor.settings import Settings
from hybridpar.monitor.source import Source
from hybridpar.monitor.sources import open_sources
from hybridpar.schema import from_data


def main() -> None:
    """Sample until told to end; whatever goes wrong becomes one sentence in the file and on standard output."""
    settings = from_data(Settings, json.loads(sys.argv[1]), "settings", ConfigError)
    try:
        log = Log(Path(settings.path), settings.options.max_bytes)
    except Exception as e:  # noqa: BLE001 - the boundary of the process: every failure becomes a sentence
        _answer(Answer("ended", f"cannot write {settings.path}: {e}"))
        return
    try:
        reason = _serve(log, settings)
    except (OSError, HybridparError) as e:
        reason = f"monitoring ended: {e}"
    except Exception as e:  # noqa: BLE001 - the boundary of the process: every failure becomes a sentence
        reason = f"the sampler failed: {type(e).__name__}: {e}"
    if reason is not None:
        with contextlib.suppress(OSError):
            log.write([_gap(reason)])
        _answer(Answer("ended", reason))
    log.close()


def _serve(log: Log, settings: Settings) -> str | None:
    """Sample until told to end; returns a sentence where it comes to that before."""
    sources, no_gpu = open_sources(settings)
    path = settings.options.openmetrics
    export = None if path is None else Export(Path(path), Path(settings.path).parent.name)
    try:
        gaps = [gap for source in sources for gap in source.gaps]
        log.write(map(_gap, [*gaps, no_gpu] if no_gpu else gaps))
        _answer(Answer("started", no_gpu))
        return _sample(sources, log, export, settings)
    finally:
        for source in sources:
            source.close()
        if export is not None:
            export.close()


def _sample(sources: list[Source], log: Log, export: Export | None, settings: Settings) -> str | None:
    """Write samples at multiples of the interval after the start; a late tick is skipped and shifts no other."""
    start_s, tick, interval_s = time.monotonic(), 0, settings.options.interval_s
    while True:
        passed = max(tick, int((time.monotonic() - start_s) / interval_s))
        tick = next_tick(passed, log.stride)
        if _told_to_end(start_s + tick * interval_s, settings.parent):
            return None
        records = read_all(sources)
        if export is not None:
            records += export.step(records)
        for record in records:
            if isinstance(record, Gap):
                _answer(Answer("gap", record.reason, record.lost))
        if not log.write(records):
            return f"monitoring ended: {settings.path} is full at max_bytes={settings.options.max_bytes}"


def read_all(sources: list[Source]) -> list[Record]:
    """Read a tick; a source that fails is taken off the list, and a gap tells why."""
    time_s, records = time.time(), list[Record]()
    for source in list(sources):
        try:
            records += source.read(time_s)
        except Exception as e:  # noqa: BLE001 - one source must not take the others along
            sources.remove(source)
            reason = f"no {source.name} data any more: {type(e).__name__}: {e}"
            records.append(Gap(time_s, socket.gethostname(), reason, lost=source.name == "GPU"))
    return records


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


def _answer(answer: Answer) -> None:
    with contextlib.suppress(OSError):
        sys.stdout.write(to_line(answer))
        sys.stdout.flush()


if __name__ == "__main__":
    main()
