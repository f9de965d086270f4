"""The sampler process as its parent sees it."""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import subprocess
import sys
import time
from pathlib import Path

from hybridpar.monitor.answer import Answer, parse
from hybridpar.monitor.log import Log
from hybridpar.monitor.record import Gap
from hybridpar.monitor.settings import Settings
from hybridpar.schema import to_data


class Child:
    """A started sampler process, its answers, and its end."""

    def __init__(self, settings: Settings) -> None:
        """Start the process. Raises OSError where the system refuses."""
        root = str(Path(__file__).parents[2])
        self._rest, self._printed = b"", ""
        self._new: list[Answer] = []
        self._told_end = False
        self._settings = settings
        self._process = subprocess.Popen(  # noqa: S603 - our own interpreter and module
            [sys.executable, "-P", "-m", "hybridpar.monitor.process", json.dumps(to_data(settings))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))},
            start_new_session=True,  # an interrupt from the keyboard is for the training, which then ends us
        )
        assert self._process.stdout is not None
        self._answers = self._process.stdout

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def first(self, timeout_s: float) -> Answer | None:
        """Wait for the first answer, and make one where the process ends without; None: there is none in time."""
        deadline_s = time.monotonic() + timeout_s
        while (open_ := self._receive(max(0.0, deadline_s - time.monotonic()))) is not None:
            if self._new:
                return self._new.pop(0)
            if not open_:
                return self._note(self._last_words())
        return None

    def news(self) -> list[Answer]:
        """Return the answers since the last call, without waiting; that the process is gone is one, once."""
        ended = self.ended()
        while self._receive(0.0):
            pass
        new, self._new = self._new, []
        if ended and not self._told_end:
            new.append(self._note(self._last_words()))
        return new

    def ended(self) -> bool:
        """Whether the process is gone."""
        return self._process.poll() is not None

    def end(self, grace_s: float) -> list[Answer]:
        """Ask the process to end, kill it after ``grace_s``, and leave it to the system where even that hangs.

        Returns what it told last.
        """
        new = self.news()
        assert self._process.stdin is not None
        self._process.stdin.close()
        for wait_s in (grace_s, 1.0):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(wait_s)
                break
            self._process.kill()
            if not self._told_end:
                new.append(self._note(f"the sampler hung and did not end within {grace_s:g} s"))
        self._answers.close()
        return new

    def _receive(self, timeout_s: float) -> bool | None:
        """Read what the process has printed; None: nothing within a time, False: there is nothing more to come."""
        if not select.select([self._answers], [], [], timeout_s)[0]:
            return None
        chunk = os.read(self._answers.fileno(), 65536)
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        for line in lines:
            answer = parse(line)
            if answer is not None:
                self._new.append(answer)
                self._told_end |= answer.kind == "ended"
            elif line.strip():
                self._printed = line.decode(errors="replace").strip()
        return bool(chunk)

    def _note(self, reason: str) -> Answer:
        """Write why the recording ends in the place of a process that could not."""
        self._told_end = True
        gap = Gap(time.time(), socket.gethostname(), reason)
        with contextlib.suppress(OSError):  # of a disk that is full; the answer tells all the same
            log = Log(Path(self._settings.path), self._settings.options.max_bytes)
            log.write([gap])
            log.close()
        return Answer("ended", reason)

    def _last_words(self) -> str:
        """Say how a process ended that did not say so itself: its exit status, and what it printed last."""
        status = self._process.wait()
        return f"the sampler ended with exit status {status}" + (f": {self._printed}" if self._printed else "")
