"""Where a step's time goes, on every rank and in every stage: computing, waiting for communication, the rest."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from hybridpar.planning.compression import WORKS
from hybridpar.planning.program import Operation, Program
from hybridpar.report.course import Course

Phase = Literal["forward", "backward", "update", "waiting"]
PHASES: tuple[Phase, ...] = ("forward", "backward", "update", "waiting")
_PHASE: dict[str, Phase] = {
    "forward": "forward",
    "score": "forward",
    "loss": "forward",
    "backward": "backward",
    "update": "update",
    **dict.fromkeys(WORKS, "update"),
}


ROUNDING = 1e-9
"""What is left of a step by rounding, as a share of it."""


class Share(NamedTuple):
    """A rank's step in seconds."""

    busy_s: float
    """Computing, copying and starting communication."""
    waiting_s: float
    """In waits: communication that nothing hides, and what it waits for on other ranks."""
    rest_s: float
    """Neither: between two steps (reading samples, writing figures) and between two actions."""


def by_rank(course: Course) -> tuple[Share, ...]:
    """Return the shares of the step's time of every rank of the replica."""
    result = []
    for actions in course.ranks:
        waiting = sum(t.seconds for t in actions if t.action.kind == "wait")
        busy = sum(t.seconds for t in actions) - waiting
        rest = course.length_s - busy - waiting
        result.append(Share(busy, waiting, rest if rest > ROUNDING * course.length_s else 0.0))
    return tuple(result)


@dataclass(frozen=True)
class StageShare:
    """A position of the pipeline: seconds per phase, mean over its ranks."""

    position: int
    seconds: dict[Phase, float]


def by_stage(course: Course) -> tuple[StageShare, ...]:
    """Return the times of every position. A wait belongs to the position that cannot go on without it."""
    program = course.program
    total: dict[tuple[int, Phase], float] = defaultdict(float)
    for _, timed in course.of("wait", *_PHASE):
        action = timed.action
        if action.kind == "wait":
            position = waiting_position(program, program.operations[action.operation or 0])
        elif action.kind == "update":
            position = action.block
        else:
            position = program.blocks[action.block or 0].position
        if position is not None:
            total[position, _PHASE.get(action.kind, "waiting")] += timed.seconds
    return tuple(
        StageShare(p.index, {phase: total[p.index, phase] / len(p.ranks) for phase in PHASES})
        for p in program.positions
    )


def waiting_position(program: Program, operation: Operation) -> int | None:
    """Return the position that an operation's data is for; None for those of the whole step."""
    if operation.block is None:
        return None
    if operation.content == "zero":
        return operation.block
    return program.blocks[operation.block + (operation.content == "activation")].position


def mean(courses: Sequence[Sequence[Share]]) -> tuple[Share, ...]:
    """Return the mean of some steps, by rank."""
    return tuple(
        Share(*(sum(own) / len(own) for own in zip(*shares, strict=True))) for shares in zip(*courses, strict=True)
    )


def mean_stages(steps: Sequence[Sequence[StageShare]]) -> tuple[StageShare, ...]:
    """Return the mean of some steps, by position."""
    return tuple(
        StageShare(own[0].position, {p: sum(s.seconds[p] for s in own) / len(own) for p in PHASES})
        for own in zip(*steps, strict=True)
    )
