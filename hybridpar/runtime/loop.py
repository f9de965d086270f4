"""The loop of a training: its steps, evaluations and checkpoints, in their order."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import replace

from hybridpar.errors import DivergenceError
from hybridpar.monitor.sampler import Monitor
from hybridpar.report.history import warm_up
from hybridpar.runtime.callback import Callbacks
from hybridpar.runtime.early_stop import EarlyStop
from hybridpar.runtime.evaluation import Evaluation
from hybridpar.runtime.feed import Feed, StepBatch
from hybridpar.runtime.job import Job
from hybridpar.runtime.journal import Journal, step_record
from hybridpar.runtime.keeper import Keeper
from hybridpar.runtime.log import Log
from hybridpar.runtime.manifest import Position
from hybridpar.runtime.origin import Origin
from hybridpar.runtime.process import Process
from hybridpar.runtime.stop import Agreement, Stop

SKIPPED_IN_A_ROW = 20
"""So many steps without finite gradients, each at half of the scale before, end the training."""


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
        eval_every: epochs between evaluations; None: none after epochs.
        eval_every_steps: steps between further ones; None: none. There is one at the end in any case.
        begin: how far the training has come already.
        early: may end the training before ``steps``, after an evaluation.
        callbacks: the user's; they may ask for the end before ``steps``.
        monitor: the sampler of this rank's node; what it has to tell is said after a step. None: there is none.
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
        eval_every_steps: int | None = None,
        early: EarlyStop | None = None,
        callbacks: Callbacks | None = None,
        monitor: Monitor | None = None,
    ) -> None:
        self.job, self.process, self.feed, self.test_feed = job, process, feed, test_feed
        self.journal, self.keeper, self.stop = journal, keeper, stop
        self.steps, self.begin, self.early = steps, begin, early
        self.eval_every, self.eval_every_steps = eval_every, eval_every_steps
        self.callbacks, self._end = callbacks or Callbacks(()), Agreement(process, "end")
        self.monitor = monitor
        self.log = Log(skipped=job.scaler.skipped if job.scaler else None)
        self._since_s = 0.0
        if early is not None and early.over:
            self._end_early(early.reason)
        self._plan = job.plan.fingerprint
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
        for at in self._positions():
            log.stopped = not self._done and self.stop.after(self.job.steps)
            evaluation = self._evaluate() if self._evaluates(at) else None
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

    def _end_early(self, reason: str) -> None:
        """Let the step that was run be the last one."""
        if self.job.steps < self.steps:
            self.steps, self.log.ended_early = self.job.steps, reason

    def _positions(self) -> Iterator[Position]:
        """Run one step after the other, and tell after each where the next one begins."""
        count, batch_size = self.feed.order.steps, self.feed.order.global_batch
        for epoch in itertools.count(self.begin.epoch):
            self.log.epochs = epoch + 1
            first = self.begin.samples // batch_size if epoch == self.begin.epoch else 0
            self.feed.set_epoch(epoch, first)
            self._since_s = time.perf_counter()
            for done, batch in enumerate(self.feed, first + 1):
                self._step(epoch, batch)
                amid = Position(self.job.steps, epoch, batch.first_sample + batch.samples)
                yield amid if done < count else Position(self.job.steps, epoch + 1, 0)

    def _step(self, epoch: int, batch: StepBatch) -> None:
        step, rate = self.job.steps, self.job.learning_rate
        loss = self.job.step(batch)
        now_s = time.perf_counter()
        self._note(step, epoch, loss, rate, batch.samples, now_s - self._since_s)
        self._since_s = now_s
        self._require_sound(step, loss)
        self._hear_monitor()
        if self.callbacks and self._end.after(self.job.steps):
            self._end_early("a callback asked for the end")

    def _note(self, step: int, epoch: int, loss: float, rate: float | None, samples: int, step_s: float) -> None:
        """Write a step down."""
        self.log.loss = loss
        self.log.steps.append((samples, step_s))
        first = self.begin.step
        if step < first + max(1, warm_up(self.steps - first)):
            self.log.measured_since_s = time.time()
        record = step_record(self.job, step, epoch, loss, rate, samples, step_s)
        scaler = self.job.scaler
        self.log.skipped = scaler.skipped if scaler else None
        if self.journal is not None:
            self.journal.step(record)
        self._end.wanted |= self.callbacks.step(record)

    def _hear_monitor(self) -> None:
        """Say what data of the monitor is missing from now on; raises MonitorError where that may not be."""
        for sentence in self.monitor.news() if self.monitor is not None else ():
            if self.journal is not None:
                self.journal.say(f"monitor: {sentence}")

    def _evaluates(self, at: Position) -> bool:
        """Whether an evaluation is due; the one at the end is not due where a signal ended the training before."""
        after_steps = self.eval_every_steps is not None and at.step % self.eval_every_steps == 0
        after_epochs = self.eval_every is not None and at.samples == 0 and at.epoch % self.eval_every == 0
        return self._done or after_steps or after_epochs

    def _evaluate(self) -> Evaluation:
        epoch, result = self.log.epochs - 1, self.job.evaluate(self.test_feed)
        self.test_feed.close()  # else its workers would wait, and hold what they read, until the next one
        if result.own:  # what a user makes of sums may differ between ranks, but what follows from it may not
            result = replace(result, own=self.process.share(lambda: dict(result.own)))
        self.log.evaluation = result
        if self.journal is not None:
            self.journal.evaluation(self.job.steps, epoch, result)
        self._require_finite(result.loss, f"in the evaluation after step {self.job.steps - 1}")
        if self.callbacks and any(self.process.gather(self.callbacks.evaluation(self.job.steps, epoch, result))):
            self._end_early("a callback asked for the end")
        if self.early is not None:
            self.early.note(self.job.steps, result)
            if self.early.over:
                self._end_early(self.early.reason)
        self._since_s = time.perf_counter()  # no step takes the time of an evaluation
        return result

    def _require_sound(self, step: int, loss: float) -> None:
        """Raise DivergenceError for a loss that is not finite, or for gradients that are not at any scale.

        A step that was skipped has left the parameters as they were, whatever its loss.
        """
        scaler = self.job.scaler
        if scaler is None or not scaler.in_a_row:
            self._require_finite(loss, f"at step {step}")
        elif scaler.in_a_row >= SKIPPED_IN_A_ROW:
            where = f"at step {step}, the last of {SKIPPED_IN_A_ROW} in a row that were skipped"
            self._require_finite(loss, where)
            raise DivergenceError(
                f"the gradients are not finite {where}, though the loss is, and its scale is down to "
                f"{scaler.scale:g}; lower train.loss_scale.init if it was far too large, else optimizer.lr"
            )

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
