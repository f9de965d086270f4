"""Runs tasks: one launch of all ranks of a contestant, and what came of it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from scripts.bench.beat import Beat
from scripts.bench.children import ROOT, LaunchFailedError
from scripts.bench.cluster.cell import Entry, Round
from scripts.bench.cluster.folder import Folder
from scripts.bench.cluster.launch import on_hosts
from scripts.bench.cluster.setting import Setting
from scripts.bench.cluster.task import Seen, Task

WORKER = ("-m", "scripts.bench.cluster.worker")
TIMEOUT_S = 900.0
"""Of a launch, after which it counts as failed."""


@dataclass(frozen=True)
class Steps:
    """What the ranks of a launch do."""

    warm_up: int = 1
    """Steps that are not timed."""
    timed: int = 2
    losses: int = 0
    """First steps, without dropout, whose losses are told."""


@dataclass(frozen=True)
class Runner:
    """Launches entries; ``worker`` is what Python runs as a rank, ``alone`` tells who is one process."""

    folder: Folder
    beat: Beat
    alone: Callable[[str], bool]
    worker: Sequence[str] = WORKER

    def run(self, name: str, setting: Setting, entry: Entry, steps: Steps, number: int = 0) -> Round:
        """Launch an entry once; a failure is a round with an error, which names its file of output.

        Raises HostsError and CgroupError where there can be no hosts.
        """
        out = self.folder.launch(name)
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        path = out / "task.json"
        Task(entry.contestant, setting, entry.options, str(out), steps.warm_up, steps.timed, steps.losses).save(
            path
        )
        date, began_s = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()), time.perf_counter()
        error = None
        alone = self.alone(entry.contestant)
        try:
            log = self.folder.log(name)
            on_hosts(setting, [*self.worker, str(path)], log, TIMEOUT_S, alone=alone, late=True)
        except LaunchFailedError as e:
            error = str(e)
        ended_s = time.perf_counter()
        seen = [Seen.load(out, rank) for rank in range(1 if alone else setting.world)]
        error = error or next((s.error for s in seen if s.error), None)
        able = () if error else tuple(asdict(s) for s in seen)
        told = error and error.replace(f"{ROOT}/", "").strip()
        return Round(number, date, ended_s - began_s, able, self.beat.median_s(began_s, ended_s), told)
