"""The job: a plan, a model and an optimizer, wired into an executor on one rank."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from hybridpar.data.loader import StepLoader
from hybridpar.data.mixing import Mixing
from hybridpar.data.samples import Form, Samples
from hybridpar.data.stream import Stream, as_samples, order_of
from hybridpar.errors import DataError
from hybridpar.model.chain import Chain
from hybridpar.model.deferred import Source
from hybridpar.model.freeze import check_trained
from hybridpar.model.trace import Traced
from hybridpar.optimizer_section import ParameterGroup
from hybridpar.planning.blocks import Position, blocks, positions
from hybridpar.planning.check import check
from hybridpar.planning.compile import compile as compile_program
from hybridpar.planning.parameters import parameter_count
from hybridpar.planning.plan import Plan
from hybridpar.planning.program import Mode, Operation, Program
from hybridpar.planning.zero import is_zero
from hybridpar.runtime.agreement import check_agreement, check_sampling
from hybridpar.runtime.batch import GivenBatch, Inputs, Reader, WholeBatch
from hybridpar.runtime.communicators import Communicators
from hybridpar.runtime.compiled import check_for, compile_blocks
from hybridpar.runtime.cross_entropy import CrossEntropy
from hybridpar.runtime.evaluation import Evaluation, Totals
from hybridpar.runtime.executor import Executor, Observer, Scope
from hybridpar.runtime.feed import Elsewhere, Feed, StepBatch
from hybridpar.runtime.groups import check_groups
from hybridpar.runtime.loss import Loss, check_mixes
from hybridpar.runtime.memory import MemoryMeter
from hybridpar.runtime.modules import BlockModules, ModuleFactory, Owned, owned_parameters
from hybridpar.runtime.origin import Origin, Watch
from hybridpar.runtime.own_metric import Function, OwnMetric, OwnMetrics
from hybridpar.runtime.running_statistics import RunningStatistics
from hybridpar.runtime.scaler import Scaler
from hybridpar.runtime.state import State
from hybridpar.runtime.step import Metrics
from hybridpar.runtime.undo import Undo
from hybridpar.runtime.update import EngineFactory, OptimizerFactory, Updater
from hybridpar.train_section import Compiling, LossScale

Watcher = Callable[[StepBatch, Callable[[], float]], float]
"""Runs a training step: gets this rank's part of it and what runs it, and returns its loss."""
DTYPES = {"float32": torch.float32, "float64": torch.float64}


class Best(NamedTuple):
    """The largest logits of some samples."""

    values: torch.Tensor
    """(samples, k), the largest first; (samples, tokens, k) where every token has logits."""
    classes: torch.Tensor
    """Likewise, int64."""


@lru_cache(maxsize=16)
def checked_program(plan: Plan, chain: Chain, samples: int, mode: Mode, replica: int, best: int = 0) -> Program:
    """Return the program of one of the plan's replicas in a step of ``samples`` samples, of all replicas.

    ``best``: classes per label, of a prediction.

    Raises ProgramError if it could hang, PlanError if it is impossible.
    """
    program = compile_program(plan, chain, samples, mode, replica, best)
    check(program)
    return program


class Job:
    """One rank's part of a training under a plan.

    Every rank makes a Job with the same arguments, apart from its own ``rank``, ``communicators`` and ``device``,
    and calls ``step`` and ``evaluate`` equally often. Only the parameters of the rank's own stages are made.

    Args:
        plan: what runs where.
        traced: the model's layers; their chain must be the plan's.
        source: the initial values of the model's tensors.
        optimizer: makes an optimizer for some parameters.
        communicators: over the plan's ranks (``Process.connect``).
        rank: this rank, of all replicas of the plan.
        seed: of initial values and dropout.
        device: of this rank.
        max_norm: clips the gradients by their global norm, if ``plan.recipe.clipping`` is set.
        rate: learning rate by step, from 0; None leaves it to the optimizer.
        engines: makes sharded optimizers, if ``plan.recipe.sharding`` asks for them.
        loss: by default the cross-entropy, without smoothing and weights.
        groups: parameters for which the optimizer is to have other options; ``rate`` keeps the ratio of their
            learning rates to the optimizer's.
        decay: of a moving average of the weights, which evaluations then use; None: no average.
        metrics: further figures of evaluations, by name: functions of (logits, labels), or ``OwnMetric``.
        scaling: scales the loss, if ``plan.recipe.scaling`` is set; a step whose gradients are not all finite is
            skipped then.
        compiling: which stages' layers ``torch.compile`` compiles; None: those of none.

    Raises:
        PlanError: the plan is for another model, asks for clipping, scaling or sharding that is not given, or has
            the logits where an own loss cannot use them.
        ModelError: all parameters of the model are frozen.
        ConfigError: the optimizer refuses the parameters, a group has none, the loss has another number of
            classes, or there is no such compiler.

    """

    def __init__(
        self,
        plan: Plan,
        traced: Traced,
        source: Source,
        optimizer: OptimizerFactory,
        communicators: Communicators,
        *,
        rank: int,
        seed: int = 0,
        device: torch.device | None = None,
        max_norm: float | None = None,
        rate: Callable[[int], float] | None = None,
        engines: EngineFactory | None = None,
        loss: Loss | None = None,
        groups: Sequence[ParameterGroup] = (),
        metrics: Mapping[str, OwnMetric | Function] | None = None,
        decay: float | None = None,
        scaling: LossScale | None = None,
        compiling: Compiling | None = None,
    ) -> None:
        self.plan, self.chain, self.rank, self.seed = plan, traced.chain, rank, seed
        self.replica, self.place = plan.locate(rank)
        """The plan replica of this rank, and its number there, as programs number ranks."""
        self.device = device or torch.device("cpu")
        self.steps = 0
        """Steps that were run."""
        self.rate = rate
        """Learning rate by step; None leaves it to the optimizer."""
        self._watchers: list[Watcher] = []
        self._communicators, self._next_sample = communicators, 0
        self._reader = Reader(rank, self.chain)
        self._uncompressed = replace(plan, recipe=replace(plan.recipe, compression=None))
        self._loss = loss or CrossEntropy()
        self._metrics = OwnMetrics(metrics or {}, self.chain)
        self.scaler = None if scaling is None else Scaler(scaling)
        """Of the loss: its scale, and how many steps were skipped; None: the loss is not scaled."""
        self._check(optimizer, max_norm, groups, compiling, sharding=engines is not None)
        self._meter = MemoryMeter(self.device)
        self._positions = tuple(p for p in positions(plan) if self.place in p.ranks)
        self._blocks = self._make(ModuleFactory(traced, source, seed, DTYPES[plan.precision], self.device))
        self._statistics = RunningStatistics(self.place, self.chain, self._positions, self._blocks, communicators)
        self._updater = self._make_updater(optimizer, max_norm, engines, groups, decay)
        if compiling is not None:
            own = [b for p in self._positions if compiling.has(p.kind) for b in self._blocks_of(p)]
            compile_blocks(own, self.chain, compiling.backend)
        self.state = self._make_state(traced)
        """What a checkpoint of this rank holds."""
        self._executor = self._make_executor()

    def _check(
        self,
        optimizer: OptimizerFactory,
        max_norm: float | None,
        groups: Sequence[ParameterGroup],
        compiling: Compiling | None,
        *,
        sharding: bool,
    ) -> None:
        """Raise the error that says so where the plan, the model and what the user wants do not go together."""
        check_agreement(self.plan, self.chain, max_norm, scaled=self.scaler is not None, sharding=sharding)
        check_sampling(self.plan, self._loss, optimizer)
        check_trained(self.chain)
        self._loss.check_plan(self.plan, self.chain)
        self._metrics.check_plan(self.plan)
        check_groups(groups, self.chain)
        if compiling is not None:
            check_for(compiling, self.plan, self.device.type)

    def _make_state(self, traced: Traced) -> State:
        return State(
            traced,
            self._positions,
            self._blocks,
            self._updater.optimizers,
            self._updater.engines,
            self.rank,
            self.place,
            self.replica,
            self.device,
            self._updater.average,
            self.scaler,
            self._updater.compressors,
        )

    def _make_executor(self) -> Executor:
        return Executor(
            self.place,
            self._blocks,
            self._communicators,
            self._updater,
            seed=self.seed,
            dtype=DTYPES[self.plan.precision],
            device=self.device,
            name=f"rank {self.rank}",
            watch=Watch(self.rank),
            loss=self._loss,
            own=self._metrics if self._metrics.metrics else None,
        )

    def _make(self, factory: ModuleFactory) -> dict[int, BlockModules]:
        places = positions(self.plan)
        return {
            block.index: factory.make(block, places[block.position], self.place)
            for block in blocks(self.plan, self.chain)
            if self.place in places[block.position].ranks
        }

    def _make_updater(
        self,
        optimizer: OptimizerFactory,
        max_norm: float | None,
        engines: EngineFactory | None,
        groups: Sequence[ParameterGroup],
        decay: float | None,
    ) -> Updater:
        sharded = {
            p.index: engines(p, self._blocks_of(p), groups)
            for p in self._positions
            if engines and is_zero(self.plan, p) and parameter_count(self.chain, p.layers, trained=True)
        }
        return Updater(
            self.place,
            self._positions,
            self._blocks,
            optimizer,
            max_norm,
            sharded,
            self.replica,
            groups,
            decay,
            self.scaler,
            self.plan.recipe.compression,
            self.seed,
            lasting=self.plan.recipe.sharding != "zero2",
            undo=None if self.scaler is None else Undo(self._blocks.values(), self.chain),
        )

    def _blocks_of(self, position: Position) -> list[BlockModules]:
        return [b for b in self._blocks.values() if b.block.position == position.index]

    @property
    def blocks(self) -> Mapping[int, BlockModules]:
        """The rank's own blocks by their index in the plan."""
        return self._blocks

    @property
    def parameters(self) -> dict[str, Owned]:
        """Parameters of this rank by their full names in the model; a shard says which slice it is."""
        return {o.name: o for o in owned_parameters(list(self._blocks.values()))}

    def gradient_runs(self) -> dict[nn.Parameter, tuple[int, torch.Tensor]]:
        """Return what this rank keeps of the last step's sharded gradients, as ``Updater.runs`` does."""
        return self._updater.runs()

    @property
    def metrics(self) -> Mapping[str, OwnMetric]:
        """The user's own metrics of evaluations."""
        return self._metrics.metrics

    @property
    def communicators(self) -> Communicators:
        """What connects it to the other ranks."""
        return self._communicators

    @property
    def reads(self) -> bool:
        """Whether this rank reads samples."""
        return self.place in positions(self.plan)[0].ranks

    @property
    def learning_rate(self) -> float | None:
        """Of the next step; None where the optimizer keeps its own."""
        return self.rate(self.steps) if self.rate else None

    def go_on(self, step: int, sample: int) -> None:
        """Let the next step be ``step``, counted from 0, and its first sample have the id ``sample``."""
        self.steps, self._next_sample = step, sample

    @property
    def origin(self) -> Origin | None:
        """Where values left the finite numbers on this rank in the last step, if they did."""
        return self._executor.watch.origin

    def memory_bytes(self) -> int:
        """Return the peak memory of this rank's part so far."""
        return self._meter.peak_bytes()

    @property
    def observer(self) -> Observer | None:
        """What is called after every action."""
        return self._executor.observer

    def observe(self, observer: Observer | None) -> None:
        """Call ``observer`` after every action from now on; None: no longer."""
        self._executor.observer = observer

    def enclose(self, scope: Scope | None) -> None:
        """Run every action within what ``scope`` gives from now on; None: no longer."""
        self._executor.scope = scope

    @contextlib.contextmanager
    def watched(self, watcher: Watcher) -> Iterator[None]:
        """Let ``watcher`` run the training steps within a ``with`` block: by the function that it is given."""
        self._watchers.append(watcher)
        try:
            yield
        finally:
            self._watchers.remove(watcher)

    def program(self, mode: Mode = "train", samples: int | None = None) -> Program:
        """Return the program of this rank's plan replica in a step of ``samples``, by default the global batch.

        The next step's: in the first steps of a training gradients may not be compressed yet.
        """
        plan = self.plan if self.steps >= self.plan.recipe.first_step else self._uncompressed
        return checked_program(plan, self.chain, samples or plan.global_batch, mode, self.replica)

    def loader(
        self,
        dataset: Samples | Stream | Any,
        *,
        train: bool = True,
        seed: int | None = None,
        drop_last: bool = False,
        workers: int = 0,
        mixup: float | None = None,
        cutmix: float | None = None,
    ) -> Feed:
        """Return what feeds this rank from a data set: all that its steps need, and nothing else.

        ``dataset`` is a ``hybridpar.data`` data set, a map-style one of (tensor, int), a ``Stream`` or any other
        iterable of such samples, or on ranks that read nothing its size (None: a stream without one). Training
        shuffles by ``seed`` (the job's by default), evaluation goes through all samples once, in order. ``mixup``
        and ``cutmix`` are alphas, see ``hybridpar.data.mixing``. Raises DataError where the data set does not fit,
        ConfigError where the loss does not mix.
        """
        seed = self.seed if seed is None else seed
        samples = self._samples(dataset)
        mixing = None
        if train and (mixup is not None or cutmix is not None):
            check_mixes(self._loss)
            if not self.chain.mixable:
                raise DataError("mixup and cutmix cannot mix the integers that the model takes; drop them")
            mixing = Mixing(seed, self.chain.in_shape, mixup, cutmix)
        order = order_of(samples, self.plan.global_batch, seed, train=train, drop_last=drop_last)
        mode: Mode = "train" if train else "evaluate"
        intervals = lambda count: self.program(mode, count).reads(self.place)  # noqa: E731 - two lines say no more
        on_gpu = self.device.type == "cuda"
        loader = StepLoader(samples, order, intervals, workers=workers, pin=on_gpu, mixing=mixing)
        return Feed(loader, order, mixing)

    def _samples(self, dataset: Samples | Any) -> Samples:
        if dataset is None or isinstance(dataset, int):
            return Elsewhere(dataset)
        if hasattr(dataset, "read"):
            return cast("Samples", dataset)
        chain = self.chain
        form = Form(chain.in_shape, chain.classes, self._loss.ignored, chain.label_shape, chain.inputs)
        return as_samples(dataset, form)

    def step(self, batch: GivenBatch, *, samples: int | None = None) -> float:
        """Train on one step's samples and return their mean loss, the same on every rank.

        ``batch`` is what ``loader`` gives; or (inputs, labels) of this rank's own samples in the order of
        ``program().reads(place)``; or (inputs, labels) of the whole step, of which the rank takes its own; or None
        on a rank that reads nothing. For the latter three ``samples`` tells a step that is smaller than the global
        batch, on every rank. Raises DataError where the batch does not fit, and ActionError, which names rank,
        stage, micro-batch and action, where the step fails.
        """
        if self.rate is not None:
            self._updater.set_rate(self.rate(self.steps))
        given = self._own(batch, "train", samples)
        run = partial(self._train, given)
        for watcher in self._watchers:
            run = partial(watcher, given, run)
        return run()

    def _train(self, batch: StepBatch) -> float:
        metrics = self._run(batch, "train")
        self.steps += 1
        self._next_sample = batch.first_sample + batch.samples
        return metrics.loss

    def evaluate(self, batches: Iterable[WholeBatch]) -> Evaluation:
        """Return loss and accuracy over ``batches``: of ``loader(..., train=False)``, or whole batches.

        With the average of the weights, if there is one. Ends with the first batch whose loss is not finite.

        Before, the running statistics of batch norms become the mean over the replicas, unless they are equal as
        they are synchronised. Raises as ``step`` does.
        """
        with self.averaged():
            return self._evaluated(batches)

    def predict(self, batch: StepBatch | Inputs | None, k: int = 5, *, samples: int | None = None) -> Best:
        """Return the k largest logits of every sample and their classes, on every rank, the largest first.

        ``batch`` is of ``loader(..., train=False)``, or the inputs of the whole batch or of this rank's own
        samples, or None on a rank that reads nothing; ``samples`` tells of a batch that is smaller than the global
        one. Every rank calls it. Shards exchange k logits with their classes per sample, never all of them; so a
        head may be larger than any device. With the average of the weights, if there is one, and the mean of
        running statistics, as ``evaluate``. Raises DataError where the batch or k does not fit, or the model does
        not give a row of logits per label.
        """
        if self.chain.out_shape != (*self.chain.label_shape, self.chain.classes):
            raise DataError(
                f"the model's output is {self.chain.out_shape} per sample, but a prediction takes the best of one "
                "row of logits, (classes,), or of one per token, (tokens, classes); run the exported model instead"
            )
        if not 1 <= k <= self.chain.classes:
            raise DataError(f"k: {k} of {self.chain.classes} classes; give a number from 1 to that of the classes")
        given = batch if batch is None or isinstance(batch, StepBatch) else self._reader.unlabelled(batch)
        own = self._own(given, "evaluate", samples)
        program = checked_program(self.plan, self.chain, own.samples, "predict", self.replica, k)
        with self.averaged():
            self._statistics.average()
            return Best(*self._executor.predict(program, self.steps, own.first_sample, own.inputs))

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """Let the model have the average of its weights, if there is one, within a ``with`` block.

        No step may run inside.
        """
        average = self._updater.average
        return contextlib.nullcontext() if average is None else average.in_place()

    def _evaluated(self, batches: Iterable[WholeBatch]) -> Evaluation:
        self._statistics.average()
        self._metrics.begin(self.device)
        totals = Totals()
        for batch in batches:
            whole = None if isinstance(batch, StepBatch) else len(batch[1])
            totals.add(self._run(self._own(batch, "evaluate", whole), "evaluate"))
            if not totals.finite:
                break  # on all ranks; ``origin`` is that of the last batch
        return totals.means(self._own_figures(totals.samples))

    def _own_figures(self, samples: int) -> dict[str, float]:
        """Sum the own metrics over all ranks; after the last program, so it stands in none."""
        total = self._metrics.total
        if total.numel() and self.plan.world > 1:
            size, ranks = total.numel() * total.element_size(), tuple(range(self.plan.replica_world))
            across = self.plan.replicas > 1
            operation = Operation(0, "all_reduce", "metrics", "control", ranks, size, across=across)
            self._communicators.all_reduce(operation, total).wait()
        return self._metrics.figures(samples)

    def _run(self, batch: StepBatch, mode: Mode) -> Metrics:
        program = self.program(mode, batch.samples)
        return self._executor.run(program, self.steps, batch.first_sample, *batch[:2], batch.share)

    def _own(self, batch: GivenBatch, mode: Mode, samples: int | None) -> StepBatch:
        """Return this rank's part of a batch."""
        if isinstance(batch, StepBatch):
            return batch
        count = samples or self.plan.global_batch
        reads = self.program(mode, count).reads(self.place)
        return self._reader.own(batch, reads, count, self._next_sample)
