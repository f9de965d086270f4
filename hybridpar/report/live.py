"""What a run does at the moment, from the ends of the files that it writes."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from hybridpar.errors import RecordError
from hybridpar.monitor.record import Gap, GpuSample, HostSample, from_line
from hybridpar.planning.blocks import positions
from hybridpar.planning.plan import Plan
from hybridpar.report import timing
from hybridpar.report.follow import Followed
from hybridpar.report.history import Evaluated, Step
from hybridpar.report.palette import stage_name
from hybridpar.report.run import Line, check_folder, evaluated_of, step_of
from hybridpar.report.turns import Places
from hybridpar.schema import read_json

LATEST = 50
"""Steps whose median is the step time."""
SILENT_STEPS, SILENT_S = 20, 60.0
"""Without news for so many steps, and so long, a run may have ended without a word."""
STALE_S = 600.0
"""A sample so much older than the latest news is of a device that the run has left."""


@dataclass(frozen=True)
class Moment:
    """A run as its files have it now."""

    name: str
    plan: Plan
    places: Places
    step: Step | None
    """The last one."""
    step_s: float | None
    """Median of the latest full steps."""
    evaluated: Evaluated | None
    gpus: tuple[GpuSample, ...]
    """The last sample of each, by host and index."""
    hosts: tuple[HostSample, ...]
    gaps: tuple[str, ...]
    """Why data is missing."""
    recorded: bool
    """Its timeline is there."""
    ended: bool
    """It wrote its summary."""
    news_s: float | None
    """Seconds since the epoch of the last step or sample."""

    def silent_s(self, now_s: float) -> float | None:
        """Return for how long nothing was heard of a run that did not end; None as long as that is no wonder."""
        if self.ended or self.news_s is None:
            return None
        since_s = now_s - self.news_s
        return since_s if since_s > max(SILENT_S, SILENT_STEPS * (self.step_s or 0.0)) else None

    def stages_of(self, rank: int) -> str:
        """Return the stages that a rank works for: ``front, tail``."""
        local = rank % self.plan.replica_world
        return ", ".join(stage_name(position) for position in positions(self.plan) if local in position.ranks)


class Watch:
    """Follows a run's folder."""

    def __init__(self, folder: Path) -> None:
        """Begin at the ends of its files. Raises RecordError where the folder is no run's."""
        check_folder(folder)
        self.folder = folder
        self._metrics = Followed(folder / "metrics.jsonl")
        self._evaluations = Followed(folder / "evaluations.jsonl")
        self._monitors: dict[Path, Followed] = {}
        self._steps: deque[Step] = deque(maxlen=LATEST)
        self._evaluated: Evaluated | None = None
        self._samples: dict[tuple[object, ...], GpuSample | HostSample] = {}
        self._gaps: dict[str, None] = {}
        self._read_plan()

    def look(self) -> Moment:
        """Read what is new. Raises RecordError for a malformed line."""
        ended = (self.folder / "summary.json").exists()  # first, so that nothing of an ended run is missed
        if (self.folder / "plan.json").stat().st_mtime_ns != self._planned_ns:
            self._read_plan()  # the run went on under another one
        for line in _parsed(self._metrics):
            self._note(step_of(line))
        for line in _parsed(self._evaluations):
            self._evaluated = evaluated_of(line)
        self._sample()
        step = self._steps[-1] if self._steps else None
        full = max((s.samples for s in self._steps), default=0)
        times = [s.step_s for s in self._steps if s.samples == full]
        heard = [sample.time_s for sample in self._samples.values()]
        if step is not None and step.time_s is not None:
            heard.append(step.time_s)
        news_s = max(heard, default=None)
        fresh = [s for _, s in sorted(self._samples.items(), key=str) if s.time_s > (news_s or 0.0) - STALE_S]
        hosts = tuple(s for s in fresh if isinstance(s, HostSample))
        return Moment(
            name=self.folder.resolve().name,
            plan=self._plan,
            places=self._where(hosts),
            step=step,
            step_s=median(times) if times else None,
            evaluated=self._evaluated,
            gpus=tuple(s for s in fresh if isinstance(s, GpuSample)),
            hosts=hosts,
            gaps=tuple(self._gaps),
            recorded=self._places is not None,
            ended=ended,
            news_s=news_s,
        )

    def _read_plan(self) -> None:
        path = self.folder / "plan.json"
        self._planned_ns = path.stat().st_mtime_ns
        self._plan = read_json(Plan, path, RecordError)
        self._places: Places | None = None

    def _note(self, step: Step) -> None:
        if self._steps and step.step <= self._steps[-1].step:
            self._steps.clear()  # the run went on from an earlier step
        self._steps.append(step)

    def _sample(self) -> None:
        for path in sorted(self.folder.glob("monitor*.jsonl")):
            for line in self._monitors.setdefault(path, Followed(path)).lines():
                record = from_line(line, path.name)
                if isinstance(record, GpuSample):
                    self._samples[record.host, record.gpu, record.uuid] = record
                elif isinstance(record, HostSample):
                    self._samples[record.host,] = record
                elif isinstance(record, Gap):
                    self._gaps[record.reason] = None

    def _where(self, hosts: Sequence[HostSample]) -> Places:
        """Return where the ranks are, as soon as their timelines tell; until then, on which hosts."""
        if self._places is None:
            records = timing.load(self.folder, self._plan.world, self._plan.fingerprint)
            gpus = {r.rank: (r.host, r.gpu) for r in records if r.host is not None and r.gpu is not None}
            if records:
                self._places = Places({r.rank: r.host for r in records if r.host is not None}, gpus)
        return self._places or Places({rank.rank: host.host for host in hosts for rank in host.ranks}, {})


def _parsed(followed: Followed) -> Iterator[Line]:
    for text in followed.lines():
        try:
            data = json.loads(text)
        except ValueError as e:
            raise RecordError(f"{followed.path} has a line that is not JSON: {e}") from e
        if not isinstance(data, dict):
            raise RecordError(f"{followed.path} has a line that is not a JSON object: {data!r}")
        yield followed.path.name, data
