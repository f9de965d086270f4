"""Whether devices have ample memory: more than all that a step ever makes, so that nothing needs to be counted."""

from __future__ import annotations

import math
from collections import Counter, defaultdict

from hybridpar.planning.books import FIGURE_BYTES
from hybridpar.planning.costs import Costs
from hybridpar.planning.kept import kept
from hybridpar.planning.layout import length
from hybridpar.planning.parameters import bucket_elements, reduction_of
from hybridpar.planning.program import METRICS, Program
from hybridpar.planning.resident import NORM_ITEMSIZE, heap_of, summing_bytes
from hybridpar.planning.workspaces import Bytes, Workspaces
from hybridpar.planning.zero import ALIGNMENT, is_zero, rounds

Key = tuple[object, ...]


def ample(program: Program, costs: Costs) -> bool:
    """Whether every rank's device certainly holds what ``peak_per_rank`` would count."""
    most = most_per_rank(program, costs.workspaces)
    return all(need <= costs.memory_bytes(program.plan, rank) for rank, need in enumerate(most))


def most_per_rank(program: Program, workspaces: Workspaces) -> list[float]:
    """Return bytes that no rank's peak exceeds: as if nothing were freed before the step ends."""
    return _Most(program, workspaces).per_rank()


class _Most:
    """Adds up, rank by rank; equal blocks with equal micro-batches are added up once."""

    def __init__(self, program: Program, workspaces: Workspaces) -> None:
        self.program, self.workspaces = program, workspaces
        self.chain, self.itemsize = program.chain, program.plan.itemsize
        self.known: dict[Key, tuple[float, Bytes]] = {}

    def per_rank(self) -> list[float]:
        """Return the bytes of every rank."""
        program = self.program
        total: dict[int, float] = defaultdict(float)
        within: dict[int, Bytes] = defaultdict(lambda: Bytes(0.0, 0.0))
        for block in program.blocks:
            position, micro_batches = program.positions[block.position], program.micro_batches[block.position]
            for shard, rank in enumerate(position.ranks):
                sizes = tuple(sorted(Counter(length(intervals[shard]) for intervals in micro_batches).items()))
                key = (block.index, shard if block.spans else 0, sizes)
                if key not in self.known:
                    self.known[key] = self._of_block(block.index, shard, sizes)
                made, most = self.known[key]
                total[rank] += made
                before = within[rank]
                within[rank] = Bytes(max(before.small, most.small), max(before.large, most.large))
        self._add_messages(total)
        holes = heap_of(self.workspaces, self.chain).most
        return [
            holes + total[rank] + sum(within[rank]) + self._fixed(rank)
            for rank in range(program.plan.replica_world)
        ]

    def _add_messages(self, total: dict[int, float]) -> None:
        """Add a buffer at both ends of every message."""
        for operation in self.program.operations:
            if operation.transfer is not None:
                for rank in operation.ranks:
                    total[rank] += operation.bytes

    def _fixed(self, rank: int) -> float:
        """Return the bytes of inputs, figures of the step, a parameter while it is cut, and libraries."""
        chain, program = self.chain, self.program
        reads = sum(length(interval) for interval in program.reads(rank))
        labels = (program.step_samples + reads) * chain.labels
        control = (labels + len(METRICS) + len(program.positions)) * FIGURE_BYTES
        whole = max((p.count for layer in chain.layers for p in layer.parameters), default=0) * self.itemsize
        inputs = reads * math.prod(chain.in_shape) * max(self.itemsize, FIGURE_BYTES)
        of_libraries = self.workspaces.profile.library_bytes + summing_bytes(program, rank)
        return inputs + control + whole + of_libraries

    def _of_block(self, index: int, shard: int, sizes: tuple[tuple[int, int], ...]) -> tuple[float, Bytes]:
        """Return all bytes that a rank's calls of a block make, with its parameters, and the most workspace."""
        program, chain, itemsize = self.program, self.chain, self.itemsize
        block = program.blocks[index]
        position, described = program.positions[block.position], kept(block, shard, chain)
        trailing = block.trailing(chain, "out")
        entering = described.bytes(0, itemsize)
        leaving = length(block.features(chain, shard, "out")) * trailing * block.out_itemsize(chain, itemsize)
        states = 2 + program.plan.recipe.optimizer_states + program.plan.recipe.average
        if block.sampled is not None:  # copies of rows, their gradients, and their states in an update
            states += 2 + program.plan.recipe.optimizer_states
        held = bucket_elements(chain, position, block, position.ranks[shard])
        if is_zero(program.plan, position):  # its part, of parameters and gradients too, and what rounds need
            states += 2 * rounds(program.plan, position, program.samples)
            held += ALIGNMENT
        own = max(held, sum(described.parameters)) * itemsize
        buffers = sum(layer.buffer_bytes for layer in chain.layers[slice(*block.layers)])
        total = float(states * own + buffers * (1 + program.plan.recipe.scaling))
        small = large = 0.0
        for samples, count in sizes:
            inside = sum(described.inside(samples, itemsize))
            # Input and output, and the gradients of both.
            total += count * (2 * (entering + leaving) * samples + inside)
            if index == len(program.blocks) - 1:
                figures = program.figures * itemsize * samples * chain.labels
                total += count * figures * (1 + len(position.ranks))
            small = max(small, inside + 2 * (entering + leaving) * samples)
            for kind in ("forward", "backward"):
                for fresh in (False, True):
                    found = self.workspaces.within(chain, block, shard, samples, itemsize, kind, fresh=fresh)
                    small, large = max(small, found.small), max(large, found.large)
        reduction = reduction_of(program.plan, chain, position, block, position.ranks[shard])
        total += sum(reduction.held(itemsize))
        for work in reduction.steps():
            needed = sum(reduction.workspace(work, itemsize))
            small, large = max(small, needed), max(large, needed)
        norm = max(described.parameters, default=0) * NORM_ITEMSIZE
        return total + norm, Bytes(small, large)
