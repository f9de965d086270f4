"""Which stages a rank works for, and how much of a step it does: what gives a device's curve its colours."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from hybridpar.report.comparison import Comparison
from hybridpar.report.course import Course
from hybridpar.report.palette import INK, stage_colour, stage_name
from hybridpar.report.parts import stages_of
from hybridpar.report.run import Run


@dataclass(frozen=True)
class Turn:
    """A stage's computations on a rank."""

    stage: str
    colour: str
    share: float
    """Of the measured step."""


@dataclass(frozen=True)
class Turns:
    """All stages of a rank, in the order of the pipeline; none where nothing tells."""

    turns: tuple[Turn, ...] = ()

    @property
    def colour(self) -> str:
        """That of the stage which the rank computes most for."""
        return max(self.turns, key=lambda t: t.share).colour if self.turns else INK

    @staticmethod
    def together(several: Iterable[Turns]) -> Turns:
        """Return those of ranks that share a device: shares are summed by stage."""
        found: dict[str, Turn] = {}
        for turn in (turn for turns in several for turn in turns.turns):
            known = found.get(turn.stage)
            found[turn.stage] = turn if known is None else replace(known, share=known.share + turn.share)
        return Turns(tuple(found.values()))

    def __str__(self) -> str:
        """Return ``front 40%, tail 22%``."""
        return ", ".join(f"{turn.stage} {turn.share:.0%}" for turn in self.turns)


def turns_of(comparison: Comparison | None) -> dict[int, Turns]:
    """Return every rank's, of all plan replicas, from the measured step of median length."""
    result = {}
    for replica, course in enumerate(comparison.measured if comparison is not None else ()):
        for place in range(len(course.ranks)):
            result[replica * len(course.ranks) + place] = _turns(course, place)
    return result


def _turns(course: Course, place: int) -> Turns:
    seconds: dict[int, float] = defaultdict(float)
    for stage, timed in zip(stages_of(course.program, place), course.ranks[place], strict=True):
        if stage is not None and timed.action.kind != "wait":
            seconds[stage] += timed.seconds
    positions = course.program.positions
    return Turns(
        tuple(
            Turn(stage_name(positions[p]), stage_colour(positions[p]), seconds[p] / course.length_s)
            for p in sorted(seconds)
            if place in positions[p].ranks
        )
    )


@dataclass(frozen=True)
class Places:
    """Where ranks ran: what ties the monitor's samples to the plan."""

    host_of: Mapping[int, str]
    """By rank."""
    gpu_of: Mapping[int, tuple[str, str]]
    """Host and UUID by rank; none of those that ran on a CPU."""

    def ranks_on(self, host: str, uuid: str | None) -> tuple[int, ...]:
        """Return the ranks of a GPU; several may share it."""
        return tuple(rank for rank, gpu in sorted(self.gpu_of.items()) if gpu == (host, uuid))


def places_of(run: Run) -> Places:
    """Return where a run's ranks were, by their timelines and, of hosts, by the monitor's samples."""
    hosts = {rank: host.host for host in run.recording.hosts for rank in host.ranks} if run.recording else {}
    hosts |= {record.rank: record.host for record in run.timings if record.host is not None}
    gpus = {r.rank: (r.host, r.gpu) for r in run.timings if r.host is not None and r.gpu is not None}
    return Places(hosts, gpus)
