"""What each action and operation of a program costs, from a profile and a cluster."""

from __future__ import annotations

import math

from hybridpar.cluster.collectives import all_gather, all_reduce, point_to_point, reduce_scatter
from hybridpar.cluster.topology import Cluster
from hybridpar.model.chain import Chain
from hybridpar.planning.blocks import Block, Span
from hybridpar.planning.compile import parameter_count
from hybridpar.planning.layout import Interval, length
from hybridpar.planning.program import Action, Operation, Program
from hybridpar.profiling.record import Profile

NORM_SHARE = 1 / 5
"""Of an optimizer step's memory traffic: a norm reads the gradients once; SGD with momentum reads parameters,
gradients and momenta and writes parameters and momenta."""
COPY_PASSES = 2
"""A copy reads and writes every byte."""


HOST_ACTIONS = {"forward", "backward", "score", "loss", "norm", "update", "start"}
"""Actions that cost the executor a device's ``action_s``."""


class Costs:
    """Seconds of actions and operations."""

    def __init__(self, profile: Profile, cluster: Cluster) -> None:
        self.profile, self.cluster = profile, cluster
        self._passes: dict[tuple[Interval, tuple[Span, ...], int, str], float] = {}

    def action(self, program: Program, rank: int, action: Action) -> float:
        """Return the seconds that an action keeps its rank busy.

        Without a GPU that includes the executor itself, and moving messages between memory and sockets.
        """
        seconds = self._device_time(program, rank, action)
        if self.cluster.device.kind == "cpu":
            seconds += self.cluster.device.action_s * (action.kind in HOST_ACTIONS)
            seconds += self._moving_time(program, action)
        return seconds

    def _moving_time(self, program: Program, action: Action) -> float:
        """Seconds of a core per message, as fast as the link within a node: the sender's at its start.

        A collective's ring sends and receives alike; its bytes count at the wait.
        """
        if action.operation is None:
            return 0.0
        operation = program.operations[action.operation]
        rate = self.cluster.link("node").bytes_per_s
        if operation.kind == "send":
            return operation.bytes / rate * (action.kind == "start")
        return wire_bytes(operation) / len(operation.ranks) / rate * (action.kind == "wait")

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
        if action.kind == "norm":
            own = (p.index for p in program.positions if rank in p.ranks)
            return NORM_SHARE * sum(self._update_time(program, rank, i) for i in own)
        if action.kind == "copy" and action.transfer is not None and not action.transfer.whole:
            following = program.blocks[(action.block or 0) + 1]
            trailing = math.prod(following.shape(program.chain, "in")[1:])
            elements = length(action.transfer.samples) * length(action.transfer.features) * trailing
            return COPY_PASSES * elements * program.plan.itemsize / self.cluster.device.memory_bytes_per_s
        return 0.0

    def operation(self, program: Program, operation: Operation) -> float:
        """Return the seconds that an operation takes once all participants are there."""
        ranks, size = operation.ranks, operation.bytes
        if operation.kind == "send":
            return point_to_point(self.cluster, ranks[0], ranks[1], size)
        if operation.kind == "all_reduce":
            return all_reduce(self.cluster, ranks, size)
        if operation.kind == "all_gather":
            return all_gather(self.cluster, ranks, size)
        update = self._update_time(program, ranks[0], operation.block or 0) / len(ranks)
        return (
            reduce_scatter(self.cluster, ranks, size) + update + all_gather(self.cluster, ranks, size / len(ranks))
        )

    def passes(self, chain: Chain, block: Block, shard: int, samples: int, kind: str) -> float:
        """Return the seconds of a block's ``forward`` or ``backward`` for a micro-batch on one of its ranks."""
        key = (block.layers, block.spans[shard] if block.spans else (), samples, kind)
        if key not in self._passes:
            time = self.profile.forward_time if kind == "forward" else self.profile.backward_time
            layers = range(*block.layers)
            shares = [block.fraction(chain, shard, i) for i in layers]
            self._passes[key] = sum(time(i, samples, s) for i, s in zip(layers, shares, strict=True))
        return self._passes[key]

    def update(self, chain: Chain, itemsize: int, blocks: list[Block], index: int) -> float:
        """Return the seconds of an optimizer step for blocks of one position on its rank number ``index``."""
        total = 0.0
        for block in blocks:
            if not block.spans:
                total += parameter_count(chain, block.layers)
                continue
            for i in range(*block.layers):
                total += chain.layers[i].parameter_count * block.fraction(chain, index, i)
        return total * itemsize * self.profile.update_s_per_byte

    def _loss_time(self, program: Program, rank: int, action: Action) -> float:
        """Half of the cross-entropy's time each for the score and the loss."""
        block = program.blocks[-1]
        shard = program.positions[-1].ranks.index(rank) if block.spans else 0
        width = length(block.features(program.chain, shard, "out"))
        samples = length(program.interval(block.index, action.micro_batch or 0, rank))
        return self.profile.loss_s_per_element * samples * width / 2

    def _update_time(self, program: Program, rank: int, position: int) -> float:
        own = [b for b in program.blocks if b.position == position]
        index = program.positions[position].ranks.index(rank)
        return self.update(program.chain, program.plan.itemsize, own, index)


def wire_bytes(operation: Operation) -> int:
    """Return the bytes that leave all participants together (ring collectives: Patarasu and Yuan, 2009)."""
    n = len(operation.ranks)
    if operation.kind == "send":
        return operation.bytes
    if operation.kind == "all_gather":
        return n * (n - 1) * operation.bytes
    return 2 * (n - 1) * operation.bytes
