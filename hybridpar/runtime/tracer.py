"""The tracer: has torch's profiler look at the kernels of a few steps of a job, on one rank."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from hybridpar.planning.program import Action, Program
from hybridpar.report.kernels import FOLDER
from hybridpar.report.kineto import Request, command, name_of, step_name
from hybridpar.runtime.feed import StepBatch
from hybridpar.runtime.job import Job

PATIENCE_S = 60.0
"""For the process that sums up the trace, at the end of the training."""


class Tracer:
    """Watches the steps of a window; all ranks have one of the same window.

    Outside the window nothing is named and nothing is looked at. After its last step, or at ``close``, the
    profiler writes its trace, and a process of its own sums it up (:mod:`hybridpar.report.kineto`).

    Whatever goes wrong with that becomes ``reason``, one sentence, and the training goes on.

    Args:
        job: whose steps.
        folder: of the run.
        steps: that are traced, counted as the job counts them.
    """

    def __init__(self, job: Job, folder: Path, steps: range) -> None:
        self._job, self._folder, self.steps = job, folder, steps
        self.reason: str | None = None
        """Why there is no trace, or none that is summed up."""
        self._profile: profile | None = None
        self._child: subprocess.Popen[bytes] | None = None

    def __call__(self, batch: StepBatch, run: Callable[[], float]) -> float:
        """Run a step, and trace it if it is one of the window."""
        del batch
        number = self._job.steps
        if number not in self.steps:
            return run()
        if number == self.steps[0]:
            self._attempt("does not start", self._start)
        with self._named(), record_function(step_name(number)):
            loss = run()
        if number == self.steps[-1]:
            self._attempt("wrote no trace", self._end)
        return loss

    def close(self) -> None:
        """Write what was traced and not written yet, and wait for the sums."""
        self._attempt("wrote no trace", self._end)
        self._attempt("left a trace that is not summed up", self._wait)

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """Let every action carry its name, as long as the profiler looks."""
        if self._profile is not None:
            self._job.enclose(self._scope)
        try:
            yield
        finally:
            self._job.enclose(None)

    def _scope(self, program: Program, action: Action) -> contextlib.AbstractContextManager[Any]:
        return record_function(name_of(program, self._job.place, action))

    def _start(self) -> None:
        activities = [ProfilerActivity.CPU]
        if self._job.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.synchronize(self._job.device)
        else:
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it complains that there is no GPU
        made = profile(activities=activities)
        made.start()
        self._profile = made

    def _end(self) -> None:
        made, self._profile = self._profile, None
        if made is None:
            return
        made.stop()
        folder = self._folder / FOLDER
        folder.mkdir(exist_ok=True)
        raw = folder / f"rank{self._job.rank}.raw"
        made.export_chrome_trace(str(raw))
        request = Request(str(raw), str(self._folder), self._job.rank, self._job.plan.fingerprint)
        self._child = _process(command(request))

    def _wait(self) -> None:
        child, self._child = self._child, None
        if child is None:
            return
        try:
            _, said = child.communicate(timeout=PATIENCE_S)
        except subprocess.TimeoutExpired as e:
            child.kill()
            child.communicate()
            raise RuntimeError(f"that took more than {PATIENCE_S:g} s") from e
        if child.returncode:
            lines = said.decode(errors="replace").strip().splitlines()
            raise RuntimeError(lines[-1] if lines else f"exit code {child.returncode}")

    def _attempt(self, failure: str, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as e:  # noqa: BLE001 - looking on must not end the training, whatever fails
            self.reason = self.reason or f"the profiler of rank {self._job.rank} {failure}: {e}"


def _process(arguments: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start a process, so that no step waits for the sums or shares the interpreter with them."""
    return subprocess.Popen(  # noqa: S603 - our own module
        arguments, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
