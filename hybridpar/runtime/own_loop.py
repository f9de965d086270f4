"""The folder of a run that a loop of one's own makes, as ``hybridpar report`` reads it."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from hybridpar.errors import ConfigError
from hybridpar.report.basis import Basis
from hybridpar.runtime.feed import StepBatch
from hybridpar.runtime.job import Job
from hybridpar.runtime.journal import Journal, step_record
from hybridpar.runtime.manifest import Position
from hybridpar.runtime.process import Process
from hybridpar.runtime.watching import Window, start_monitor, watch_steps
from hybridpar.sections import MonitorConfig


class OwnLoop:
    """Records the steps of a job; every rank enters it, and does its steps within.

    Writes ``plan.json``, ``profile.json``, ``cluster.yaml``, ``metrics.jsonl``, ``timeline/``, ``trace/`` and
    ``monitor*.jsonl``. What ``job.steps`` says as it is entered is where the run goes on.

    Args:
        job: whose steps.
        process: of this rank.
        folder: of the run; it is made.
        timeline: steps whose actions are timed, from ``job.steps`` on; None: none.
        monitor: what is sampled and traced.
        basis: what the plan was predicted on; None: nobody knows.
    """

    def __init__(
        self,
        job: Job,
        process: Process,
        folder: Path,
        timeline: Window | None,
        monitor: MonitorConfig,
        basis: Basis | None,
    ) -> None:
        self._job, self._process, self._folder = job, process, folder.absolute()
        self._timeline, self._settings, self._basis = timeline, monitor, basis
        self._stack = contextlib.ExitStack()
        self._since_s = 0.0

    def __enter__(self) -> Path:
        """Begin to record, and return the run's folder. Raises ConfigError where it holds another run."""
        job, process = self._job, self._process
        folder = Path(process.share(self._prepare))
        with self._stack as stack:
            self._monitor = stack.enter_context(start_monitor(process, folder, self._settings))
            trace = self._settings.trace.steps
            self._tracer = watch_steps(stack, job, process, folder, self._timeline, trace)
            begin = Position(job.steps, 0, 0) if job.steps else None
            self._journal = (
                None if process.rank else stack.enter_context(Journal(folder, 0, "quiet", position=begin))
            )
            stack.enter_context(job.watched(self._step))
            self._stack = stack.pop_all()
        self._since_s = time.perf_counter()
        return folder

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Write what is not written yet, and tell what the monitor has not told."""
        try:
            for sentence in self._monitor.close():
                _say(f"monitor: {sentence}")
        finally:
            self._stack.close()
        if self._tracer is not None and self._tracer.reason is not None:
            _say(self._tracer.reason)

    def _prepare(self) -> str:
        """Make the folder; rank 0 does."""
        folder = self._folder
        if (folder / "metrics.jsonl").exists() and not self._job.steps:
            raise ConfigError(
                f"folder: {folder} holds a run already; give another one, or have the job go on by job.go_on first"
            )
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._job.plan.save(folder / "plan.json")
            if self._basis is not None:
                self._basis.save(folder)
        except OSError as e:
            raise ConfigError(f"folder: cannot write {folder}: {e}; give another one") from e
        return str(folder)

    def _step(self, batch: StepBatch, run: Callable[[], float]) -> float:
        job = self._job
        step, rate = job.steps, job.learning_rate
        loss = run()
        now_s = time.perf_counter()
        if self._journal is not None:
            self._journal.step(step_record(job, step, None, loss, rate, batch.samples, now_s - self._since_s))
        self._since_s = now_s
        for sentence in self._monitor.news():
            _say(f"monitor: {sentence}")
        return loss


def _say(sentence: str) -> None:
    sys.stderr.write(f"hybridpar: {sentence}\n")
