"""The executor: runs one rank's actions of a program. It knows actions, not kinds of stage."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge

from hybridpar.errors import DataError, HybridparError
from hybridpar.model.keyed import Keys
from hybridpar.model.order import in_memory, ordered
from hybridpar.planning.compression import SUMS, WORKS
from hybridpar.planning.program import METRICS, Action, Operation, Program
from hybridpar.runtime.communicators import Communicators
from hybridpar.runtime.cross_entropy import CrossEntropy
from hybridpar.runtime.exchange import Exchange, lies_last
from hybridpar.runtime.line import Line
from hybridpar.runtime.lookup import Key, Lookups
from hybridpar.runtime.loss import Figures, Logits, Loss, Outcome, best_figures, best_of
from hybridpar.runtime.modules import BlockModules
from hybridpar.runtime.moments import Moments
from hybridpar.runtime.origin import Watch
from hybridpar.runtime.own_metric import OwnMetrics
from hybridpar.runtime.sampling import SampledHead
from hybridpar.runtime.step import Metrics, Started, StepState
from hybridpar.runtime.update import Updater

Observer = Callable[[Program, Action, float, float], None]
"""Called after every action with its start and end (``time.perf_counter`` seconds).

In the order of the program. What batch norms tell other ranks happens within a pass, but is reported as if it came
behind: the pass's own time is in one piece, as where a program is simulated."""


Scope = Callable[[Program, Action], contextlib.AbstractContextManager[object]]
"""Gives what an action runs within."""


class ActionError(RuntimeError):
    """An action failed; names rank, stage, micro-batch and action. The cause is chained."""


class Executor:
    """Runs programs of one plan on one rank.

    ``rank`` is its number in a plan replica, ``name`` what errors call it; ``blocks`` are its own, by block index.
    ``updater`` holds gradients and optimizers. After :meth:`run` all ranks have the same :class:`Metrics`.
    """

    def __init__(
        self,
        rank: int,
        blocks: dict[int, BlockModules],
        communicators: Communicators,
        updater: Updater,
        *,
        seed: int,
        dtype: torch.dtype,
        device: torch.device,
        name: str | None = None,
        watch: Watch | None = None,
        loss: Loss | None = None,
        own: OwnMetrics | None = None,
    ) -> None:
        self.loss = loss or CrossEntropy()
        self.own = own
        """Metrics of evaluations besides those of the program."""
        self.rank, self.name = rank, name or f"rank {rank}"
        self.blocks, self.communicators, self.updater = blocks, communicators, updater
        self.seed, self.dtype, self.device = seed, dtype, device
        self.observer: Observer | None = None
        self.scope: Scope | None = None
        self._meets = False
        """Whether the action is one that happens within a pass."""
        self._within: list[tuple[Action, float]] = []
        """Actions of the pass that runs, with their seconds, if there is an observer."""
        self.watch = watch or Watch(rank)
        """Where values left the finite numbers in the last step."""
        self._lookups = Lookups(rank)
        self._exchange = Exchange(rank, dtype, device)
        self._moments = Moments(rank, blocks, communicators, dtype, device)

    def run(
        self,
        program: Program,
        step: int,
        first_sample: int,
        inputs: torch.Tensor | None,
        labels: torch.Tensor | None,
        share: float | None = None,
    ) -> Metrics:
        """Run one step.

        ``inputs`` and ``labels``, (own samples, ...) each, belong to ``program.reads(rank)``, one interval after
        the other; None on ranks that read nothing. ``first_sample`` is the sample id of work number 0;
        ``share`` tells of inputs that are mixed with those of the samples before them. Raises ActionError if an
        action fails.
        """
        state = self._begin(program, step, inputs, labels)
        state.share = share
        self._go_through(state, first_sample)
        if program.mode == "train":
            self.updater.finish(state.norm)
        return Metrics(*state.metrics.tolist())

    def predict(
        self, program: Program, step: int, first_sample: int, inputs: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run a program that predicts; ``inputs`` and ``first_sample`` are those of ``run``.

        Returns, on every rank, the largest logits and their classes, (samples of the step, (tokens,) k) each.
        """
        state = self._begin(program, step, inputs, None)
        shape = (program.step_samples, *program.chain.label_shape, 2 * program.best)
        state.best = torch.zeros(shape, dtype=torch.float64, device=self.device)
        self._go_through(state, first_sample)
        values, classes = state.best.chunk(2, dim=-1)
        return values.to(self.dtype), classes.to(torch.int64)

    def _go_through(self, state: StepState, first_sample: int) -> None:
        program = state.program
        self._first_sample = first_sample
        with contextlib.nullcontext() if program.mode == "train" else torch.no_grad():
            while state.at < len(program.actions[self.rank]):
                self._next(state)

    def _next(self, state: StepState) -> None:
        """Run the next action, and those that happen within it."""
        program, number = state.program, state.at
        action = program.actions[self.rank][number]
        state.at += 1
        started = time.perf_counter() if self.observer else 0.0
        try:
            if self.scope is None:
                self._act(state, action)
            else:
                with self.scope(program, action):
                    self._act(state, action)
        except (HybridparError, ActionError):
            raise
        except Exception as e:
            raise ActionError(f"{self.name} failed in '{program.describe(action)}': {e}") from e
        if number in state.lookup.last_uses:
            self._free(state, number)
        if self.observer:
            self._observed(self.observer, program, action, started)

    def _begin(
        self, program: Program, step: int, inputs: torch.Tensor | None, labels: torch.Tensor | None
    ) -> StepState:
        for modules in self.blocks.values():
            modules.train(program.mode == "train")
        gathered = torch.zeros(program.step_samples, *program.chain.label_shape, dtype=torch.int64)
        if labels is not None and self._reports_labels(program):
            at = 0
            for start, stop in program.reads(self.rank):
                gathered[start:stop] = labels[at : at + stop - start]
                at += stop - start
        if labels is not None:
            self.loss.check(labels, program.chain.classes)
        self.watch.begin()
        if program.mode == "train":
            self.updater.begin()
        metrics = torch.zeros(len(METRICS), dtype=torch.float64, device=self.device)
        # From pinned memory the copy runs beside the CPU; from other memory torch waits for it.
        batch = None if inputs is None else inputs.to(self.device, non_blocking=True)
        if batch is not None and batch.is_floating_point():
            batch = batch.to(self.dtype)
        lookup = self._lookups.of(program)
        return StepState(program, lookup, step, batch, gathered.to(self.device), metrics)

    def _reports_labels(self, program: Program) -> bool:
        """Where all shards of a tail read the same samples, only the first one reports them."""
        first = program.positions[0]
        return not first.sharded or first.ranks[0] == self.rank

    def _observed(self, observer: Observer, program: Program, action: Action, started: float) -> None:
        """Report an action that is over, and then what happened within it."""
        ended = time.perf_counter()
        if self._meets:
            self._within.append((action, ended - started))
            return
        within, self._within = self._within, []
        at = ended - sum(seconds for _, seconds in within)
        observer(program, action, started, at)
        for met, seconds in within:
            observer(program, met, at, at + seconds)
            at += seconds

    def _act(self, state: StepState, action: Action) -> None:
        if action.operation is not None:
            operation = state.program.operations[action.operation]
            if action.kind == "start":
                self._start(state, operation)
            else:
                self._wait(state, operation)
        elif action.kind == "load":
            if state.batch is None:
                raise DataError(f"{self.name} reads samples of this step but got no batch")
        elif action.kind == "norm":
            state.norm = self.updater.squared_norm()
        elif action.kind == "update":
            self.updater.update(action.block or 0, state.norm)
        elif action.kind in WORKS:
            getattr(self.updater, action.kind)(action.block or 0)
        elif action.kind == "copy" and action.transfer is not None:
            self._exchange.copy(state, str(action.content), action.block or 0, action.transfer)
        else:
            key = (action.block or 0, action.micro_batch or 0)
            getattr(self, f"_{action.kind}")(state, key)

    # Computation

    def _forward(self, state: StepState, key: Key) -> None:
        block, micro_batch = key
        x = self._batch_slice(state, micro_batch) if block == 0 else state.inputs.pop(key)
        train = state.program.mode == "train"
        modules = self.blocks[block]
        described = modules.block
        if train and described.answers:
            x = x.detach().requires_grad_()
        if train and modules.head is not None and modules.head.standing is None:
            self._draw(state, modules.head)
        with torch.set_grad_enabled(graph := train and described.backward and not described.recompute):
            line = self._line(state, modules)
            y = modules(x, keys := self._keys(state, key) if train and modules.draws else None, line)
        met, numbers = [] if line is None else line.take(), state.program.numbers(*key, self.rank)
        self.watch.see(state.program, modules, micro_batch, numbers, (x, y), keys, self._line(state, modules, met))
        if train and described.backward and described.recompute:
            state.met[key] = met
        if train and described.backward:
            state.saved[key] = x, get_gradient_edge(y) if graph and y.requires_grad else None
        state.outputs[key] = y.detach()

    def _draw(self, state: StepState, head: SampledHead) -> None:
        """Choose the classes of a step's head; all labels of the step are known."""
        share, labels = state.program.plan.recipe.sampling, state.labels
        assert share is not None
        head.draw(self.seed, state.number, share, labels[labels != self.loss.ignored])

    def _recompute(self, state: StepState, key: Key, x: torch.Tensor) -> GradientEdge | None:
        """Run a forward again, now for its graph."""
        modules = self.blocks[key[0]]
        line = self._line(state, modules, state.met.pop(key))
        y = modules.again(x, self._keys(state, key) if modules.draws else None, line)
        return get_gradient_edge(y) if y.requires_grad else None

    def _line(
        self, state: StepState, modules: BlockModules, told: list[torch.Tensor] | None = None
    ) -> Line | None:
        """Return how a block's batch norms meet those of other ranks in a forward, if they do."""
        position = state.program.positions[modules.block.position]
        if state.program.mode == "train" and modules.norms and position.meets:
            return Line(lambda own: self._meet(state, own), told)
        return None

    def _meet(self, state: StepState, own: torch.Tensor) -> torch.Tensor:
        """Run the operation that stands next in the program, within a pass, for a batch norm."""
        action = state.program.actions[self.rank][state.at]
        if action.content != "moments" or state.program.operations[action.operation or 0].bytes != own.nbytes:
            raise RuntimeError(
                f"a batch norm has {own.nbytes} bytes for other ranks where the program goes on with "
                f"'{state.program.describe(action)}': the layer runs otherwise than when it was traced"
            )
        state.given, self._meets = own, True
        self._next(state)
        self._next(state)
        met, state.given, self._meets = state.given, None, False
        return met

    def _keys(self, state: StepState, key: Key) -> Keys:
        start, stop = (self._first_sample + n for n in state.program.numbers(*key, self.rank))
        return Keys(self.seed, state.number, torch.arange(start, stop, device=self.device))

    def _batch_slice(self, state: StepState, micro_batch: int) -> torch.Tensor:
        assert state.batch is not None
        start, stop = state.program.interval(0, micro_batch, self.rank)
        first = state.lookup.first_rows[micro_batch]
        rows = state.batch[first : first + stop - start]
        if not state.program.blocks[0].spans:
            return rows
        start, stop = self._exchange.features(state, 0, "in")
        return rows.narrow(1 + state.program.chain.axes[0], start, stop - start)

    def _score(self, state: StepState, key: Key) -> None:
        logits = self._logits(state, key, state.outputs[key])
        if state.program.mode == "predict":
            state.figures[key] = [best_figures(logits.rows, state.program.best)]
        else:
            state.figures[key] = [self.loss.score(logits, train=state.program.mode == "train")]

    def _loss(self, state: StepState, key: Key) -> None:
        logits, figures = self._logits(state, key, state.outputs.pop(key)), state.figures.pop(key)
        if state.best is not None:
            self._choose(state, key, logits, figures)
            return
        weight = self.loss.weight(state.labels)  # all of them are known before the first loss of a step
        if self.own is not None and state.program.mode == "evaluate" and self._reports(state):
            self.own.add(logits, figures, self.loss.ignored)
        outcome = self.loss.combine(logits, figures, weight, train=state.program.mode == "train")
        if outcome.gradient is not None:
            state.gradients[key] = self.updater.scaled(outcome.gradient).view_as(logits.values)
        self._report(state, outcome)

    def _choose(self, state: StepState, key: Key, logits: Logits, figures: Figures) -> None:
        """Put the best classes of a micro-batch into those of the step, once per sample."""
        if state.best is not None and self._reports(state):
            values, classes = best_of(logits.rows, figures, state.program.best)
            place = state.best[slice(*state.program.numbers(*key, self.rank))]
            place.copy_(torch.cat([values.double(), classes.double()], dim=1).view_as(place))

    def _logits(self, state: StepState, key: Key, values: torch.Tensor) -> Logits:
        """Return this rank's logits of a micro-batch with their labels and classes."""
        start, stop = state.program.numbers(*key, self.rank)
        labels, others = state.labels[start:stop], None
        if state.share is not None:
            others = torch.cat([state.labels[start - 1 : start] if start else state.labels[-1:], labels[:-1]])
        first = self._exchange.features(state, key[0], "out")[0]
        whole = not state.program.positions[-1].sharded
        classes, share = state.program.chain.classes, 1.0 if state.share is None else state.share
        head = self.blocks[key[0]].head if state.program.mode == "train" else None
        sampled = None if head is None else head.classes
        return Logits(values, labels, first, classes, whole, others, share, sampled=sampled)

    def _report(self, state: StepState, outcome: Outcome) -> None:
        """Add to the metrics, once per sample."""
        if self._reports(state):
            o = outcome
            state.metrics += torch.stack([o.loss_sum, o.weight, o.samples, o.top1, o.top5])

    def _reports(self, state: StepState) -> bool:
        """Whether this rank's logits count: of all shards only the first one reports."""
        last = state.program.positions[-1]
        return not last.sharded or last.ranks[0] == self.rank

    def _backward(self, state: StepState, key: Key) -> None:
        x, edge = state.saved.pop(key)
        gradient = state.gradients.pop(key)
        if self.blocks[key[0]].block.recompute:
            edge = self._recompute(state, key, x)
        self.updater.open(key[0])
        if edge is not None:
            torch.autograd.backward((edge,), (gradient,))
        if self.blocks[key[0]].block.answers:
            assert x.grad is not None
            last = lies_last(state, key[0] - 1)
            state.input_gradients[key] = ordered(x.grad, last=last)

    # Operations

    def _start(self, state: StepState, operation: Operation) -> None:
        if operation.kind == "send":
            self._start_transfer(state, operation)
        elif operation.content == "moments":
            state.pending[operation.index] = self._moments.start(state, operation)
        elif operation.kind == "all_gather":
            key = (operation.block or 0, operation.micro_batch or 0)
            own = state.figures[key][0]
            outputs = [torch.empty_like(own) for _ in operation.ranks]
            pending = self.communicators.all_gather(operation, outputs, own)
            state.figures[key] = outputs
            state.pending[operation.index] = Started(pending, own)
        elif operation.kind == "sharded_update":
            self.updater.sharded_update(operation.block or 0, state.norm)
        elif operation.kind == "reduce_scatter":
            scatter = state.scatters[operation.index] = self.updater.scatter(operation.block or 0)
            pending = self.communicators.reduce_scatter(operation, scatter.messages)
            state.pending[operation.index] = Started(pending, scatter.flat)
        else:
            tensor = self._shared(state, operation)
            last = operation.content == "sum" and lies_last(state, operation.block or 0)
            gives = operation.kind == "broadcast"
            begin = self.communicators.broadcast if gives else self.communicators.all_reduce
            pending = begin(operation, in_memory(tensor, last=last))
            state.pending[operation.index] = Started(pending, tensor)

    def _start_transfer(self, state: StepState, operation: Operation) -> None:
        transfer, block = operation.transfer, operation.block or 0
        assert transfer is not None
        in_place = True
        if operation.ranks[0] == self.rank:
            tensor = self._exchange.source(state, operation.content, block, transfer).contiguous()
            pending = self.communicators.send(operation, tensor)
        else:
            tensor = self._exchange.target(state, operation.content, block, transfer)
            in_place = tensor.is_contiguous() and not transfer.add
            if not in_place:
                tensor = torch.empty_like(tensor, memory_format=torch.contiguous_format)
            pending = self.communicators.receive(operation, tensor)
        state.pending[operation.index] = Started(pending, tensor, in_place)

    def _shared(self, state: StepState, operation: Operation) -> torch.Tensor:
        """Return the tensor that an all-reduce sums in place, or a broadcast fills."""
        block = operation.block or 0
        if operation.content == "label":
            return state.labels
        if operation.content == "metrics":
            return state.metrics
        if operation.content == "best":
            assert state.best is not None
            return state.best
        if operation.content == "norm":
            assert state.norm is not None
            return state.norm
        if operation.content in SUMS:
            return self.updater.summed(block, operation.content)
        key = (block + 1 if operation.backward else block, operation.micro_batch or 0)
        return (state.input_gradients if operation.backward else state.outputs)[key]

    def _wait(self, state: StepState, operation: Operation) -> None:
        if operation.kind == "sharded_update":
            return
        pending, tensor, in_place = state.pending.pop(operation.index)
        pending.wait()
        block, micro_batch = operation.block or 0, operation.micro_batch or 0
        if operation.content == "moments":
            self._moments.end(state, operation, tensor)
        elif operation.kind == "reduce_scatter":
            state.scatters.pop(operation.index).add()
        elif operation.content == "sum" and operation.backward:
            state.gradients[block, micro_batch] = tensor
        elif operation.content == "sum":
            state.inputs[block + 1, micro_batch] = tensor
        elif operation.transfer is not None and not in_place:
            self._exchange.place(state, operation.content, block, operation.transfer, tensor)

    def _free(self, state: StepState, number: int) -> None:
        for kind, key in state.lookup.last_uses[number]:
            (state.outputs if kind == "activation" else state.input_gradients).pop(key, None)
