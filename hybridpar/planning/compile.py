"""Compilation: a plan and a number of samples become a program."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable
from functools import lru_cache

from hybridpar.model.chain import Chain
from hybridpar.planning.blocks import Block, Position, blocks, positions
from hybridpar.planning.boundary import boundaries
from hybridpar.planning.communicators import communicators
from hybridpar.planning.compression import SUMS
from hybridpar.planning.layout import Transfer, length
from hybridpar.planning.moments import calls, meets
from hybridpar.planning.order import Flow, Task
from hybridpar.planning.order import sequence as task_sequence
from hybridpar.planning.parameters import bucket_elements, parameter_count, reduction_of
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
from hybridpar.planning.zero import calls_until, is_zero, keeps_no_bucket, part_elements, rounds

LABEL_BYTES = NORM_BYTES = METRIC_BYTES = BEST_BYTES = 8
SEND_LAG = 2
"""A send is waited for after this many further computations of its rank: late enough to overlap, early enough to
free its buffer."""

BUCKETS_IN_FLIGHT = 2
"""So many reductions of whole gradients that do not stay may overlap with backwards: likewise."""
OTHER, PASSES, RECEIVES = range(3)
"""What the arrangement of a rank's actions goes by: forwards and backwards, and starts of receives."""
WAYS = {
    (content, up): f"{way}.{'up' if up else 'down'}"
    for content, way in (("activation", "forward"), ("gradient", "backward"))
    for up in (True, False)
}
"""Communicators of sends."""


@lru_cache(maxsize=64)
def compile(  # noqa: A001
    plan: Plan, chain: Chain, samples: int, mode: Mode, replica: int | None = None, best: int = 0
) -> Program:
    """Return the program of one step of ``samples`` samples, of all plan replicas, for one of them.

    ``samples`` may be below the plan's global batch (a last partial batch). ``replica`` is by default the one with
    the most samples. ``best`` is the number of classes that a prediction gives per label. Pure and cached.

    Raises:
        PlanError: an in-flight cap of the plan is too low.

    """
    if replica is None:
        shares = [length(interval) for interval in plan.replica_samples(samples)]
        replica = shares.index(max(shares))
    return _Compiler(plan, chain, samples, mode, replica, best).program()


class _Compiler:
    """Walks the global sequence once and hands every rank its actions."""

    def __init__(self, plan: Plan, chain: Chain, samples: int, mode: Mode, replica: int, best: int) -> None:
        self.plan, self.chain, self.mode, self.best = plan, chain, mode, best
        self.replica, self.step_samples = replica, samples
        self.first, stop = plan.replica_samples(samples)[replica]
        samples = self.samples = stop - self.first
        self.positions, self.blocks = positions(plan), blocks(plan, chain)
        self.chunks = [p.micro_batches(samples) for p in self.positions]
        self.train = mode == "train"
        self.operations: list[Operation] = []
        self.emitted: list[tuple[int, Action, int]] = []
        """All actions with their ranks, and whether they are receives or passes."""
        self.world = tuple(range(plan.replica_world))
        self.across = plan.replicas > 1
        self.shared: dict[str, Operation] = {}
        self.starts: list[Action] = []
        self.waits: list[Action] = []
        """By operation, as every participant has it."""
        self.unsent: list[deque[list[int]]] = [deque([[]]) for _ in self.world]
        self.arriving: dict[tuple[str, int, int, int], list[int]] = defaultdict(list)
        self.unwaited: list[dict[int, None]] = [{} for _ in self.world]
        self.unfactored: dict[int, list[tuple[int, Block]]] = defaultdict(list)
        """By position, compressed gradients whose left factors are being summed."""
        self.reducing: dict[tuple[int, int], list[Block]] = defaultdict(list)
        """By position and rank, blocks whose gradients are being summed."""
        self.rounds = [rounds(plan, p, samples) for p in self.positions]
        """How often each position reduces its gradients."""
        self.started: dict[int, int] = defaultdict(int)
        """By operation that is waited for as soon as all have started it: how many have."""
        self.scattering: list[list[int]] = [[] for _ in self.world]
        """Such operations that a rank has started and not waited for."""
        self.boundaries = boundaries(self.positions, self.blocks, chain, samples)
        self.trailing = [b.trailing(chain, "out") * b.out_itemsize(chain, plan.itemsize) for b in self.blocks]
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
            self.plan.order if self.samples else "fill_drain",  # without samples there is nothing to cap
            self.samples,
            self.positions,
            self.blocks,
            self.boundaries,
            self.train,
            self.train and self.plan.recipe.normed,
            frozenset(b.index for b in self.blocks if self.train and meets(self._home(b), b, self.chain)),
            self.samples < self.plan.replica_batch,
            frozenset(p.index for p in self.positions if self.rounds[p.index] > 1),
        )
        tasks = task_sequence(flow)
        self._count(tasks)
        self._open()
        for task in tasks:
            getattr(self, f"_{task.kind}")(task)
            if task.kind in {"forward", "backward"}:
                for rank in self._working(task):
                    self._settle_sends(rank)
                    self._settle_reductions(rank)
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
            self.replica,
            self.step_samples,
            self.first,
            self.best,
        )

    def _count(self, tasks: tuple[Task, ...]) -> None:
        """Count each rank's backward calls per block, and its losses."""
        self.backwards: dict[tuple[int, int], int] = defaultdict(int)
        self.done: dict[tuple[int, int], int] = defaultdict(int)
        """Backward calls so far."""
        self.losses: dict[int, int] = defaultdict(int)
        for task in tasks:
            if task.kind == "backward":
                for rank in self._working(task):
                    self.backwards[task.block, rank] += 1
            elif task.kind == "loss":
                for rank in task.ranks:
                    self.losses[rank] += 1

    def _home(self, block: Block) -> Position:
        return self.positions[block.position]

    def _working(self, task: Task) -> list[int]:
        """Return the ranks that have samples in a pass; of replicas that run it together some may have none."""
        position = self._home(self.blocks[task.block])
        intervals = self.chunks[position.index][task.micro_batch]
        return [rank for rank in task.ranks if length(intervals[position.ranks.index(rank)]) > 0]

    # Beginning and end of a step

    def _open(self) -> None:
        """Readers load; all labels of the step are gathered; ranks without a loss report at once."""
        first, intervals = self.positions[0], self.positions[0].micro_batches(self.samples)
        for index, rank in enumerate(first.ranks):
            if any(length(chunk[index]) > 0 for chunk in intervals):
                self._act(rank, Action("load"))
        if self.mode != "predict":
            labels = self._control("label", LABEL_BYTES * self.step_samples * self.chain.labels)
            for rank in self.world:
                self._start(rank, labels)
        for rank in self.world:
            if not self.losses[rank]:
                self._report(rank)
        if self.train:
            self._join_reductions()
            if not self.samples:
                self._join_norms()

    def _join_reductions(self) -> None:
        """Start the reductions of replicas without samples, which would otherwise keep the others waiting."""
        for block in reversed(self.blocks):
            for rank in self.positions[block.position].ranks:
                if not self.backwards[block.index, rank]:
                    for number in range(self.rounds[block.position]):
                        self._reduce(rank, block, number)

    def _join_norms(self) -> None:
        """Take part in what batch norms tell each other in plan replicas that do have samples."""
        for backward, order in ((False, self.blocks), (True, self.blocks[::-1])):
            for block in order:
                if self._home(block).joint:
                    self._meet(block, 0, backward=backward)

    def _close(self) -> None:
        if self.train:
            self._update_parts()
        for rank in self.world:
            for operation in list(self.unwaited[rank]):
                self._wait(rank, operation)

    def _report(self, rank: int) -> None:
        if self.mode == "predict":
            size = 2 * self.best * BEST_BYTES * self.step_samples * self.chain.labels
            self._start(rank, self._control("best", size))
        else:
            self._start(rank, self._control("metrics", METRIC_BYTES * len(METRICS)))

    def _control(self, content: Content, size: int) -> Operation:
        """Return the one operation of its kind in a step, between all ranks."""
        return self._once(
            content,
            lambda: self._operation("all_reduce", content, "control", self.world, size, across=self.across),
        )

    # One method per kind of task

    def _forward(self, task: Task) -> None:
        working = self._working(task)
        for rank in working:
            self._await(rank, "activation", task.block - 1, task.micro_batch)
            self._act(rank, Action("forward", task.block, task.micro_batch))
        if self.train:
            self._meet(self.blocks[task.block], task.micro_batch, backward=False)
        if task.block < len(self.blocks) - 1:
            self._deliver("activation", task.block, task)
            return
        for rank in working:
            if self.mode != "predict":
                self._wait_once(rank, self.shared["label"].index)
            self._act(rank, Action("score", task.block, task.micro_batch))
        if self.positions[-1].sharded:
            interval = self.positions[-1].micro_batches(self.samples)[task.micro_batch][0]
            figures = STATISTICS[self.mode] + 2 * self.best
            size = figures * self.plan.itemsize * length(interval) * self.chain.labels
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
        working = self._working(task)
        for rank in working:
            self._await(rank, "gradient", task.block, task.micro_batch)
            self._act(rank, Action("backward", task.block, task.micro_batch))
        self._meet(self.blocks[task.block], task.micro_batch, backward=True)
        if self.blocks[task.block].answers:
            self._deliver("gradient", task.block - 1, task)
        block = self.blocks[task.block]
        count = self.rounds[block.position]
        for rank in working:
            key = task.block, rank
            self.done[key] += 1
            number = self.done[key] * count // self.backwards[key] - 1
            if number >= 0 and calls_until(self.backwards[key], count, number) == self.done[key]:
                self._reduce(rank, block, number)

    def _meet(self, block: Block, micro_batch: int, *, backward: bool) -> None:
        """Let batch norms meet within a pass that was just put into the program."""
        position = self._home(block)
        for call in calls(position, block, self.chain, backward=backward):
            met = self._operation(
                "all_reduce" if backward else "all_gather",
                "moments",
                position.moments,
                position.ranks,
                call.norm.figures * self.plan.itemsize,
                block.index,
                micro_batch,
                backward=backward,
                across=position.joint,
                norm=call.number,
            )
            for rank in position.ranks:
                self._start(rank, met)
            for rank in position.ranks:
                self._wait_once(rank, met.index)

    def _norm(self, task: Task) -> None:
        (rank,) = task.ranks
        for position in self.positions:
            if rank in position.ranks:
                self._await_gradients(rank, position)
        self._act(rank, Action("norm"))
        self._start(rank, self._control("norm", NORM_BYTES))

    def _update(self, task: Task) -> None:
        (rank,), position = task.ranks, self.positions[task.block]
        if self._has_parts(position):
            return
        self._await_gradients(rank, position)
        if self.plan.recipe.normed:
            self._wait_once(rank, self.shared["norm"].index)
        self._act(rank, Action("update", position.index))

    def _has_parts(self, position: Position) -> bool:
        trained = parameter_count(self.chain, position.layers, trained=True)
        return is_zero(self.plan, position) and trained > 0

    def _update_parts(self) -> None:
        """Update sharded state when all else is done: a rank does nothing beside the update and its gathering."""
        for position in reversed(self.positions):
            if not self._has_parts(position):
                continue
            size = part_elements(self.plan, self.chain, position) * self.plan.itemsize
            group, index = position.gradients(position.ranks[0]), position.index
            update = self._operation(
                "sharded_update", "zero", group, position.ranks, size, index, across=self.across
            )
            for rank in position.ranks:
                self._await_gradients(rank, position)
                if self.plan.recipe.normed:
                    self._wait_once(rank, self.shared["norm"].index)
                self._start(rank, update)
            for rank in position.ranks:
                self._wait(rank, update.index)

    # Gradients of parameters that several ranks hold

    def _reduce(self, rank: int, block: Block, number: int) -> None:
        """Start the sum of a block's gradients over all who hold its parameters, once per rank and round."""
        position = self.positions[block.position]
        if not position.reduced:
            return
        if is_zero(self.plan, position):
            self._scatter(rank, block, number)
            return
        reduction = reduction_of(self.plan, self.chain, position, block, rank)
        if reduction.compressed:
            self._act(rank, Action("compress", block.index))
        if reduction.matrices:
            self.unfactored[position.index].append((rank, block))
        for content, size in reduction.sums(self.plan.itemsize):
            self._start_sum(rank, block, content, size)
        if reduction.elements:
            self.reducing[position.index, rank].append(block)

    def _scatter(self, rank: int, block: Block, number: int) -> None:
        """Start a sum of which every rank gets its own part."""
        position = self.positions[block.position]
        size = bucket_elements(self.chain, position, block, rank) * self.plan.itemsize
        if not size:
            return
        group, part = position.gradients(rank), number if self.rounds[position.index] > 1 else None
        total = self._once(
            f"scatter {block.index} {number} {group}",
            lambda: self._operation(
                "reduce_scatter", "bucket", group, position.ranks, size, block.index, part, across=self.across
            ),
        )
        self._start(rank, total)
        self.arriving["bucket", block.index, 0, rank].append(total.index)
        if not number:
            self.reducing[position.index, rank].append(block)
        if keeps_no_bucket(self.plan, position) and not self.across:
            self.started[total.index] += 1
            self.scattering[rank].append(total.index)

    def _start_sum(self, rank: int, block: Block, content: Content, size: int) -> None:
        position = self.positions[block.position]
        group = position.gradients(rank)
        total = self._once(
            f"{content} {block.index} {group}",
            lambda: self._operation(
                "all_reduce", content, group, position.sharers(rank), size, block.index, across=self.across
            ),
        )
        self._start(rank, total)
        self.arriving[content, block.index, 0, rank].append(total.index)

    def _factor(self, position: Position) -> None:
        """Have all ranks of a position start the sums of the right factors, once the left ones are there.

        All at one place of the sequence, behind all backwards of the position and so behind those of later ones,
        whose factors come first: the order is the same in all plan replicas.
        """
        for behind in self.positions[: position.index : -1]:
            if self.unfactored[behind.index]:
                self._factor(behind)
        for rank, block in self.unfactored.pop(position.index):
            self._await(rank, "left", block.index, 0)
            self._act(rank, Action("factor", block.index))
            reduction = reduction_of(self.plan, self.chain, position, block, rank)
            self._start_sum(rank, block, "right", reduction.right * self.plan.itemsize)

    def _await_gradients(self, rank: int, position: Position) -> None:
        """Wait for the reduced gradients."""
        if self.unfactored[position.index]:
            self._factor(position)
        for block in self.reducing.pop((position.index, rank), ()):
            for content in SUMS:
                self._await(rank, content, block.index, 0)
            if reduction_of(self.plan, self.chain, position, block, rank).compressed:
                self._act(rank, Action("restore", block.index))

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
            for t in self.leaving.get((content, boundary, task.micro_batch, rank), ()):
                self._pass_on(content, boundary, t, self._bytes(boundary, t))

    def _bytes(self, boundary: int, t: Transfer) -> int:
        """Bytes of a transfer of activations or gradients over a boundary."""
        return length(t.samples) * length(t.features) * self.trailing[boundary]

    def _pass_on(self, content: Content, boundary: int, t: Transfer, size: int) -> None:
        if t.source == t.target:
            self._act(t.source, Action("copy", boundary, t.target_micro_batch, content=content, transfer=t))
            return
        communicator, ranks = WAYS[content, t.source < t.target], (t.source, t.target)
        send = self._operation("send", content, communicator, ranks, size, boundary, t.target_micro_batch, t)
        for rank in ranks:
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
        across: bool = False,
        norm: int | None = None,
    ) -> Operation:
        index = len(self.operations)
        made = Operation(
            index, kind, content, communicator, ranks, size, block, micro_batch, transfer, backward, across, norm
        )
        self.operations.append(made)
        self.starts.append(Action("start", operation=index, content=content))
        self.waits.append(Action("wait", operation=index, content=content))
        return made

    def _once(self, name: str, make: Callable[[], Operation]) -> Operation:
        return self.shared.get(name) or self.shared.setdefault(name, make())

    # Actions

    def _act(self, rank: int, action: Action) -> None:
        self.emitted.append((rank, action, PASSES if action.kind in {"forward", "backward"} else OTHER))

    def _start(self, rank: int, operation: Operation) -> None:
        """Start an operation and owe its wait; what one rank has for itself needs neither."""
        if operation.alone:
            return
        self.unwaited[rank][operation.index] = None
        receives = operation.kind == "send" and operation.ranks[1] == rank
        self.emitted.append((rank, self.starts[operation.index], RECEIVES if receives else OTHER))

    def _wait(self, rank: int, operation: int) -> None:
        del self.unwaited[rank][operation]
        self.emitted.append((rank, self.waits[operation], OTHER))

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
        since: list[list[tuple[int, int]]] = [[] for _ in self.world]
        for number, (rank, action, role) in enumerate(self.emitted):
            if role == RECEIVES:
                actions[rank].append(action)
                numbers.append((since[rank][0][0] if since[rank] else number, rank))
                continue
            if role == PASSES:
                actions[rank] += since_last[rank]
                numbers += since[rank]
                since_last[rank], since[rank] = [], []
            since_last[rank].append(action)
            since[rank].append((number, rank))
        for rank in self.world:
            actions[rank] += since_last[rank]
            numbers += since[rank]
        return tuple(map(tuple, actions)), tuple([rank for _, rank in sorted(numbers)])

    def _settle_reductions(self, rank: int) -> None:
        """Wait for all but the latest reductions that all ranks have started, so that whole gradients go early.

        None then waits for anything that comes later in the sequence.
        """
        waiting = self.scattering[rank]
        while len(waiting) > BUCKETS_IN_FLIGHT and self.started[waiting[0]] == len(
            self.operations[waiting[0]].ranks
        ):
            self._wait_once(rank, waiting.pop(0))

    def _settle_sends(self, rank: int) -> None:
        self.unsent[rank].append([])
        if len(self.unsent[rank]) > SEND_LAG:
            for operation in self.unsent[rank].popleft():
                self._wait_once(rank, operation)
