"""The keeper: decides after which steps a training is saved, and what each checkpoint says of itself."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from hybridpar.runtime.early_stop import EarlyStop
from hybridpar.runtime.evaluation import Evaluation
from hybridpar.runtime.feed import Feed
from hybridpar.runtime.job import Job
from hybridpar.runtime.judge import Judge
from hybridpar.runtime.manifest import Manifest, Position, Subject
from hybridpar.runtime.saver import Saver
from hybridpar.runtime.stream_state import piece_of
from hybridpar.schema import to_data
from hybridpar.sections import CheckpointConfig


class Keeper:
    """Keeps the checkpoints of a job on one rank; all ranks call its methods equally often.

    ``feed`` is what the job is trained on; ``module`` is the model as the user made it, whose state dict names the
    tensors; ``best`` is the best metric of the evaluations before, if there is a ``judge``; ``early`` may end the
    training early.
    """

    def __init__(
        self,
        saver: Saver,
        settings: CheckpointConfig,
        job: Job,
        feed: Feed,
        module: nn.Module,
        subject: Subject,
        best: float | None,
        judge: Judge | None = None,
        early: EarlyStop | None = None,
    ) -> None:
        self._judge, self._early = judge, early
        self._saver, self._settings, self._subject = saver, settings, subject
        self._job, self._feed = job, feed
        self._names = job.state.names(module)
        self._unused = tuple(sorted(module.state_dict().keys() - self._names.keys()))
        self._best = best

    def keep(self, position: Position, evaluation: Evaluation | None = None, *, last: bool = False) -> Path | None:
        """Begin to save the job as it stands, if it is time to; ``last``: no later step is run.

        Returns the folder that the checkpoint will have when it is complete.
        """
        metric = self._metric(evaluation)
        improved = metric is not None and self._improves(metric)
        every = self._settings.every
        if every is None or not (last or improved or position.step % every == 0):
            return None
        job = self._job
        manifest = Manifest(
            position,
            self._subject,
            job.plan.world,
            to_data(job.plan),
            self._names,
            self._unused,
            metric,
            self._best,
            self._settings.best,
            None if self._early is None else self._early.patience,
        )
        return self._saver.save(job.state.pieces() | piece_of(self._feed.mark, job.rank), manifest)

    def farewell(self) -> str:
        """Return what is said where SIGTERM has ended the training."""
        ended = f"ended by SIGTERM after step {self._job.steps}"
        if self._settings.every is None:
            return f"{ended}; nothing is saved, as checkpoint.every is not set"
        return f"{ended}, which is saved; continue with resume=auto"

    def _metric(self, evaluation: Evaluation | None) -> float | None:
        """Return what ``checkpoint.best`` goes by."""
        return None if self._judge is None or evaluation is None else self._judge.metric(evaluation)

    def _improves(self, metric: float) -> bool:
        """Note a metric; return whether it is the best so far."""
        assert self._judge is not None
        if not self._judge.better(metric, self._best):
            return False
        self._best = metric
        return True
