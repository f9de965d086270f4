"""Starts and ends the process that samples a node's GPUs.

It is a process and not a thread, since a thread starves under a training loop that holds the interpreter lock; and
a fresh interpreter and not a fork, so that it shares nothing with the training process and imports no torch.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal, get_args

from hybridpar.errors import ConfigError, LaunchError
from hybridpar.monitor.child import Child
from hybridpar.monitor.settings import DEFAULT_INTERVAL_S, DEFAULT_MAX_BYTES, Settings

Mode = Literal["auto", "off", "required"]

START_TIMEOUT_S = 30.0
"""For the driver to initialise all GPUs of a node, which takes seconds where persistence mode is off."""
_CLOSE_TIMEOUT_S = 5.0


class Monitor:
    """A running sampler, or the reason why there is none. Close it, or use it as a context manager."""

    def __init__(self, child: Child | None, reason: str | None) -> None:
        self._child = child
        self._reason = reason

    @property
    def reason(self) -> str | None:
        """One sentence why there is no GPU data, or none any more; None while the sampler runs."""
        if self._reason is None and self._child is not None and self._child.ended():
            self._reason = self._child.last_words()
        return self._reason

    @property
    def pid(self) -> int | None:
        """Process id of the sampler; None where there is none, and once closed."""
        return self._child.pid if self._child is not None else None

    def close(self) -> None:
        """End the sampler, in seconds whatever state it is in. May be called twice.

        ``reason`` stays what it was: None after a sampler that ran to the end.
        """
        if self._child is not None:
            self._reason = self.reason
            self._child.end(_CLOSE_TIMEOUT_S)
            self._child = None

    def __enter__(self) -> Monitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def start(
    path: Path,
    interval_s: float = DEFAULT_INTERVAL_S,
    uuids: Sequence[str] | None = None,
    mode: Mode = "auto",
    max_bytes: int = DEFAULT_MAX_BYTES,
) -> Monitor:
    """Start sampling this node's GPUs into a file; call it in one process per node.

    Returns once the sampler answers. What happens to it later reaches the caller by ``Monitor.reason`` only.

    Args:
        path: file of JSON lines (``hybridpar.monitor.record``), appended to; its folder is made where missing.
        interval_s: seconds between samples, 0.12 to 3600.
        uuids: the GPUs to watch, "GPU-..." or "MIG-..."; None: all of the node; none given: the job uses no GPU.
        mode: "auto" goes on without GPU data where there is none, "required" raises, "off" does not try.
        max_bytes: bound of the file, at least 65536; a full file is thinned to every second sample.

    Raises:
        ConfigError: ``mode``, ``interval_s`` or ``max_bytes`` is out of range.
        LaunchError: ``mode`` is "required" and there is no GPU data; the message says why.

    """
    if mode not in get_args(Mode):
        raise ConfigError(f"monitor.mode: {mode!r} is not one of {', '.join(get_args(Mode))}")
    settings = Settings(
        path=str(path.absolute()),
        parent=os.getpid(),
        uuids=None if uuids is None else tuple(uuids),
        interval_s=interval_s,
        max_bytes=max_bytes,
    )
    if mode == "off":
        return Monitor(None, "monitoring is switched off (monitor=off)")
    monitor = Monitor(None, "the job uses no GPU on this node") if settings.uuids == () else _launch(settings)
    if mode == "required" and monitor.reason is not None:
        monitor.close()
        raise LaunchError(f"monitor=required, but {monitor.reason}; set monitor=auto to train without GPU data")
    return monitor


def _launch(settings: Settings) -> Monitor:
    try:
        Path(settings.path).parent.mkdir(parents=True, exist_ok=True)
        child = Child(settings)
    except OSError as e:
        return Monitor(None, f"the GPU sampler cannot start: {e}")
    reason = child.refusal(START_TIMEOUT_S)
    if reason is None:
        return Monitor(child, None)
    child.end(grace_s=1.0)
    return Monitor(None, reason)
