"""The sampler process as its parent sees it."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path

from hybridpar.monitor.settings import Settings
from hybridpar.schema import to_data


class Child:
    """A started sampler process, its answers, and its end."""

    def __init__(self, settings: Settings) -> None:
        """Start the process. Raises OSError where the system refuses."""
        root = str(Path(__file__).parents[2])
        self._text = b""
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

    def refusal(self, timeout_s: float) -> str | None:
        """Wait until the process samples; returns a sentence where it does not, or does not say so in time."""
        deadline_s = time.monotonic() + timeout_s
        while select.select([self._answers], [], [], max(0.0, deadline_s - time.monotonic()))[0]:
            chunk = os.read(self._answers.fileno(), 65536)
            if not chunk:
                return self.last_words()
            self._text += chunk
            answers = _parse(self._text)
            if answers:
                return answers[-1]
        return f"the GPU sampler did not answer within {timeout_s:g} s"

    def ended(self) -> bool:
        """Whether the process is gone."""
        return self._process.poll() is not None

    def last_words(self) -> str:
        """Wait for the process to end and return its reason: what it answered, else what it printed last."""
        self._text += self._answers.read()
        status = self._process.wait()
        answers, lines = _parse(self._text), self._text.decode(errors="replace").split("\n")
        if answers and answers[-1] is not None:
            return answers[-1]
        printed = [] if answers else [line.strip() for line in lines if line.strip()]
        return f"the GPU sampler ended with exit status {status}" + (f": {printed[-1]}" if printed else "")

    def end(self, grace_s: float) -> None:
        """Ask the process to end, kill it after ``grace_s``, and leave it to the system where even that hangs."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        for wait_s in (grace_s, 1.0):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(wait_s)
                break
            self._process.kill()
        self._answers.close()


def _parse(text: bytes) -> list[str | None]:
    """Return the reasons of all whole lines that are answers; warnings and tracebacks are not."""
    reasons: list[str | None] = []
    for line in text.split(b"\n")[:-1]:
        with contextlib.suppress(ValueError):
            answer = json.loads(line)
            if isinstance(answer, dict) and "reason" in answer:
                reasons.append(answer["reason"])
    return reasons
