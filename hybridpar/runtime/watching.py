"""What is recorded of a job while it runs: samples of its nodes; of some steps, when actions and kernels ran."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

import torch

from hybridpar.monitor import sampler
from hybridpar.monitor.sampler import Monitor
from hybridpar.runtime.job import Job
from hybridpar.runtime.process import Process, gpu_uuid
from hybridpar.runtime.timekeeper import Timekeeper
from hybridpar.runtime.tracer import Tracer
from hybridpar.sections import MonitorConfig

Window = tuple[int, int]
"""Steps from a process's first on, the last not included."""


def start_monitor(process: Process, folder: Path, settings: MonitorConfig) -> Monitor:
    """Start the sampler of this node and its GPUs in one of its processes; all ranks call this.

    Raises MonitorError where there is no data of GPUs, but there is to be.
    """
    place = process.place
    pids = process.tell([place.node, os.getpid()]) if settings.mode != "off" else []
    if place.local_rank:
        return Monitor(None, None)
    uuids: list[str] = []
    if process.device.type == "cuda":
        uuids = [gpu_uuid(torch.device("cuda", i)) for i in range(place.local_world)]
    path = folder / ("monitor.jsonl" if process.rank == 0 else f"monitor-{place.node}.jsonl")
    own = {rank: pid for rank, (node, pid) in enumerate(pids) if node == place.node}
    return sampler.start(path, settings.options, settings.mode, uuids, own)


def watch_steps(
    stack: contextlib.ExitStack,
    job: Job,
    process: Process,
    folder: Path,
    timeline: Window | None,
    trace: Window | None,
    last: int = sys.maxsize,
) -> Tracer | None:
    """Have the steps of two windows timed and traced until ``stack`` ends; None: nothing is traced.

    ``last`` is the training's number of steps, as far as it is known. All ranks call this.
    """
    if timeline is not None:
        keeper = Timekeeper(job, process, folder, _steps(job, timeline, last))
        stack.enter_context(job.watched(keeper))
        stack.callback(keeper.close)
    if trace is None:
        return None
    tracer = Tracer(job, folder, _steps(job, trace, last))
    stack.enter_context(job.watched(tracer))
    stack.callback(tracer.close)
    return tracer


def _steps(job: Job, window: Window, last: int) -> range:
    return range(job.steps + window[0], min(job.steps + window[1], last))
