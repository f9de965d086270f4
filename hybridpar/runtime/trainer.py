"""The training job: from a configuration and a plan to a run directory and a summary."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from pathlib import Path
from typing import Any

import torch

from hybridpar.config import Config
from hybridpar.data import datasets
from hybridpar.data.sampler import EpochOrder
from hybridpar.errors import ConfigError, DivergenceError
from hybridpar.model.chain import Chain
from hybridpar.model.deferred import Source
from hybridpar.model.trace import Traced
from hybridpar.monitor import sampler
from hybridpar.monitor.sampler import Monitor
from hybridpar.planning.blocks import positions
from hybridpar.planning.plan import Plan
from hybridpar.planning.program import Mode
from hybridpar.report.summary import Summary
from hybridpar.runtime import manifest as folders
from hybridpar.runtime import resume, zero
from hybridpar.runtime.checks import check
from hybridpar.runtime.communicators import Communicators
from hybridpar.runtime.feed import Feed
from hybridpar.runtime.job import Evaluation, Job, checked_program
from hybridpar.runtime.journal import Journal, StepRecord, make_run_dir
from hybridpar.runtime.log import WARM_UP_STEPS, Log, summarise
from hybridpar.runtime.loss import make_loss
from hybridpar.runtime.manifest import Manifest, Position, Subject
from hybridpar.runtime.optimizer import make_factory, make_rate
from hybridpar.runtime.origin import Origin
from hybridpar.runtime.process import Process
from hybridpar.runtime.resume import Resume
from hybridpar.runtime.saver import Saver
from hybridpar.runtime.stop import Stop
from hybridpar.schema import from_data, to_data


def train(config: Config, plan: Plan, traced: Traced, source: Source, process: Process) -> Summary | None:
    """Train, evaluate and sum up; every rank calls this once, and every rank gets the summary.

    SIGTERM ends the training after a step, with a checkpoint if there are any; every rank then gets None.

    Writes ``config.yaml``, ``plan.json``, ``metrics.jsonl``, ``evaluations.jsonl``, ``tensorboard/``,
    ``monitor*.jsonl``, ``checkpoints/`` and ``summary.json`` into the run directory. Nothing is selected on the
    test split, unless ``checkpoint.best`` asks for the checkpoint that does best there.

    Whatever fails ends this process by ``process.fail``, so that no rank waits for one that is gone. Only a
    process that is alone raises: HybridparError where the job cannot start or its data cannot be read.
    """
    try:
        check(config, plan, traced.chain, process.place)
        return _Training(config, plan, traced.chain, process).run(traced, source)
    except Exception as e:  # noqa: BLE001 - whatever it is, the other ranks must not wait
        process.fail(e)


def _size(split: Any) -> int:
    """Return the samples of a split, which on ranks that do not read it is their number already."""
    return split if isinstance(split, int) else len(split)


def _require_finite(loss: float, where: str, job: Job, process: Process) -> None:
    """Raise DivergenceError, which says where it arose, for a loss that no training comes back from.

    The loss is the same on every rank, so that all ranks raise, with one text.
    """
    if math.isfinite(loss):
        return
    found: list[Origin | None] = process.gather(job.origin)
    origin = min((o for o in found if o is not None), default=None)
    if origin is None:
        cause, remedy = "it arose in the loss, from finite logits", "lower optimizer.lr, or set optimizer.clip"
    elif origin.layer < 0:
        cause, remedy = str(origin), "look at these samples and their normalisation"
    else:
        cause, remedy = str(origin), "lower optimizer.lr, or set optimizer.clip"
    raise DivergenceError(f"the loss is not finite ({loss}) {where}: {cause}; {remedy}")


class _Training:
    """One training job on one rank. Making it reads the data set and makes the run directory."""

    def __init__(self, config: Config, plan: Plan, chain: Chain, process: Process) -> None:
        self.config, self.plan, self.chain, self.process = config, plan, chain, process
        self.data = self._load()
        self._check_programs()
        settings = config.train
        order = EpochOrder(_size(self.data[0]), plan.global_batch, drop_last=settings.drop_last)
        self.steps = settings.steps or order.steps * settings.epochs
        self.rate = make_rate(config.optimizer.lr, config.optimizer.schedule, self.steps)
        restarted = process.place.restarts > 0
        self.resumed = self._resumed(order, restarted=restarted)
        self.stop = Stop(process)
        self.best = self.resumed.manifest.best if self.resumed else None
        """The best metric of the evaluations so far, if checkpoint.best names one."""
        self.folder = Path(process.share(lambda: str(make_run_dir(config, restarted=restarted))))
        if process.rank == 0:
            (self.folder / "config.yaml").write_text(config.resolved)
            plan.save(self.folder / "plan.json")

    def _load(self) -> tuple[Any, Any]:
        """Return training and test samples: data sets where this rank reads them, their sizes elsewhere."""
        readers = self.plan.everywhere(positions(self.plan)[0].ranks)
        splits: list[datasets.Splits] = []

        def load() -> list[int]:
            shape, classes = self.chain.in_shape, self.chain.out_shape[0]
            splits.append(datasets.load(self.config.data, shape, classes, self.config.loss.ignore_index))
            return [len(splits[0].train), len(splits[0].test)]

        train_size, test_size = self.process.share(load, readers[0])
        if self.process.rank not in readers:
            return train_size, test_size
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
            _size(self.data[0]),
        )

    def _resumed(self, order: EpochOrder, *, restarted: bool) -> Resume | None:
        """Return the checkpoint to begin with; rank 0 looks for it."""
        config, plan = self.config, self.plan

        def find() -> Any:
            found = resume.opened(config, plan, self._subject, order, self.steps, restarted=restarted)
            return found and [str(found.folder), to_data(found.manifest), found.same_run]

        found = self.process.share(find)
        return resume.reopened(Path(found[0]), found[1], plan, same_run=found[2]) if found else None

    def _check_programs(self) -> None:
        """Compile and check, before any process group exists, every program that the job will run."""
        batch, replica = self.plan.global_batch, self.plan.locate(self.process.rank)[0]
        modes: tuple[tuple[Mode, Any], ...] = (("train", self.data[0]), ("evaluate", self.data[1]))
        for mode, data in modes:
            size = _size(data)
            for samples in {min(batch, size), size % batch or batch}:
                checked_program(self.plan, self.chain, samples, mode, replica)

    def run(self, traced: Traced, source: Source) -> Summary | None:
        """Train and evaluate; None where a signal ended it before."""
        config, process = self.config, self.process
        self.module = source.module
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.stop)
            monitor = self._start_monitor(stack)
            saving = config.checkpoint.every is not None
            communicators = process.connect(self.plan, checkpoints=saving)
            job = self._make_job(traced, source, communicators)
            if self.resumed is not None:
                self.resumed.restore(job)
            saver = self._make_saver()
            workers = config.data.workers
            feed = job.loader(self.data[0], drop_last=config.train.drop_last, workers=workers)
            test_feed = job.loader(self.data[1], train=False, workers=workers)
            stack.enter_context(feed)
            stack.enter_context(test_feed)
            journal = self._open_journal(stack, monitor)
            log = self._loop(job, feed, test_feed, journal, saver)
            saver.wait()
            monitor.close()
            if log.stopped and journal is not None:
                journal.say(self._farewell(job, saver))
            memory = process.gather(job.memory_bytes())
        if log.stopped:
            process.close()
            return None
        summary = process.share(
            lambda: to_data(
                summarise(config, self.plan, self.folder, log, job.steps, memory, monitor, process.device)
            )
        )
        process.gather(None)
        process.close()
        return from_data(Summary, summary, "summary", ConfigError)

    def _farewell(self, job: Job, saver: Saver) -> str:
        """Return what is said where SIGTERM has ended the training."""
        if saver.active:
            return f"ended by SIGTERM after step {job.steps}, which is saved; continue with resume=auto"
        return f"ended by SIGTERM after step {job.steps}; nothing is saved, as checkpoint.every is not set"

    def _make_job(self, traced: Traced, source: Source, communicators: Communicators) -> Job:
        settings, factory = self.config.optimizer, make_factory(self.config.optimizer)
        return Job(
            self.plan,
            traced,
            source,
            factory,
            communicators,
            rank=self.process.rank,
            seed=self.config.train.seed,
            device=self.process.device,
            max_norm=settings.clip,
            rate=self.rate,
            engines=zero.make_engines(self.process, factory) if self.plan.recipe.sharding == "zero1" else None,
            loss=make_loss(self.config.loss, self.chain.out_shape[0]),
            groups=settings.parameter_groups,
        )

    def _make_saver(self) -> Saver:
        process, home = self.process, self.folder / folders.FOLDER
        if process.rank == 0:
            folders.clean(home)
        return Saver(home, self.config.checkpoint, process.rank, process.groups.get("checkpoint"))

    def _save(self, job: Job, saver: Saver, position: Position, metric: float | None = None) -> None:
        """Begin to save the job as it stands."""
        whole = set(self.module.state_dict())
        names = job.state.names(self.module)
        manifest = Manifest(
            position,
            self._subject,
            self.process.world,
            to_data(self.plan),
            names,
            tuple(sorted(whole - names.keys())),
            metric,
            self.best,
        )
        saver.save(job.state.pieces(), manifest)

    def _start_monitor(self, stack: contextlib.ExitStack) -> Monitor:
        """Start the sampler of this node's GPUs in one of its processes."""
        place, settings = self.process.place, self.config.monitor
        if place.local_rank:
            return Monitor(None, None)
        uuids: list[str] = []
        if self.process.device.type == "cuda":
            uuids = [f"GPU-{torch.cuda.get_device_properties(i).uuid}" for i in range(place.local_world)]
        name = "monitor.jsonl" if self.process.rank == 0 else f"monitor-{place.node}.jsonl"
        path = self.folder / name
        monitor = sampler.start(path, settings.interval_s, uuids, settings.mode, settings.max_bytes)
        return stack.enter_context(monitor)

    def _open_journal(self, stack: contextlib.ExitStack, monitor: Monitor) -> Journal | None:
        """Open the journal on rank 0."""
        if self.process.rank:
            return None
        settings = self.config.train
        position = self.resumed.position if self.resumed else None
        journal = stack.enter_context(
            Journal(self.folder, self.steps, settings.mode, settings.log_every, position)
        )
        if self.resumed is not None:
            journal.say(f"continuing after step {self.resumed.position.step} from {self.resumed.folder}")
        if monitor.reason is not None:
            journal.say(f"no GPU data: {monitor.reason}")
        return journal

    def _loop(self, job: Job, feed: Feed, test_feed: Feed, journal: Journal | None, saver: Saver) -> Log:
        every, log = self.config.train.eval_every, Log()
        if journal is not None:
            log.steps = [(r.samples, r.step_s) for r in journal.earlier]
            log.loss = journal.earlier[-1].loss if journal.earlier else 0.0
        begin = self.resumed.position if self.resumed else Position(0, 0, 0)
        started_s = time.perf_counter()
        if job.steps == self.steps:  # all was done but the summary
            log.evaluation, log.epochs = job.evaluate(test_feed), begin.epoch + bool(begin.samples)
            return log
        for epoch in itertools.count(begin.epoch):
            start = self.resumed.start_step(feed.order) if self.resumed and epoch == begin.epoch else 0
            at = self._epoch(job, feed, epoch, start, log, journal, saver)
            log.epochs = epoch + 1
            log.stopped = job.steps < self.steps and self.stop.after(job.steps)
            if log.stopped and at.samples:
                if saver.active:
                    self._save(job, saver, at)
                break
            ended, metric = job.steps == self.steps, None
            if ended or (every is not None and (epoch + 1) % every == 0):
                log.evaluation = job.evaluate(test_feed)
                test_feed.close()  # else its workers would wait, and hold what they read, until the next one
                if journal is not None:
                    journal.evaluation(job.steps, epoch, log.evaluation)
                where = f"in the evaluation after step {job.steps - 1}"
                _require_finite(log.evaluation.loss, where, job, self.process)
                metric = self._metric(log.evaluation)
            improved = metric is not None and self._improve(metric)
            if saver.due(job.steps) or improved or ((ended or log.stopped) and saver.active):
                self._save(job, saver, at, metric)
            if ended or log.stopped:
                break
        log.total_s = time.perf_counter() - started_s
        return log

    def _metric(self, evaluation: Evaluation) -> float | None:
        """Return what ``checkpoint.best`` goes by."""
        best = self.config.checkpoint.best
        return None if best is None else evaluation.top1 if best == "accuracy" else evaluation.loss

    def _improve(self, metric: float) -> bool:
        """Note a metric; return whether it is the best so far."""
        sign = 1 if self.config.checkpoint.best == "accuracy" else -1
        if self.best is not None and sign * metric <= sign * self.best:
            return False
        self.best = metric
        return True

    def _epoch(
        self, job: Job, feed: Feed, epoch: int, start: int, log: Log, journal: Journal | None, saver: Saver
    ) -> Position:
        """Run the steps of an epoch, or as many of them as are left, and return where the next one begins."""
        feed.set_epoch(epoch, start)
        before_s = time.perf_counter()
        for batch in feed:
            step, rate = job.steps, job.learning_rate
            log.loss = job.step(batch)
            now_s = time.perf_counter()
            step_s, before_s = now_s - before_s, now_s
            log.steps.append((batch.samples, step_s))
            if step < min(WARM_UP_STEPS, max(1, self.steps // 5)):
                log.measured_since_s = time.time()
            if journal is not None:
                per_s = batch.samples / step_s
                journal.step(StepRecord(step, epoch, log.loss, rate, batch.samples, step_s, per_s, time.time()))
            _require_finite(log.loss, f"at step {step}", job, self.process)
            start += 1
            at = Position(job.steps, epoch, batch.first_sample + batch.samples)
            within = start < feed.order.steps
            if within and (job.steps == self.steps or self.stop.after(job.steps)):
                return at
            if within and saver.due(job.steps):
                self._save(job, saver, at)
        return Position(job.steps, epoch + 1, 0)
