"""Reductions: the sums of gradients of parameters that several ranks hold, as a compiler puts them into a step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from hybridpar.model.chain import Chain
from hybridpar.planning.blocks import Block, Position
from hybridpar.planning.compression import SUMS
from hybridpar.planning.parameters import bucket_elements, reduction_of
from hybridpar.planning.plan import Plan
from hybridpar.planning.program import Action, Content
from hybridpar.planning.script import Script
from hybridpar.planning.zero import calls_until, is_zero, keeps_no_bucket, rounds

BUCKETS_IN_FLIGHT = 2
"""So many reductions of whole gradients that do not stay may overlap with backwards: late enough to overlap, early
enough to free their buckets."""


class Reductions:
    """Starts the sums of a step's gradients and waits for them, in a ``script``.

    Of one plan replica, which has ``samples`` in the step.
    """

    def __init__(
        self, script: Script, plan: Plan, chain: Chain, positions: Sequence[Position], samples: int
    ) -> None:
        self._script, self._plan, self._chain, self._positions = script, plan, chain, positions
        self._across = plan.replicas > 1
        self.rounds = [rounds(plan, p, samples) for p in positions]
        """How often each position reduces its gradients."""
        self._expected: dict[tuple[int, int], int] = defaultdict(int)
        self._done: dict[tuple[int, int], int] = defaultdict(int)
        """Backward calls by block and rank: of the step, and so far."""
        self._unfactored: dict[int, list[tuple[int, Block]]] = defaultdict(list)
        """By position, compressed gradients whose left factors are being summed."""
        self._reducing: dict[tuple[int, int], list[Block]] = defaultdict(list)
        """By position and rank, blocks whose gradients are being summed."""
        self._started: dict[int, int] = defaultdict(int)
        """By operation that is waited for as soon as all have started it: how many have."""
        self._scattering: list[list[int]] = [[] for _ in script.world]
        """Such operations that a rank has started and not waited for."""

    def expect(self, rank: int, block: int) -> None:
        """Count a backward that a rank will run of a block; all of a step before the first of them."""
        self._expected[block, rank] += 1

    def join(self, blocks: Sequence[Block]) -> None:
        """Start the reductions of replicas without samples, which would otherwise keep the others waiting.

        In the order of those that have some: round by round, and in each from the last block to the first.
        """
        for position in reversed(self._positions):
            own = [b for b in reversed(blocks) if b.position == position.index]
            for number in range(self.rounds[position.index]):
                for block in own:
                    for rank in position.ranks:
                        if not self._expected[block.index, rank]:
                            self._reduce(rank, block, number)

    def follow(self, rank: int, block: Block) -> None:
        """Start what a backward makes complete."""
        key, count = (block.index, rank), self.rounds[block.position]
        self._done[key] += 1
        number = self._done[key] * count // self._expected[key] - 1
        if number >= 0 and calls_until(self._expected[key], count, number) == self._done[key]:
            self._reduce(rank, block, number)

    def finish(self, rank: int, position: Position) -> None:
        """Wait for the reduced gradients."""
        if self._unfactored[position.index]:
            self._factor(position)
        for block in self._reducing.pop((position.index, rank), ()):
            for content in SUMS:
                self._script.require(rank, content, block.index, 0)
            if reduction_of(self._plan, self._chain, position, block, rank).compressed:
                self._script.act(rank, Action("restore", block.index))

    def settle(self, rank: int) -> None:
        """Wait for all but the latest reductions that all ranks have started, so that whole gradients go early.

        None then waits for anything that comes later in the sequence.
        """
        waiting = self._scattering[rank]
        while len(waiting) > BUCKETS_IN_FLIGHT and self._started[waiting[0]] == len(
            self._script.operations[waiting[0]].ranks
        ):
            self._script.wait_once(rank, waiting.pop(0))

    def _reduce(self, rank: int, block: Block, number: int) -> None:
        """Start the sum of a block's gradients over all who hold its parameters, once per rank and round."""
        position = self._positions[block.position]
        if not position.reduced:
            return
        if is_zero(self._plan, position):
            self._scatter(rank, block, number)
            return
        reduction = reduction_of(self._plan, self._chain, position, block, rank)
        if reduction.compressed:
            self._script.act(rank, Action("compress", block.index))
        if reduction.matrices:
            self._unfactored[position.index].append((rank, block))
        for content, size in reduction.sums(self._plan.itemsize):
            self._start_sum(rank, block, content, size)
        if reduction.elements:
            self._reducing[position.index, rank].append(block)

    def _scatter(self, rank: int, block: Block, number: int) -> None:
        """Start a sum of which every rank gets its own part."""
        position = self._positions[block.position]
        size = bucket_elements(self._chain, position, block, rank) * self._plan.itemsize
        if not size:
            return
        group, part = position.gradients(rank), number if self.rounds[position.index] > 1 else None
        total = self._script.once(
            f"scatter {block.index} {number} {group}",
            lambda: self._script.operation(
                "reduce_scatter", "bucket", group, position.ranks, size, block.index, part, across=self._across
            ),
        )
        self._script.start(rank, total)
        self._script.expect(rank, total, "bucket", block.index, 0)
        if not number:
            self._reducing[position.index, rank].append(block)
        if keeps_no_bucket(self._plan, position) and not self._across:
            self._started[total.index] += 1
            self._scattering[rank].append(total.index)

    def _start_sum(self, rank: int, block: Block, content: Content, size: int) -> None:
        position = self._positions[block.position]
        group = position.gradients(rank)
        total = self._script.once(
            f"{content} {block.index} {group}",
            lambda: self._script.operation(
                "all_reduce", content, group, position.sharers(rank), size, block.index, across=self._across
            ),
        )
        self._script.start(rank, total)
        self._script.expect(rank, total, content, block.index, 0)

    def _factor(self, position: Position) -> None:
        """Have all ranks of a position start the sums of the right factors, once the left ones are there.

        All at one place of the sequence, behind all backwards of the position and so behind those of later ones,
        whose factors come first: the order is the same in all plan replicas.
        """
        for behind in self._positions[: position.index : -1]:
            if self._unfactored[behind.index]:
                self._factor(behind)
        for rank, block in self._unfactored.pop(position.index):
            self._script.require(rank, "left", block.index, 0)
            self._script.act(rank, Action("factor", block.index))
            reduction = reduction_of(self._plan, self._chain, position, block, rank)
            self._start_sum(rank, block, "right", reduction.right * self._plan.itemsize)
