"""Compilation: a plan and a number of samples become a program."""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Callable
from functools import lru_cache

from hybridpar.model.chain import Chain
from hybridpar.planning.blocks import Block, Position, blocks, positions
from hybridpar.planning.boundary import boundaries
from hybridpar.planning.layout import Interval, Transfer, length
from hybridpar.planning.order import Flow, Task
from hybridpar.planning.order import sequence as task_sequence
from hybridpar.planning.plan import Plan
from hybridpar.planning.program import (
    METRICS,
    STATISTICS,
    Action,
    Content,
    Mode,
    Operation,
    OperationKind,
    Program,
)

LABEL_BYTES = NORM_BYTES = METRIC_BYTES = 8
SEND_LAG = 2
"""A send is waited for after this many further computations of its rank: late enough to overlap, early enough to
free its buffer."""


@lru_cache(maxsize=64)
def compile(plan: Plan, chain: Chain, samples: int, mode: Mode) -> Program:  # noqa: A001
    """Return the program of one step of ``samples`` samples.

    ``samples`` may be below the plan's global batch (a last partial batch). Pure and cached.

    Raises:
        PlanError: an in-flight cap of the plan is too low.

    """
    return _Compiler(plan, chain, samples, mode).program()


class _Compiler:
    """Walks the global sequence once and hands every rank its actions."""

    def __init__(self, plan: Plan, chain: Chain, samples: int, mode: Mode) -> None:
        self.plan, self.chain, self.samples, self.mode = plan, chain, samples, mode
        self.positions, self.blocks = positions(plan), blocks(plan, chain)
        self.train = mode == "train"
        self.operations: list[Operation] = []
        self.emitted: list[tuple[int, Action]] = []
        """All actions with their ranks."""
        self.world = tuple(range(plan.world))
        self.shared: dict[str, Operation] = {}
        self.starts: list[Action] = []
        self.waits: list[Action] = []
        """By operation, as every participant has it."""
        self.unsent: list[deque[list[int]]] = [deque([[]]) for _ in range(plan.world)]
        self.arriving: dict[tuple[str, int, int, int], list[int]] = defaultdict(list)
        self.unwaited: list[dict[int, None]] = [{} for _ in range(plan.world)]
        self.boundaries = boundaries(self.positions, self.blocks, chain, samples)
        self.trailing = [math.prod(b.shape(chain, "out")[1:]) * plan.itemsize for b in self.blocks]
        """Bytes per sample and feature of every block's output."""
        self.leaving: dict[tuple[Content, int, int, int], list[Transfer]] = defaultdict(list)
        for i, boundary in enumerate(self.boundaries):
            for t in boundary.activation:
                self.leaving["activation", i, t.source_micro_batch, t.source].append(t)
            for t in boundary.gradient:
                self.leaving["gradient", i, t.source_micro_batch, t.source].append(t)

    def program(self) -> Program:
        """Emit the whole step."""
        flow = Flow(
            self.plan.order,
            self.samples,
            self.positions,
            self.blocks,
            self.boundaries,
            self.train,
            self.train and self.plan.recipe.clipping,
            self.samples < self.plan.global_batch,
        )
        tasks = task_sequence(flow)
        self._count(tasks)
        self._open()
        for task in tasks:
            getattr(self, f"_{task.kind}")(task)
            if task.kind in {"forward", "backward"}:
                for rank in task.ranks:
                    self._settle_sends(rank)
        self._close()
        actions, sequence = self._arranged()
        return Program(
            self.plan,
            self.chain,
            self.samples,
            self.mode,
            self.positions,
            self.blocks,
            tuple(self.operations),
            actions,
            communicators(self.plan),
            sequence,
        )

    def _count(self, tasks: tuple[Task, ...]) -> None:
        """Count each rank's backward calls per block, and its losses."""
        self.backwards: dict[tuple[int, int], int] = defaultdict(int)
        self.losses: dict[int, int] = defaultdict(int)
        for task in tasks:
            for rank in task.ranks:
                if task.kind == "backward":
                    self.backwards[task.block, rank] += 1
                elif task.kind == "loss":
                    self.losses[rank] += 1

    # Beginning and end of a step

    def _open(self) -> None:
        """Readers load; all labels of the step are gathered; ranks without a loss report at once."""
        first = self.positions[0]
        for rank, own in zip(first.ranks, zip(*first.micro_batches(self.samples), strict=True), strict=True):
            if any(length(interval) > 0 for interval in own):
                self._act(rank, Action("load"))
        self.labels = self._operation("all_reduce", "label", "control", self.world, LABEL_BYTES * self.samples)
        for rank in self.world:
            self._start(rank, self.labels)
        for rank in self.world:
            if not self.losses[rank]:
                self._report(rank)
        if self.train:
            self._join_reductions()

    def _join_reductions(self) -> None:
        """Start the reductions of replicas without samples, which would otherwise keep the others waiting."""
        for block in reversed(self.blocks):
            for rank in self.positions[block.position].ranks:
                if not self.backwards[block.index, rank]:
                    self._reduce(rank, block)

    def _close(self) -> None:
        for rank in self.world:
            for operation in list(self.unwaited[rank]):
                self._wait(rank, operation)

    def _report(self, rank: int) -> None:
        size = METRIC_BYTES * len(METRICS)
        self._start(
            rank,
            self._once("metrics", lambda: self._operation("all_reduce", "metrics", "control", self.world, size)),
        )

    # One method per kind of task

    def _forward(self, task: Task) -> None:
        for rank in task.ranks:
            self._await(rank, "activation", task.block - 1, task.micro_batch)
            self._act(rank, Action("forward", task.block, task.micro_batch))
        if task.block < len(self.blocks) - 1:
            self._deliver("activation", task.block, task)
            return
        for rank in task.ranks:
            self._wait_once(rank, self.labels.index)
            self._act(rank, Action("score", task.block, task.micro_batch))
        if self.positions[-1].sharded:
            interval = self.positions[-1].micro_batches(self.samples)[task.micro_batch][0]
            size = STATISTICS[self.mode] * self.plan.itemsize * length(interval)
            self._gather_statistics(task, size)

    def _gather_statistics(self, task: Task, size: int) -> None:
        gather = self._operation(
            "all_gather", "statistics", "tail", task.ranks, size, task.block, task.micro_batch
        )
        for rank in task.ranks:
            self._start(rank, gather)
            self.arriving["statistics", task.block, task.micro_batch, rank].append(gather.index)

    def _loss(self, task: Task) -> None:
        for rank in task.ranks:
            self._await(rank, "statistics", task.block, task.micro_batch)
            self._act(rank, Action("loss", task.block, task.micro_batch))
            self.losses[rank] -= 1
            if not self.losses[rank]:
                self._report(rank)

    def _backward(self, task: Task) -> None:
        for rank in task.ranks:
            self._await(rank, "gradient", task.block, task.micro_batch)
            self._act(rank, Action("backward", task.block, task.micro_batch))
        if task.block > 0:
            self._deliver("gradient", task.block - 1, task)
        for rank in task.ranks:
            self.backwards[task.block, rank] -= 1
            if not self.backwards[task.block, rank]:
                self._reduce(rank, self.blocks[task.block])

    def _norm(self, task: Task) -> None:
        (rank,) = task.ranks
        for position in self.positions:
            if rank in position.ranks:
                self._await_gradients(rank, position)
        self._act(rank, Action("norm"))
        norm = self._once("norm", lambda: self._operation("all_reduce", "norm", "control", self.world, NORM_BYTES))
        self._start(rank, norm)

    def _update(self, task: Task) -> None:
        (rank,), position = task.ranks, self.positions[task.block]
        self._await_gradients(rank, position)
        if self.plan.recipe.clipping:
            self._wait_once(rank, self.shared["norm"].index)
        if not is_zero(self.plan, position):
            self._act(rank, Action("update", position.index))
            return
        size = self.plan.itemsize * parameter_count(self.chain, position.layers)
        group = f"gradients:{position.name}"
        zero = self._once(
            f"zero {position.name}",
            lambda: self._operation("sharded_update", "zero", group, position.ranks, size, position.index),
        )
        self._start(rank, zero)
        self._wait(rank, zero.index)

    # Gradients of replicated parameters

    def _reduce(self, rank: int, block: Block) -> None:
        """Start the sum of a block's gradients over the replicas, once per rank."""
        position = self.positions[block.position]
        count = bucket_count(self.chain, position, block)
        if not position.replicated or not count or is_zero(self.plan, position):
            return
        bucket = self._once(
            f"bucket {block.index}",
            lambda: self._operation(
                "all_reduce",
                "bucket",
                f"gradients:{position.name}",
                position.ranks,
                count * self.plan.itemsize,
                block.index,
            ),
        )
        self._start(rank, bucket)
        self.arriving["bucket", position.index, 0, rank].append(bucket.index)

    def _await_gradients(self, rank: int, position: Position) -> None:
        """Wait for the reduced gradients."""
        self._await(rank, "bucket", position.index, 0)

    # Communication

    def _deliver(self, content: Content, boundary: int, task: Task) -> None:
        """Send what a forward or backward of ``task`` produced over a boundary between blocks."""
        backward = content == "gradient"
        if self.boundaries[boundary].summed(content):
            rank = task.ranks[0]
            size = sum(self._bytes(boundary, t) for t in self.leaving[content, boundary, task.micro_batch, rank])
            size //= len(task.ranks)
            total = self._operation(
                "all_reduce", "sum", "tail", task.ranks, size, boundary, task.micro_batch, backward=backward
            )
            for rank in task.ranks:
                self._start(rank, total)
                self.arriving[content, boundary, task.micro_batch, rank].append(total.index)
            return
        for rank in task.ranks:
            for t in self.leaving[content, boundary, task.micro_batch, rank]:
                self._pass_on(content, boundary, t, self._bytes(boundary, t))

    def _bytes(self, boundary: int, t: Transfer) -> int:
        """Bytes of a transfer of activations or gradients over a boundary."""
        return length(t.samples) * length(t.features) * self.trailing[boundary]

    def _pass_on(self, content: Content, boundary: int, t: Transfer, size: int) -> None:
        if t.source == t.target:
            self._act(t.source, Action("copy", boundary, t.target_micro_batch, content=content, transfer=t))
            return
        way = "up" if t.source < t.target else "down"
        communicator = f"{'backward' if content == 'gradient' else 'forward'}.{way}"
        send = self._operation(
            "send", content, communicator, (t.source, t.target), size, boundary, t.target_micro_batch, t
        )
        for rank in send.ranks:
            self._start(rank, send)
        self.unsent[t.source][-1].append(send.index)
        self.arriving[content, boundary, t.target_micro_batch, t.target].append(send.index)

    def _operation(
        self,
        kind: OperationKind,
        content: Content,
        communicator: str,
        ranks: tuple[int, ...],
        size: int,
        block: int | None = None,
        micro_batch: int | None = None,
        transfer: Transfer | None = None,
        *,
        backward: bool = False,
    ) -> Operation:
        index = len(self.operations)
        made = Operation(index, kind, content, communicator, ranks, size, block, micro_batch, transfer, backward)
        self.operations.append(made)
        self.starts.append(Action("start", operation=index, content=content))
        self.waits.append(Action("wait", operation=index, content=content))
        return made

    def _once(self, name: str, make: Callable[[], Operation]) -> Operation:
        if name not in self.shared:
            self.shared[name] = make()
        return self.shared[name]

    # Actions

    def _act(self, rank: int, action: Action) -> None:
        self.emitted.append((rank, action))

    def _start(self, rank: int, operation: Operation) -> None:
        """Start an operation and owe its wait; what one rank has for itself needs neither."""
        if len(operation.ranks) == 1:
            return
        self.unwaited[rank][operation.index] = None
        self.emitted.append((rank, self.starts[operation.index]))

    def _wait(self, rank: int, operation: int) -> None:
        del self.unwaited[rank][operation]
        self.emitted.append((rank, self.waits[operation]))

    def _wait_once(self, rank: int, operation: int) -> None:
        if operation in self.unwaited[rank]:
            self._wait(rank, operation)

    def _await(self, rank: int, content: Content, block: int, micro_batch: int) -> None:
        unwaited = self.unwaited[rank]
        for operation in self.arriving.pop((content, block, micro_batch, rank), ()):
            if operation in unwaited:
                self._wait(rank, operation)

    def _arranged(self) -> tuple[tuple[tuple[Action, ...], ...], tuple[int, ...]]:
        """Return every rank's actions, and the ranks of all actions in one order that none of them waits against.

        Every receive starts before the computation that precedes it, so that the data can flow meanwhile. All
        receives move by one computation, so their order per communicator stays.
        """
        actions: list[list[Action]] = [[] for _ in self.world]
        numbers: list[tuple[int, int]] = []
        since_last: list[list[Action]] = [[] for _ in self.world]
        since: list[list[int]] = [[] for _ in self.world]

        def settle(rank: int) -> None:
            actions[rank] += since_last[rank]
            numbers.extend((n, rank) for n in since[rank])
            since_last[rank], since[rank] = [], []

        for number, (rank, action) in enumerate(self.emitted):
            if action.kind == "start" and action.operation is not None:
                operation = self.operations[action.operation]
                if operation.kind == "send" and operation.ranks[1] == rank:
                    actions[rank].append(action)
                    numbers.append((since[rank][0] if since[rank] else number, rank))
                    continue
            if action.kind in {"forward", "backward"}:
                settle(rank)
            since_last[rank].append(action)
            since[rank].append(number)
        for rank in self.world:
            settle(rank)
        return tuple(map(tuple, actions)), tuple(rank for _, rank in sorted(numbers))

    def _settle_sends(self, rank: int) -> None:
        self.unsent[rank].append([])
        if len(self.unsent[rank]) > SEND_LAG:
            for operation in self.unsent[rank].popleft():
                self._wait_once(rank, operation)


def is_zero(plan: Plan, position: Position) -> bool:
    """Whether DeepSpeed shards the optimizer state of this position."""
    return plan.recipe.sharding == "zero1" and position.kind == "front" and position.replicated


@lru_cache(maxsize=4096)
def parameter_count(chain: Chain, layers: Interval) -> int:
    """Return the number of distinct parameter elements in a run of layers."""
    own = {p.name: p.count for layer in chain.layers[layers[0] : layers[1]] for p in layer.parameters}
    return sum(own.values())


def bucket_count(chain: Chain, position: Position, block: Block) -> int:
    """Return the number of gradient elements that a block's bucket holds.

    A parameter that several layers share belongs to the first of them, whose backward completes its gradient.
    """
    first = position.layers[0]
    before, after = (first, block.layers[0]), (first, block.layers[1])
    return parameter_count(chain, after) - parameter_count(chain, before)


def communicators(plan: Plan) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Return name and members of every communicator of a plan, in the order in which all ranks create them.

    Exchanges have one communicator per pass and way (to a higher or a lower rank), so that between two ranks each
    carries messages one way only and their order is the program's.
    """
    world = tuple(range(plan.world))
    ways = [(f"{direction}.{way}", world) for direction in ("forward", "backward") for way in ("up", "down")]
    result = [("control", world), *ways]
    for position in positions(plan):
        if position.sharded:
            result.append(("tail", position.ranks))
        elif position.replicated:
            result.append((f"gradients:{position.name}", position.ranks))
    return tuple(result)
