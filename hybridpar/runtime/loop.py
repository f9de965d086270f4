"""The loop of a training: its steps, evaluations and checkpoints, in their order."""

from __future__ import annotations

import itertools
import math
import time

from hybridpar.errors import DivergenceError
from hybridpar.runtime.callback import Callbacks
from hybridpar.runtime.feed import Feed
from hybridpar.runtime.job import Evaluation, Job
from hybridpar.runtime.journal import Journal, StepRecord
from hybridpar.runtime.keeper import Keeper
from hybridpar.runtime.log import WARM_UP_STEPS, Log
from hybridpar.runtime.manifest import Position
from hybridpar.runtime.origin import Origin
from hybridpar.runtime.process import Process
from hybridpar.runtime.resume import fingerprint
from hybridpar.runtime.stop import Agreement, Stop


class Loop:
    """Trains a job up to ``steps`` steps on one rank, from ``begin`` on; all ranks run theirs alike.

    Args:
        job: what is trained.
        process: that of this rank.
        feed: the samples to train on.
        test_feed: the samples to evaluate on.
        journal: of rank 0; None elsewhere.
        keeper: of the checkpoints.
        stop: ends the loop after a step.
        steps: of the whole training.
        eval_every: epochs between evaluations; None: only one, at the end.
        begin: how far the training has come already.
        callbacks: the user's; they may ask for the end before ``steps``.
    """

    def __init__(
        self,
        job: Job,
        process: Process,
        feed: Feed,
        test_feed: Feed,
        journal: Journal | None,
        keeper: Keeper,
        stop: Stop,
        *,
        steps: int,
        eval_every: int | None,
        begin: Position,
        callbacks: Callbacks | None = None,
    ) -> None:
        self.job, self.process, self.feed, self.test_feed = job, process, feed, test_feed
        self.journal, self.keeper, self.stop = journal, keeper, stop
        self.steps, self.eval_every, self.begin = steps, eval_every, begin
        self.callbacks, self._end = callbacks or Callbacks(()), Agreement(process, "end")
        self.log = Log()
        self._plan = fingerprint(job.plan)
        if journal is not None and journal.earlier:
            same = [record for record in journal.earlier if record.plan == self._plan]
            self.log.steps = [(record.samples, record.step_s) for record in same]
            self.log.loss = journal.earlier[-1].loss
            self.log.total_s = sum(record.step_s for record in journal.earlier)

    def run(self) -> Log:
        """Train to the end, or to where a signal ends it. Raises DivergenceError for a loss that is not finite."""
        log, began_s = self.log, time.perf_counter()
        if self._done:  # all but the summary
            log.evaluation, log.epochs = (
                self.job.evaluate(self.test_feed),
                self.begin.epoch + bool(self.begin.samples),
            )
            return log
        self.callbacks.start(self.job)
        for epoch in itertools.count(self.begin.epoch):
            at = self._epoch(epoch)
            log.epochs = epoch + 1
            log.stopped = not self._done and self.stop.after(self.job.steps)
            amid = log.stopped and at.samples > 0  # who ends a job may not wait for an evaluation
            evaluation = self._evaluate(epoch) if not amid and self._evaluates(epoch) else None
            self._keep(at, evaluation, last=self._done or log.stopped)
            if self._done or log.stopped:
                break
        log.total_s += time.perf_counter() - began_s
        self.callbacks.end()
        return log

    def _keep(self, at: Position, evaluation: Evaluation | None = None, *, last: bool = False) -> None:
        folder = self.keeper.keep(at, evaluation, last=last)
        if folder is not None:
            self._end.wanted |= self.callbacks.checkpoint(at, folder)

    @property
    def _done(self) -> bool:
        return self.job.steps == self.steps

    def _epoch(self, epoch: int) -> Position:
        """Run the steps of an epoch, or as many of them as are left, and return where the next one begins."""
        count = self.feed.order.steps
        first = self.begin.samples // self.feed.order.global_batch if epoch == self.begin.epoch else 0
        self.feed.set_epoch(epoch, first)
        before_s = time.perf_counter()
        for done, batch in enumerate(self.feed, first + 1):
            step, rate = self.job.steps, self.job.learning_rate
            loss = self.job.step(batch)
            now_s = time.perf_counter()
            self._note(step, epoch, loss, rate, batch.samples, now_s - before_s)
            before_s = now_s
            self._require_finite(loss, f"at step {step}")
            at = Position(step + 1, epoch, batch.first_sample + batch.samples)
            if self.callbacks and self._end.after(self.job.steps):
                self.steps = self.job.steps
            if done < count:
                if self._done or self.stop.after(self.job.steps):
                    return at
                self._keep(at)
        return Position(self.job.steps, epoch + 1, 0)

    def _note(self, step: int, epoch: int, loss: float, rate: float | None, samples: int, step_s: float) -> None:
        """Write a step down."""
        self.log.loss = loss
        self.log.steps.append((samples, step_s))
        first = self.begin.step
        if step < first + min(WARM_UP_STEPS, max(1, (self.steps - first) // 5)):
            self.log.measured_since_s = time.time()
        record = StepRecord(step, epoch, loss, rate, samples, step_s, samples / step_s, time.time(), self._plan)
        if self.journal is not None:
            self.journal.step(record)
        self._end.wanted |= self.callbacks.step(record)

    def _evaluates(self, epoch: int) -> bool:
        return self._done or (self.eval_every is not None and (epoch + 1) % self.eval_every == 0)

    def _evaluate(self, epoch: int) -> Evaluation:
        result = self.log.evaluation = self.job.evaluate(self.test_feed)
        self.test_feed.close()  # else its workers would wait, and hold what they read, until the next one
        if self.journal is not None:
            self.journal.evaluation(self.job.steps, epoch, result)
        self._require_finite(result.loss, f"in the evaluation after step {self.job.steps - 1}")
        if self.callbacks and any(self.process.gather(self.callbacks.evaluation(self.job.steps, epoch, result))):
            self.steps = self.job.steps
        return result

    def _require_finite(self, loss: float, where: str) -> None:
        """Raise DivergenceError, which says where it arose, for a loss that no training comes back from.

        The loss is the same on every rank, so that all ranks raise, with one text.
        """
        if math.isfinite(loss):
            return
        found: list[Origin | None] = self.process.gather(self.job.origin)
        origin = min((o for o in found if o is not None), default=None)
        cause = "it arose in the loss, from finite logits" if origin is None else str(origin)
        remedy = "lower optimizer.lr, or set optimizer.clip"
        if origin is not None and origin.layer < 0:
            remedy = "look at these samples and their normalisation"
        raise DivergenceError(f"the loss is not finite ({loss}) {where}: {cause}; {remedy}")
