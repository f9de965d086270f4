"""The training job: from a configuration and a plan to a run directory and a summary."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hybridpar.config import Config
from hybridpar.data import datasets
from hybridpar.data.sampler import Order
from hybridpar.data.samples import Samples, size_of
from hybridpar.data.stream import check_sources, check_workers, order_of, shuffle_of
from hybridpar.errors import ConfigError
from hybridpar.model.chain import Chain
from hybridpar.model.deferred import Source
from hybridpar.model.trace import Traced
from hybridpar.monitor.sampler import Monitor
from hybridpar.planning.blocks import positions
from hybridpar.planning.plan import Plan
from hybridpar.planning.program import Mode
from hybridpar.report.basis import Basis
from hybridpar.report.summary import Summary
from hybridpar.runtime import intact, resume
from hybridpar.runtime import manifest as folders
from hybridpar.runtime.boards import open_boards
from hybridpar.runtime.callback import Callback, Callbacks, make_callbacks
from hybridpar.runtime.checks import check, check_evaluations
from hybridpar.runtime.communicators import ProcessGroups
from hybridpar.runtime.configured import make_job
from hybridpar.runtime.early_stop import early_stop
from hybridpar.runtime.feed import Elsewhere
from hybridpar.runtime.intact import Found
from hybridpar.runtime.job import Job, checked_program
from hybridpar.runtime.journal import Journal, make_run_dir
from hybridpar.runtime.judge import Judge
from hybridpar.runtime.keeper import Keeper
from hybridpar.runtime.log import Log, summarise
from hybridpar.runtime.loop import Loop
from hybridpar.runtime.manifest import Position, Subject
from hybridpar.runtime.optimizer import make_rate
from hybridpar.runtime.own_metric import make_metrics
from hybridpar.runtime.process import Process
from hybridpar.runtime.resume import Resume
from hybridpar.runtime.saver import Saver
from hybridpar.runtime.stop import Stop
from hybridpar.runtime.tracer import Tracer
from hybridpar.runtime.watching import start_monitor, watch_steps
from hybridpar.schema import from_data, to_data


def train(
    config: Config,
    plan: Plan,
    traced: Traced,
    source: Source,
    process: Process,
    callbacks: Sequence[Callback] = (),
    basis: Basis | None = None,
    found: Found | None = None,
) -> Summary | None:
    """Train, evaluate and sum up; every rank calls this once, and every rank gets the summary.

    ``callbacks`` come before those of ``train.callbacks``. ``basis`` is what rank 0 predicted the plan on; kept in
    the run's folder, it lets a report simulate the step that ran. ``found`` is the checkpoint to begin with, where
    that was looked for to make the plan.

    SIGTERM ends the training after a step, with a checkpoint if there are any; every rank then gets None.

    Writes ``config.yaml``, ``plan.json``, ``profile.json``, ``cluster.yaml``, ``metrics.jsonl``,
    ``evaluations.jsonl``, ``timeline/``, ``trace/``, ``tensorboard/``, ``monitor*.jsonl``, ``checkpoints/`` and
    ``summary.json`` into the run directory. Nothing is selected on the test split, unless ``checkpoint.best`` asks
    for the checkpoint that does best there.

    Whatever fails ends this process by ``process.fail``, so that no rank waits for one that is gone. Only a
    process that is alone raises: HybridparError where the job cannot start or its data cannot be read.
    """
    try:
        check(config, plan, traced.chain, process.place)
        return _Training(config, plan, traced.chain, process, callbacks, basis, found).run(traced, source)
    except Exception as e:  # noqa: BLE001 - whatever it is, the other ranks must not wait
        process.fail(e)


class _Training:
    """One training job on one rank. Making it reads the data set and makes the run directory."""

    def __init__(
        self,
        config: Config,
        plan: Plan,
        chain: Chain,
        process: Process,
        callbacks: Sequence[Callback] = (),
        basis: Basis | None = None,
        found: Found | None = None,
    ) -> None:
        self.callbacks = [*callbacks, *make_callbacks(config.train.callbacks)]
        self.config, self.plan, self.chain, self.process = config, plan, chain, process
        self.data = self._load()
        self._check_programs()
        settings = config.train
        order = order_of(self.data[0], plan.global_batch, drop_last=settings.drop_last)
        self.steps = order.total(settings.steps, settings.epochs)
        check_evaluations(config, order)
        self.rate = make_rate(config.optimizer.lr, config.optimizer.schedule, self.steps)
        found = intact.look(config, process) if found is None else found
        if process.rank == 0:
            sys.stderr.writelines(f"hybridpar: {note}\n" for note in found.notes())
        self.resumed = None if found.folder is None else self._resumed(found.folder, order)
        restarted = process.place.restarts > 0
        self.folder = Path(process.share(lambda: str(make_run_dir(config, restarted=restarted))))
        if process.rank == 0:
            found.set_aside()
            (self.folder / "config.yaml").write_text(config.resolved)
            plan.save(self.folder / "plan.json")
            if basis is not None:
                basis.save(self.folder)
            (self.folder / "summary.json").unlink(missing_ok=True)  # of a run that goes on it is out of date

    def _load(self) -> tuple[Samples, Samples]:
        """Return training and test samples, on ranks that do not read them as they stand there for them."""
        readers = self.plan.everywhere(positions(self.plan)[0].ranks)
        splits: list[datasets.Splits] = []

        def load() -> list[list[int | None]]:
            chain, ignored = self.chain, self.config.loss.ignore_index
            splits.append(
                datasets.load(
                    self.config.data, chain.in_shape, chain.classes, ignored, chain.label_shape, chain.inputs
                )
            )
            both = (splits[0].train, splits[0].test)
            check_sources(*both)
            for samples in both:
                check_workers(samples, self.config.data.workers)
            return [[size_of(samples), shuffle_of(samples)] for samples in both]

        train, test = self.process.share(load, readers[0])
        if self.process.rank not in readers:
            return Elsewhere(*train), Elsewhere(*test)
        if not splits:
            load()
        return splits[0].train, splits[0].test

    @property
    def _subject(self) -> Subject:
        config = self.config
        return Subject(
            config.model.name,
            self.chain.fingerprint,
            self.plan.precision,
            config.optimizer.name,
            config.train.seed,
            config.data.name,
            size_of(self.data[0]),
            shuffle_of(self.data[0]),
        )

    def _resumed(self, folder: Path, order: Order) -> Resume:
        """Return the checkpoint to begin with; rank 0 looks whether it fits."""
        config, plan = self.config, self.plan

        def fit() -> Any:
            found = resume.opened(config, folder, plan, self._subject, order, self.steps)
            resume.check_cuts(found, plan, self.chain)
            return [to_data(found.manifest), found.same_run]

        manifest, same_run = self.process.share(fit)
        return resume.reopened(folder, manifest, plan, same_run=same_run)

    def _check_programs(self) -> None:
        """Compile and check, before any process group exists, every program that the job will run."""
        batch, replica = self.plan.global_batch, self.plan.locate(self.process.rank)[0]
        modes: tuple[tuple[Mode, Samples], ...] = (("train", self.data[0]), ("evaluate", self.data[1]))
        for mode, data in modes:
            for samples in order_of(data, batch).counts:
                checked_program(self.plan, self.chain, samples, mode, replica)

    def run(self, traced: Traced, source: Source) -> Summary | None:
        """Train and evaluate; None where a signal ended it before."""
        config, process = self.config, self.process
        with contextlib.ExitStack() as stack:
            stop = stack.enter_context(Stop(process))
            monitor = stack.enter_context(start_monitor(process, self.folder, config.monitor))
            communicators = process.connect(self.plan, checkpoints=config.checkpoint.every is not None)
            job = self._make_job(traced, source, communicators)
            feed = job.loader(
                self.data[0],
                drop_last=config.train.drop_last,
                workers=config.data.workers,
                mixup=config.data.mixup,
                cutmix=config.data.cutmix,
            )
            test_feed = job.loader(self.data[1], train=False, workers=config.data.workers)
            stack.enter_context(feed)
            stack.enter_context(test_feed)
            if self.resumed is not None:
                self.resumed.restore(job, feed)
            judge = Judge.of(config.checkpoint.best, job.metrics)
            saver = self._make_saver(judge)
            best = self.resumed.manifest.best_of(config.checkpoint.best) if self.resumed else None
            patience = self.resumed.manifest.patience if self.resumed else None
            early = early_stop(config.train.early_stop, job.metrics, patience)
            keeper = Keeper(saver, config.checkpoint, job, feed, source.module, self._subject, best, judge, early)
            journal = self._open_journal(stack, monitor)
            loop = Loop(
                job,
                process,
                feed,
                test_feed,
                journal,
                keeper,
                stop,
                steps=self.steps,
                eval_every=config.train.eval_every,
                begin=self.resumed.position if self.resumed else Position(0, 0, 0),
                eval_every_steps=config.train.eval_every_steps,
                early=early,
                callbacks=Callbacks(self.callbacks),
                monitor=monitor,
            )
            windows = config.train.timeline, config.monitor.trace.steps
            tracer = watch_steps(stack, job, process, self.folder, *windows, last=self.steps)
            log = loop.run()
            saver.wait()
            for sentence in monitor.close():
                if journal is not None:
                    journal.say(f"monitor: {sentence}")
            self._end_trace(tracer, journal)
            if journal is not None and (log.stopped or log.ended_early):
                journal.say(keeper.farewell() if log.stopped else f"ended early: {log.ended_early}")
            memory = process.gather(job.memory_bytes())
        if log.stopped:
            process.close()
            return None
        return self._summary(log, job.steps, memory, monitor)

    def _summary(self, log: Log, steps: int, memory: list[int], monitor: Monitor) -> Summary:
        """Let rank 0 sum up, and return what it says."""
        process = self.process

        def make() -> Any:
            return to_data(
                summarise(self.config, self.plan, self.folder, log, steps, memory, monitor, process.device)
            )

        summary = process.share(make)
        process.gather(None)
        process.close()
        return from_data(Summary, summary, "summary", ConfigError)

    def _make_job(self, traced: Traced, source: Source, communicators: ProcessGroups) -> Job:
        config = self.config
        return make_job(
            config,
            self.plan,
            traced,
            source,
            self.process,
            communicators,
            self.rate,
            metrics=make_metrics(config.metrics),
            decay=config.train.ema,
            compiling=config.train.compiling,
        )

    def _end_trace(self, tracer: Tracer | None, journal: Journal | None) -> None:
        """Close the tracer, and say why there is no trace, if there is none."""
        if tracer is None:
            return
        tracer.close()
        reasons: list[str | None] = self.process.gather(tracer.reason)
        reason = next((r for r in reasons if r is not None), None)
        if journal is not None and reason is not None:
            journal.say(reason)

    def _make_saver(self, judge: Judge | None) -> Saver:
        process, home = self.process, self.folder / folders.FOLDER
        if process.rank == 0:
            folders.clean(home)
        return Saver(home, self.config.checkpoint, process.rank, process.groups.get("checkpoint"), judge)

    def _open_journal(self, stack: contextlib.ExitStack, monitor: Monitor) -> Journal | None:
        """Open the journal on rank 0."""
        if self.process.rank:
            return None
        settings = self.config.train
        position = self.resumed.position if self.resumed else None
        boards = open_boards(
            settings.loggers, self.folder, self.config.resolved, position.step if position else None
        )
        journal = stack.enter_context(
            Journal(self.folder, self.steps, settings.mode, settings.log_every, position, boards)
        )
        if self.resumed is not None:
            journal.say(f"continuing after step {self.resumed.position.step} from {self.resumed.folder}")
        if monitor.reason is not None:
            journal.say(f"no GPU data: {monitor.reason}")
        return journal
