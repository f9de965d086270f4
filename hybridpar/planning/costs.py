"""What each action and operation of a program costs, from a profile and a cluster."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

from hybridpar.cluster.collectives import all_gather, all_reduce, broadcast, point_to_point, reduce_scatter
from hybridpar.cluster.topology import Cluster, Collective
from hybridpar.model.chain import Chain
from hybridpar.planning.blocks import Block, Position, Span
from hybridpar.planning.compression import WORKS
from hybridpar.planning.layout import Interval, length
from hybridpar.planning.parameters import parameter_count, reduction_of
from hybridpar.planning.plan import Plan
from hybridpar.planning.program import Action, Operation, Program
from hybridpar.planning.workspaces import Workspaces
from hybridpar.planning.zero import is_zero, sharing
from hybridpar.profiling.record import Profile

NORM_SHARE = 1 / 5
"""Of an optimizer step's memory traffic: a norm reads the gradients once; SGD with momentum reads parameters,
gradients and momenta and writes parameters and momenta."""
FACTOR_SHARE = 2 / 5
"""Likewise: gradients are read and written once more to clip them, to undo the scale of the loss, or both."""
AVERAGE_SHARE = 3 / 5
"""Likewise: a moving average reads parameters and averages, and writes averages."""
ROWS_SHARE = 8 / 5
"""Likewise: parameters and momenta of sampled classes are read and written to collect them, and to put them
back."""
HOST_BYTES_PER_S = 12e9
"""Of a copy between a device and its host, each way: PCIe 3.0 with 16 lanes has 15.75 GB/s, of which large pinned
copies reach about 12 (assumed, not measured)."""
HOST_UPDATE_S_PER_BYTE = 0.22 / 4e9
"""Of an optimizer step on the host, per byte of parameters: 0.22 s for 10^9 float32 parameters by a fused CPU Adam
(Ren et al., "ZeRO-Offload", USENIX ATC 2021, table 4)."""
COPY_PASSES = 2
"""A copy reads and writes every byte."""


_PASSES = {"forward", "backward", "score", "loss"}
HOST_ACTIONS = {*_PASSES, *WORKS, "norm", "update", "start"}
"""Actions that cost the executor a device's ``action_s``."""
_COLLECTIVES: dict[str, Collective] = {
    "broadcast": "broadcast",
    "all_reduce": "all_reduce",
    "reduce_scatter": "reduce_scatter",
    "all_gather": "all_gather",
    "sharded_update": "all_gather",
}
"""The library's collective by kind of operation."""
Card = tuple[int, str]
"""A node's network card, by node and direction."""


class Costs:
    """Seconds of actions and operations."""

    def __init__(self, profile: Profile, cluster: Cluster) -> None:
        self.profile, self.cluster = profile, cluster
        self.workspaces = Workspaces(profile, host=cluster.device.kind == "cpu")
        self._passes: dict[tuple[Interval, tuple[Span, ...], int, str, bool, float | None], float] = {}
        self._saved: dict[tuple[Interval, tuple[Span, ...], bool, float | None], float] = {}
        self._held: dict[tuple[Interval, tuple[Span, ...], float | None], float] = {}
        self._operations: dict[tuple[str, tuple[int, ...], int], float] = {}
        self._contentions: dict[tuple[str, tuple[int, ...], int], float] = {}
        fitted = (link for level in cluster.collectives.values() for link in level.values())
        self._contention = any(link.contends for link in (*cluster.links.values(), *fitted))
        self._cards: dict[tuple[str, tuple[int, ...]], list[Card]] = {}

    @property
    def contended(self) -> bool:
        """Whether computations slow each other down, or communication does."""
        shared = any(n.cores is not None and n.cores < n.devices for n in self.cluster.nodes)
        return shared or self._contention

    def actions(self, program: Program, rank: int) -> list[float]:
        """Return the seconds that each action of a rank keeps it busy; without a GPU that includes the executor.

        Of ranks that correspond to each other in several plan replicas, the slowest sets the pace.
        """
        known: dict[tuple[str, int | None, int], float] = {}
        fresh = self._fresh(program, rank)
        index = {p.index: p.ranks.index(rank) for p in program.positions if rank in p.ranks}
        speed = self.speed(program.plan, rank)
        executor = self.cluster.device.action_s if self.cluster.device.kind == "cpu" else 0.0
        seconds = []
        for action in program.actions[rank]:
            kind = action.kind
            if kind == "wait":
                own = 0.0
            elif kind == "start":
                own = executor
            elif kind in _PASSES:
                position = program.blocks[action.block or 0].position
                start, stop = program.micro_batches[position][action.micro_batch or 0][index[position]]
                key = (kind, action.block, stop - start)
                if key not in known:
                    known[key] = self._device_time(program, rank, action) / speed + executor
                own = known[key]
                if kind == "backward" and start < stop and action.block in fresh:
                    own -= fresh.pop(action.block) / speed
            else:
                own = self._device_time(program, rank, action) / speed + executor * (kind in HOST_ACTIONS)
            seconds.append(own)
        return seconds

    def _fresh(self, program: Program, rank: int) -> dict[int, float]:
        """Per block, the seconds that its first backward of a step saves."""
        saved = {}
        for block in program.blocks:
            position = program.positions[block.position]
            if rank in position.ranks:
                index = position.ranks.index(rank)
                saved[block.index] = self.fresh(program.plan, program.chain, position, block, index)
        return saved

    def fresh(self, plan: Plan, chain: Chain, position: Position, block: Block, index: int) -> float:
        """Return the seconds that a block's first backward of a step saves on its rank number ``index``.

        It finds no gradients to add to. Those that are reduced it copies to their place in the bucket, apart from
        weights whose gradients gather in place.
        """
        key = (block.layers, block.spans[index] if block.spans else (), position.reduced, block.sampled)
        if key not in self._saved:
            copy_s = position.reduced * plan.itemsize * self.profile.copy_s_per_byte
            self._saved[key] = sum(
                self.profile.accumulate_time(i, fraction)
                - (chain.trained[i] - chain.gathered[i]) * fraction * copy_s
                for i in range(*block.layers)
                if chain.trained[i] and (fraction := block.computed(chain, index, i))
            )
        return self._saved[key]

    def speed(self, plan: Plan, rank: int) -> float:
        """Return the speed of the slowest device of a replica's rank."""
        return min(self.cluster.speed(r) for r in plan.everywhere((rank,)))

    def memory_bytes(self, plan: Plan, rank: int) -> float:
        """Return the memory of the smallest device of a replica's rank."""
        return min(self.cluster.memory_bytes(r) for r in plan.everywhere((rank,)))

    def cards(self, program: Program, operation: Operation) -> list[Card]:
        """Return the cards that an operation between nodes occupies."""
        key = (operation.kind, self._participants(program, operation))
        if key not in self._cards:
            nodes = [self.cluster.node_of[r] for r in key[1]]
            cards: list[Card] = []
            if len(set(nodes)) > 1 and operation.kind == "send":
                cards = [(nodes[0], "out"), (nodes[1], "in")]
            elif len(set(nodes)) > 1:
                cards = [(n, way) for n in sorted(set(nodes)) for way in ("out", "in")]
            self._cards[key] = cards
        return self._cards[key]

    def contention(self, program: Program, operation: Operation) -> float:
        """Return the seconds of computation that a rank loses per second in which the operation is in flight.

        On average over its latency and its transfer.
        """
        if not self._contention:
            return 0.0
        ranks = self._participants(program, operation)
        key = (operation.kind, ranks, operation.bytes)
        if key not in self._contentions:
            levels = {self.cluster.level(a, b) for a, b in pairwise(ranks)}
            links = [self.cluster.link(level, _COLLECTIVES.get(operation.kind)) for level in levels]
            whole_s = self.wire(*key)
            latency_s = min(self.wire(operation.kind, ranks, 0), whole_s)
            lost_s = max((link.lost(latency_s, whole_s - latency_s) for link in links), default=0.0)
            self._contentions[key] = lost_s / whole_s if whole_s else 0.0
        return self._contentions[key]

    def _participants(self, program: Program, operation: Operation) -> tuple[int, ...]:
        """Return the ranks of an operation in the cluster."""
        if not operation.across:
            return operation.ranks
        return program.plan.everywhere(operation.ranks)

    def _device_time(self, program: Program, rank: int, action: Action) -> float:
        if action.kind in {"forward", "backward"}:
            block = program.blocks[action.block or 0]
            samples = length(program.interval(block.index, action.micro_batch or 0, rank))
            shard = program.positions[block.position].ranks.index(rank) if block.spans else 0
            return self.passes(program.chain, block, shard, samples, action.kind)
        if action.kind in {"score", "loss"}:
            return self._loss_time(program, rank, action)
        if action.kind == "update":
            return self._update_time(program, rank, action.block or 0)
        if action.kind in WORKS:
            block = program.blocks[action.block or 0]
            return self.compression(program.plan, program.chain, program.positions[block.position], block, rank)[
                action.kind
            ]
        if action.kind == "norm":
            own = (p for p in program.positions if rank in p.ranks)
            parts = (self._step_time(program, rank, p.index) / _sharing(program.plan, p) for p in own)
            return NORM_SHARE * sum(parts)
        if action.kind == "copy" and action.transfer is not None and not action.transfer.whole:
            before = program.blocks[action.block or 0]
            features = length(action.transfer.features) * before.trailing(program.chain, "out")
            elements = length(action.transfer.samples) * features
            size = elements * before.out_itemsize(program.chain, program.plan.itemsize)
            return COPY_PASSES * size / self.cluster.device.memory_bytes_per_s
        return 0.0

    def operation(self, program: Program, operation: Operation) -> float:
        """Return the seconds that an operation takes once all participants are there."""
        ranks, size = self._participants(program, operation), operation.bytes
        if len(ranks) == 1:
            return 0.0
        seconds = self.wire(operation.kind, ranks, size)
        if operation.kind == "sharded_update":
            seconds += self._part_time(program, operation)
        return seconds

    def wire(self, kind: str, ranks: tuple[int, ...], size: int) -> float:
        """Return the seconds of a message or of collectives between ranks of the cluster; computed once."""
        key = (kind, ranks, size)
        if key not in self._operations:
            if kind == "send":
                seconds = point_to_point(self.cluster, ranks[0], ranks[1], size)
            elif kind == "broadcast":
                seconds = broadcast(self.cluster, ranks, size)
            elif kind == "all_reduce":
                seconds = all_reduce(self.cluster, ranks, size)
            elif kind == "reduce_scatter":
                seconds = reduce_scatter(self.cluster, ranks, size)
            else:
                seconds = all_gather(self.cluster, ranks, size)
            self._operations[key] = seconds
        return self._operations[key]

    def passes(self, chain: Chain, block: Block, shard: int, samples: int, kind: str) -> float:
        """Return the seconds of a block's ``forward`` or ``backward`` for a micro-batch on one of its ranks."""
        spans = block.spans[shard] if block.spans else ()
        key = (block.layers, spans, samples, kind, block.recompute, block.sampled)
        if key not in self._passes:
            time = self.profile.forward_time if kind == "forward" else self.profile.backward_time
            seconds = sum(
                time(i, samples, block.computed(chain, shard, i), rows=block.by_rows(shard, i))
                for i in range(*block.layers)
            )
            if kind == "backward" and block.recompute:
                seconds += self.passes(chain, block, shard, samples, "forward")
            self._passes[key] = seconds
        return self._passes[key]

    def update(self, plan: Plan, chain: Chain, blocks: list[Block], index: int) -> float:
        """Return the seconds of an optimizer step for blocks of one position on its rank number ``index``.

        With what follows from the norm, and the average.
        """
        stepped_s = self._step(plan, chain, blocks, index) * _passes_of(plan)
        if not plan.recipe.average:
            return stepped_s
        whole = [replace(block, sampled=None) for block in blocks]  # the average takes in all classes
        return stepped_s + self._step(plan, chain, whole, index) * AVERAGE_SHARE

    def _step(self, plan: Plan, chain: Chain, blocks: list[Block], index: int) -> float:
        total = sum(self._elements(chain, block, index) for block in blocks)
        return total * plan.itemsize * self.profile.update_s_per_byte

    def compression(
        self, plan: Plan, chain: Chain, position: Position, block: Block, rank: int
    ) -> dict[str, float]:
        """Return the seconds of a block's ``compress``, ``factor`` and ``restore`` on a rank, those that it has.

        Modelled, not measured: the larger of operations at the device's rate and bytes at its memory's bandwidth;
        bytes alone where it has no rate for the precision.
        """
        reduction = reduction_of(plan, chain, position, block, rank)
        device, found = self.cluster.device, dict[str, float]()
        for kind in reduction.steps():
            flops, moved_bytes = reduction.work(kind, plan.itemsize)
            rate = device.flops_per_s.get(plan.precision, math.inf)
            found[kind] = max(flops / rate, moved_bytes / device.memory_bytes_per_s)
        return found

    def _elements(self, chain: Chain, block: Block, index: int) -> float:
        """Return the trained elements of a block on its rank number ``index``: of a sampled head, in a step.

        Those have to be collected and put back besides.
        """
        if not block.spans and block.sampled is None:
            return parameter_count(chain, block.layers, trained=True)
        key = (block.layers, block.spans[index] if block.spans else (), block.sampled)
        if key not in self._held:
            layers = range(*block.layers)
            elements = [chain.trained[i] * block.computed(chain, index, i) for i in layers]
            collected = elements[-1] * ROWS_SHARE if block.sampled is not None else 0.0
            self._held[key] = sum(elements) + collected
        return self._held[key]

    def _loss_time(self, program: Program, rank: int, action: Action) -> float:
        """Half of the cross-entropy's time each for the score and the loss."""
        block = program.blocks[-1]
        shard = program.positions[-1].ranks.index(rank) if block.spans else 0
        logits = length(block.features(program.chain, shard, "out")) * block.trailing(program.chain, "out")
        samples = length(program.interval(block.index, action.micro_batch or 0, rank))
        taken = 1.0 if block.sampled is None else block.sampled
        return self.profile.loss_s_per_element * samples * logits * taken / 2

    def _update_time(self, program: Program, rank: int, position: int) -> float:
        own = [b for b in program.blocks if b.position == position]
        index = program.positions[position].ranks.index(rank)
        return self.update(program.plan, program.chain, own, index)

    def _step_time(self, program: Program, rank: int, position: int) -> float:
        """Return the seconds of an optimizer step on a whole position."""
        own = [b for b in program.blocks if b.position == position]
        index = program.positions[position].ranks.index(rank)
        return self._step(program.plan, program.chain, own, index)

    def _part_time(self, program: Program, operation: Operation) -> float:
        """Return the seconds in which a rank updates its part of sharded state, and the average of the whole."""
        step_s = self._step_time(program, operation.ranks[0], operation.block or 0)
        average_s = step_s * AVERAGE_SHARE * program.plan.recipe.average
        if not program.plan.recipe.offload:
            return step_s * _passes_of(program.plan) / len(self._participants(program, operation)) + average_s
        copies_s = 2 * operation.bytes / HOST_BYTES_PER_S  # the gradients there, the parameters back
        return copies_s + operation.bytes * HOST_UPDATE_S_PER_BYTE + average_s


def _passes_of(plan: Plan) -> float:
    """Return an update's passes over memory, as multiples of those of an optimizer step."""
    return 1 + FACTOR_SHARE * plan.recipe.normed


def _sharing(plan: Plan, position: Position) -> int:
    return sharing(plan, position) if is_zero(plan, position) else 1


def wire_bytes(operation: Operation, replicas: int = 1) -> int:
    """Return the bytes that leave all participants together, in so many plan replicas.

    Collectives are rings (Patarasu and Yuan, 2009), but a broadcast is a tree. An operation across replicas is one
    of all of them together; of any other every replica has its own.
    """
    n = len(operation.ranks) * (replicas if operation.across else 1)
    times = 1 if operation.across else replicas
    if operation.kind == "send":
        return times * operation.bytes
    if operation.kind == "broadcast":
        return times * (n - 1) * operation.bytes
    if operation.kind in {"all_gather", "sharded_update"}:
        return times * n * (n - 1) * operation.bytes
    if operation.kind == "reduce_scatter":
        return times * (n - 1) * operation.bytes
    return times * 2 * (n - 1) * operation.bytes
