"""A stage's step in parts: computing, communication that nothing hides, bubble, input, and the rest."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from hybridpar.planning.program import Action, Operation, Program
from hybridpar.report.course import Course, Timed
from hybridpar.report.overlap import covered


class Parts(NamedTuple):
    """A step in seconds, as the mean over a stage's ranks; all parts together are the step."""

    busy_s: float
    """Computing, copying, updating and starting communication."""
    communication_s: float
    """Waiting for a communication that all its participants have started: nothing hides it."""
    bubble_s: float
    """Waiting for anything else: for other ranks that have not started theirs yet."""
    input_s: float
    """Waiting for samples."""
    other_s: float
    """The rest of the step: other stages of the same ranks, and what lies between actions and between steps."""

    @property
    def step_s(self) -> float:
        """All of it."""
        return sum(self)

    def share(self, part: str) -> float | None:
        """Return a part's share of the step, by its name without the unit: ``share("busy")``; None of no step."""
        seconds: float = getattr(self, f"{part}_s")
        return seconds / self.step_s if self.step_s else None


def stage_parts(course: Course) -> tuple[Parts, ...]:
    """Return the parts of a step for every position of the pipeline.

    A wait is split where the last participant started what is waited for: bubble before, communication behind.
    What one stage has to do with another counts for the stage whose values it sends or receives; what belongs to
    the whole step, such as the sum of the figures, for the stage that the rank works for next.
    """
    flights = {flight.operation: (flight.start_s, flight.end_s) for flight in course.flights}
    total: dict[int, list[float]] = defaultdict(lambda: [0.0] * 4)
    for rank, actions in enumerate(course.ranks):
        if course.inputs_s and rank in course.program.positions[0].ranks:
            total[0][3] += course.inputs_s[rank]
        for stage, timed in zip(stages_of(course.program, rank), actions, strict=True):
            for part, seconds in enumerate(_split(timed, flights) if stage is not None else ()):
                total[stage or 0][part] += seconds
    result = []
    for position in course.program.positions:
        own = [seconds / len(position.ranks) for seconds in total[position.index]]
        result.append(Parts(own[0], own[1], own[2], own[3], max(course.length_s - sum(own), 0.0)))
    return tuple(result)


def mean_parts(steps: Sequence[Sequence[Parts]]) -> tuple[Parts, ...]:
    """Return the mean of some steps, by position."""
    return tuple(
        Parts(*(sum(part) / len(part) for part in zip(*own, strict=True))) for own in zip(*steps, strict=True)
    )


def stages_of(program: Program, rank: int) -> tuple[int | None, ...]:
    """Return the position that each of a rank's actions is for; None throughout on a rank without any."""
    known = [stage_of(program, rank, action) for action in program.actions[rank]]
    follows = next((stage for stage in reversed(known) if stage is not None), _first(program, rank))
    result = []
    for stage in reversed(known):
        follows = follows if stage is None else stage
        result.append(follows)
    return tuple(result[::-1])


def _split(timed: Timed, flights: dict[int, tuple[float, float]]) -> tuple[float, float, float, float]:
    """Return an action's seconds as busy, communication, bubble and input."""
    if timed.action.kind == "load":
        return 0.0, 0.0, 0.0, timed.seconds
    if timed.action.kind != "wait":
        return timed.seconds, 0.0, 0.0, 0.0
    flight = flights.get(timed.action.operation or 0)
    flying_s = covered(timed.start_s, timed.end_s, _known(flight))
    return 0.0, flying_s, timed.seconds - flying_s, 0.0


def _known(flight: tuple[float, float] | None) -> Iterable[tuple[float, float]]:
    return () if flight is None else (flight,)


def stage_of(program: Program, rank: int, action: Action) -> int | None:
    """Return the position that an action is for by itself."""
    if action.kind == "load":
        return 0
    if action.operation is not None:
        return _stage_of_operation(program, rank, program.operations[action.operation])
    if action.block is None or action.kind == "update":
        return action.block
    after = action.kind == "copy" and action.content == "activation"
    return program.blocks[action.block + after].position


def _stage_of_operation(program: Program, rank: int, operation: Operation) -> int | None:
    if operation.block is None or operation.content == "zero":
        return operation.block
    if operation.transfer is None:
        return program.blocks[operation.block].position
    sends, forward = rank == operation.ranks[0], operation.content == "activation"
    return program.blocks[operation.block + (sends != forward)].position


def _first(program: Program, rank: int) -> int | None:
    return next((p.index for p in program.positions if rank in p.ranks), None)
