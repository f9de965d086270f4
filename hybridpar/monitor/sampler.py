"""Starts and ends the process that samples a node and its GPUs.

It is a process and not a thread, since a thread starves under a training loop that holds the interpreter lock; and
a fresh interpreter and not a fork, so that it shares nothing with the training process and imports no torch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal, get_args

from hybridpar.errors import ConfigError, MonitorError
from hybridpar.monitor.answer import Answer
from hybridpar.monitor.child import Child
from hybridpar.monitor.record import read
from hybridpar.monitor.settings import Options, Settings

Mode = Literal["auto", "off", "required"]

START_TIMEOUT_S = 30.0
"""For the driver to initialise all GPUs of a node, which takes seconds where persistence mode is off."""
PATIENCE_S = 5.0
"""Of a training that goes on without GPU data as well, and then hears later that there is some."""
CLOSE_TIMEOUT_S = 5.0
"""For the sampler to end by itself."""


class Monitor:
    """A running sampler, or the reason why there is none. Close it, or use it as a context manager."""

    def __init__(self, child: Child | None, reason: str | None, *, required: bool = False) -> None:
        self._child, self._required = child, required
        self.reason = reason
        """One sentence why there is no data of any GPU, or of nothing any more; None where there is."""

    @property
    def pid(self) -> int | None:
        """Process id of the sampler; None where there is none, and once closed."""
        return self._child.pid if self._child is not None else None

    def news(self) -> list[str]:
        """Return what went wrong since the last call, one sentence each, without waiting.

        Raises MonitorError where GPU data is required and there is none any more.
        """
        if self._child is None:
            return []
        answers = self._child.news()
        told = self._hear(answers)
        for answer in answers if self._required else ():
            if answer.kind == "ended" or answer.lost:
                raise MonitorError(f"monitor=required, but {answer.reason}; set monitor=auto to go on without")
        return told

    def close(self) -> list[str]:
        """End the sampler, in seconds whatever state it is in, and return news as ``news``. May be called twice.

        ``reason`` stays what it was: None after a sampler that had data of GPUs and ran to the end.
        """
        child, self._child = self._child, None
        return [] if child is None else self._hear(child.end(CLOSE_TIMEOUT_S))

    def _hear(self, answers: Sequence[Answer]) -> list[str]:
        for answer in answers:
            if answer.kind != "gap":
                self.reason = answer.reason
        return [answer.reason or "there is data of GPUs from now on" for answer in answers]

    def __enter__(self) -> Monitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def start(
    path: Path,
    options: Options = Options(),  # noqa: B008 - frozen
    mode: Mode = "auto",
    uuids: Sequence[str] | None = None,
    pids: Mapping[int, int] | None = None,
) -> Monitor:
    """Start sampling this node and its GPUs into a file; call it in one process per node.

    Returns once the sampler answers, or where it is not "required" after ``PATIENCE_S``. What happens to it later
    reaches the caller by ``Monitor.news`` only.

    Args:
        path: file of JSON lines (``hybridpar.monitor.record``), appended to; its folder is made where missing.
        options: how often, and how much.
        mode: "auto" goes on without data that is not there, "required" raises where there is none of GPUs, "off"
            does not try.
        uuids: the GPUs to watch, "GPU-..." or "MIG-..."; None: all of the node; none given: the job uses no GPU.
        pids: process ids of the job's ranks on this node, by rank.

    Raises:
        ConfigError: ``mode`` is none of them.
        MonitorError: ``mode`` is "required" and there is no GPU data; the message says why.

    """
    if mode not in get_args(Mode):
        raise ConfigError(f"monitor.mode: {mode!r} is not one of {', '.join(get_args(Mode))}")
    if mode == "off":
        return Monitor(None, "monitoring is switched off (monitor=off)")
    settings = Settings(
        path=str(path.absolute()),
        parent=os.getpid(),
        uuids=None if uuids is None else tuple(uuids),
        ranks=tuple(sorted((pids or {}).items())),
        options=options,
    )
    monitor = _launch(settings, required=mode == "required")
    if mode == "required" and monitor.reason is not None:
        monitor.close()
        raise MonitorError(f"monitor=required, but {monitor.reason}; set monitor=auto to train without GPU data")
    return monitor


def check(options: Options) -> None:
    """Raise HybridparError where files that are named cannot be what they are to be, as far as a glance tells."""
    if options.replay is not None and next(read(Path(options.replay)), None) is None:
        raise ConfigError(f"monitor.replay: {options.replay} holds no records; give another recording")
    folder = None if options.openmetrics is None else Path(options.openmetrics).absolute().parent
    if folder is not None and not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
        raise ConfigError(f"monitor.openmetrics: {options.openmetrics} cannot be made; make the folder {folder}")


def _launch(settings: Settings, *, required: bool) -> Monitor:
    try:
        Path(settings.path).parent.mkdir(parents=True, exist_ok=True)
        child = Child(settings)
    except OSError as e:
        return Monitor(None, f"the sampler cannot start: {e}")
    answer = child.first(START_TIMEOUT_S if required else PATIENCE_S)
    if answer is None and not required:
        return Monitor(child, f"the sampler did not answer within {PATIENCE_S:g} s, and may do so yet")
    if answer is not None and answer.kind == "started":
        return Monitor(child, answer.reason, required=required)
    child.end(grace_s=1.0)
    return Monitor(None, answer.reason if answer else f"the sampler did not answer within {START_TIMEOUT_S:g} s")
