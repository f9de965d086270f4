"""Compilation: a plan and a number of samples become a program."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from functools import lru_cache

from hybridpar.model.chain import Chain
from hybridpar.planning.blocks import Block, Position, blocks, positions
from hybridpar.planning.boundary import boundaries
from hybridpar.planning.communicators import communicators
from hybridpar.planning.layout import Transfer, length
from hybridpar.planning.moments import calls, meets
from hybridpar.planning.order import Flow, Task
from hybridpar.planning.order import sequence as task_sequence
from hybridpar.planning.parameters import parameter_count
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
from hybridpar.planning.reductions import Reductions
from hybridpar.planning.script import Script
from hybridpar.planning.zero import is_zero, part_elements

LABEL_BYTES = NORM_BYTES = METRIC_BYTES = BEST_BYTES = 8


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
        if mode != "train":
            self.blocks = tuple(replace(b, sampled=None) for b in self.blocks)
        self.chunks = [p.micro_batches(samples) for p in self.positions]
        self.train = mode == "train"
        self.world = tuple(range(plan.replica_world))
        self.across = plan.replicas > 1
        self.script = Script(self.world)
        self.reductions = Reductions(self.script, plan, chain, self.positions, samples)
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
            frozenset(p.index for p in self.positions if self.reductions.rounds[p.index] > 1),
        )
        tasks = task_sequence(flow)
        self._count(tasks)
        self._open()
        for task in tasks:
            getattr(self, f"_{task.kind}")(task)
            if task.kind in {"forward", "backward"}:
                for rank in self._working(task):
                    self.script.settle_sends(rank)
                    self.reductions.settle(rank)
        self._close()
        actions, sequence = self.script.arranged()
        return Program(
            self.plan,
            self.chain,
            self.samples,
            self.mode,
            self.positions,
            self.blocks,
            tuple(self.script.operations),
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
        self.losses: dict[int, int] = defaultdict(int)
        for task in tasks:
            if task.kind == "backward":
                for rank in self._working(task):
                    self.reductions.expect(rank, task.block)
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
                self.script.act(rank, Action("load"))
        if self.mode != "predict":
            size = LABEL_BYTES * self.step_samples * self.chain.labels
            labels = self._control("label", size, self._tellers(self.positions[0]))
            for rank in self.world:
                self.script.start(rank, labels)
        for rank in self.world:
            if not self.losses[rank]:
                self._report(rank)
        if self.train:
            self.reductions.join(self.blocks)
            if not self.samples:
                self._join_norms()

    def _join_norms(self) -> None:
        """Take part in what batch norms tell each other in plan replicas that do have samples."""
        for backward, order in ((False, self.blocks), (True, self.blocks[::-1])):
            for block in order:
                if self._home(block).joint:
                    self._meet(block, 0, backward=backward)

    def _close(self) -> None:
        if self.train:
            self._update_parts()
        self.script.close()

    def _report(self, rank: int) -> None:
        content: Content
        if self.mode == "predict":
            content, size = "best", 2 * self.best * BEST_BYTES * self.step_samples * self.chain.labels
        else:
            content, size = "metrics", METRIC_BYTES * len(METRICS)
        self.script.start(rank, self._control(content, size, self._tellers(self.positions[-1])))

    def _tellers(self, position: Position) -> tuple[int, ...]:
        """Return the ranks that tell the others of a position's samples: of all shards only the first one."""
        if position.sharded:
            return position.ranks[:1]
        chunks = self.chunks[position.index]
        return tuple(r for i, r in enumerate(position.ranks) if any(length(chunk[i]) for chunk in chunks))

    def _control(self, content: Content, size: int, tellers: tuple[int, ...]) -> Operation:
        """Return the one operation of its kind in a step, between all ranks: a sum, unless one alone tells all."""
        kind: OperationKind = "all_reduce"
        ranks = self.world
        if len(tellers) == 1 and not self.across:
            kind, ranks = "broadcast", (*tellers, *(r for r in ranks if r not in tellers))
        return self.script.once(
            content,
            lambda: self.script.operation(kind, content, "control", ranks, size, across=self.across),
        )

    # One method per kind of task

    def _forward(self, task: Task) -> None:
        working = self._working(task)
        for rank in working:
            self.script.require(rank, "activation", task.block - 1, task.micro_batch)
            if self.blocks[task.block].sampled is not None:  # the labels say which classes it has
                self.script.wait_once(rank, self.script.shared["label"].index)
            self.script.act(rank, Action("forward", task.block, task.micro_batch))
        if self.train:
            self._meet(self.blocks[task.block], task.micro_batch, backward=False)
        if task.block < len(self.blocks) - 1:
            self._deliver("activation", task.block, task)
            return
        for rank in working:
            if self.mode != "predict":
                self.script.wait_once(rank, self.script.shared["label"].index)
            self.script.act(rank, Action("score", task.block, task.micro_batch))
        if self.positions[-1].sharded:
            interval = self.positions[-1].micro_batches(self.samples)[task.micro_batch][0]
            figures = STATISTICS[self.mode] + 2 * self.best
            size = figures * self.plan.itemsize * length(interval) * self.chain.labels
            self._gather_statistics(task, size)

    def _gather_statistics(self, task: Task, size: int) -> None:
        gather = self.script.operation(
            "all_gather", "statistics", "tail", task.ranks, size, task.block, task.micro_batch
        )
        for rank in task.ranks:
            self.script.start(rank, gather)
            self.script.expect(rank, gather, "statistics", task.block, task.micro_batch)

    def _loss(self, task: Task) -> None:
        for rank in task.ranks:
            self.script.require(rank, "statistics", task.block, task.micro_batch)
            self.script.act(rank, Action("loss", task.block, task.micro_batch))
            self.losses[rank] -= 1
            if not self.losses[rank]:
                self._report(rank)

    def _backward(self, task: Task) -> None:
        working = self._working(task)
        for rank in working:
            self.script.require(rank, "gradient", task.block, task.micro_batch)
            self.script.act(rank, Action("backward", task.block, task.micro_batch))
        self._meet(self.blocks[task.block], task.micro_batch, backward=True)
        if self.blocks[task.block].answers:
            self._deliver("gradient", task.block - 1, task)
        for rank in working:
            self.reductions.follow(rank, self.blocks[task.block])

    def _meet(self, block: Block, micro_batch: int, *, backward: bool) -> None:
        """Let batch norms meet within a pass that was just put into the program."""
        position = self._home(block)
        for call in calls(position, block, self.chain, backward=backward):
            met = self.script.operation(
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
                self.script.start(rank, met)
            for rank in position.ranks:
                self.script.wait_once(rank, met.index)

    def _norm(self, task: Task) -> None:
        (rank,) = task.ranks
        for position in self.positions:
            if rank in position.ranks:
                self.reductions.finish(rank, position)
        self.script.act(rank, Action("norm"))
        self.script.start(rank, self._control("norm", NORM_BYTES, self.world))

    def _update(self, task: Task) -> None:
        (rank,), position = task.ranks, self.positions[task.block]
        if self._has_parts(position):
            return
        self.reductions.finish(rank, position)
        if self.plan.recipe.normed:
            self.script.wait_once(rank, self.script.shared["norm"].index)
        self.script.act(rank, Action("update", position.index))

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
            update = self.script.operation(
                "sharded_update", "zero", group, position.ranks, size, index, across=self.across
            )
            for rank in position.ranks:
                self.reductions.finish(rank, position)
                if self.plan.recipe.normed:
                    self.script.wait_once(rank, self.script.shared["norm"].index)
                self.script.start(rank, update)
            for rank in position.ranks:
                self.script.wait(rank, update.index)

    # Communication

    def _deliver(self, content: Content, boundary: int, task: Task) -> None:
        """Send what a forward or backward of ``task`` produced over a boundary between blocks."""
        backward = content == "gradient"
        if self.boundaries[boundary].summed(content):
            rank = task.ranks[0]
            size = sum(self._bytes(boundary, t) for t in self.leaving[content, boundary, task.micro_batch, rank])
            size //= len(task.ranks)
            total = self.script.operation(
                "all_reduce", "sum", "tail", task.ranks, size, boundary, task.micro_batch, backward=backward
            )
            for rank in task.ranks:
                self.script.start(rank, total)
                self.script.expect(rank, total, content, boundary, task.micro_batch)
            return
        for rank in task.ranks:
            for t in self.leaving.get((content, boundary, task.micro_batch, rank), ()):
                self._pass_on(content, boundary, t, self._bytes(boundary, t))

    def _bytes(self, boundary: int, t: Transfer) -> int:
        """Bytes of a transfer of activations or gradients over a boundary."""
        return length(t.samples) * length(t.features) * self.trailing[boundary]

    def _pass_on(self, content: Content, boundary: int, t: Transfer, size: int) -> None:
        if t.source == t.target:
            self.script.act(t.source, Action("copy", boundary, t.target_micro_batch, content=content, transfer=t))
            return
        self.script.send(content, boundary, t, size)
