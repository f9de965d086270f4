"""Callbacks: a user's own code beside the steps of a training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hybridpar.errors import ConfigError
from hybridpar.references import resolve
from hybridpar.runtime.evaluation import Evaluation
from hybridpar.runtime.job import Job
from hybridpar.runtime.journal import StepRecord
from hybridpar.runtime.manifest import Position


class Callback:
    """What happens at some moments of a training: override what is needed.

    Every rank makes its own and has its methods called at the same moments. One that returns True, on whatever
    rank, asks for the end, and all ranks end after the same step: after an evaluation at once, else one step later
    at most (two after a checkpoint). The training then ends as if it had no more steps: with an evaluation, a
    checkpoint if there are any, and a summary. What a callback raises ends the job.
    """

    def on_start(self, job: Job) -> None:
        """Take note of this rank's job before the first step, or the first one after a resume."""

    def on_step(self, record: StepRecord) -> bool | None:
        """Take note of a step that has ended; the record's times are those of this rank."""

    def on_evaluation(self, step: int, epoch: int, evaluation: Evaluation) -> bool | None:
        """Take note of an evaluation after ``step`` steps, the last one in ``epoch``; the same on every rank."""

    def on_checkpoint(self, position: Position, folder: Path) -> bool | None:
        """Take note of a checkpoint that is being written; ``folder`` appears when it is complete."""

    def on_end(self) -> None:
        """Take note of the end, which an error leaves out."""


class Callbacks:
    """All callbacks of a training on one rank, called one after the other."""

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self._callbacks = tuple(callbacks)

    def __bool__(self) -> bool:
        return bool(self._callbacks)

    def start(self, job: Job) -> None:
        """Call ``on_start``."""
        for callback in self._callbacks:
            callback.on_start(job)

    def step(self, record: StepRecord) -> bool:
        """Call ``on_step``; return whether one asks for the end, as the next two do."""
        answers = [callback.on_step(record) for callback in self._callbacks]
        return any(answers)

    def evaluation(self, step: int, epoch: int, evaluation: Evaluation) -> bool:
        """Call ``on_evaluation``."""
        answers = [callback.on_evaluation(step, epoch, evaluation) for callback in self._callbacks]
        return any(answers)

    def checkpoint(self, position: Position, folder: Path) -> bool:
        """Call ``on_checkpoint``."""
        answers = [callback.on_checkpoint(position, folder) for callback in self._callbacks]
        return any(answers)

    def end(self) -> None:
        """Call ``on_end``."""
        for callback in self._callbacks:
            callback.on_end()


def make_callbacks(references: Sequence[str]) -> list[Callback]:
    """Import and make the configured callbacks, ``module:Class`` each. Raises ConfigError."""
    made = []
    for reference in references:
        factory = resolve(reference, "train.callbacks")
        callback = factory() if callable(factory) else factory
        if not isinstance(callback, Callback):
            raise ConfigError(
                f"train.callbacks: {reference} gives a {type(callback).__name__}; name a class that derives from "
                "hybridpar.Callback and needs no arguments, or a function that returns one"
            )
        made.append(callback)
    return made
