"""The timekeeper: records when a job's actions run, in a few steps of a training."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from pathlib import Path

from hybridpar.planning.program import Action, Program
from hybridpar.report.timing import RankTiming, StepTiming
from hybridpar.runtime.clocks import Offset, compare
from hybridpar.runtime.feed import StepBatch
from hybridpar.runtime.job import Job
from hybridpar.runtime.process import Process, gpu_uuid
from hybridpar.runtime.stopwatch import CudaStopwatch, HostStopwatch, Stopwatch


class Timekeeper:
    """Watches the steps of a window and records them, on one rank; all ranks have one of the same window.

    Outside the window nothing is observed. Before its first step the ranks compare their clocks. The record is
    written after the window's last step, or by ``close``, so that writing disturbs no step that is recorded.

    Args:
        job: whose steps.
        process: of this rank.
        folder: of the run.
        steps: that are recorded, counted as the job counts them.
    """

    def __init__(self, job: Job, process: Process, folder: Path, steps: range) -> None:
        self._job, self._process, self._folder = job, process, folder
        self.steps = steps
        self._offset: Offset | None = None
        self._timings: list[StepTiming] = []

    def __call__(self, batch: StepBatch, run: Callable[[], float]) -> float:
        """Run the job's next step, record it if it is one of the window, and return its loss."""
        number = self._job.steps
        if number not in self.steps:
            return run()
        if self._offset is None:
            self._offset = compare(self._process)
        watch: Stopwatch = CudaStopwatch() if self._job.device.type == "cuda" else HostStopwatch()
        loss = self._watched(watch, run)
        length_s = round(time.perf_counter() - watch.start_s, 7)
        actions, completions = watch.read()
        waited_s = None if batch.waited_s is None else round(batch.waited_s, 7)
        self._timings.append(
            StepTiming(number, batch.samples, watch.start_s, length_s, actions, completions, waited_s)
        )
        if number == self.steps[-1]:
            self.close()
        return loss

    def _watched(self, watch: Stopwatch, run: Callable[[], float]) -> float:
        before = self._job.observer

        def note(program: Program, action: Action, start_s: float, end_s: float) -> None:
            watch.note(program, action, start_s, end_s)
            if before is not None:
                before(program, action, start_s, end_s)

        self._job.observe(note)
        self._job.communicators.completed = watch.complete
        try:
            return run()
        finally:
            self._job.observe(before)
            self._job.communicators.completed = None

    def close(self) -> None:
        """Write what was recorded and not written yet."""
        if not self._timings or self._offset is None:
            return
        job, offset = self._job, self._offset
        RankTiming(
            job.rank,
            job.plan.world,
            job.plan.fingerprint,
            job.device.type,
            offset.offset_s,
            offset.uncertainty_s,
            tuple(self._timings),
            socket.gethostname(),
            gpu_uuid(job.device) if job.device.type == "cuda" else None,
            time.time() - time.perf_counter(),
        ).save(self._folder)
        self._timings = []
