"""Memory per rank, counted on the program: what is alive after every action."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from hybridpar.model.chain import Chain
from hybridpar.planning.blocks import Block, Position
from hybridpar.planning.compile import bucket_count, is_zero
from hybridpar.planning.layout import length
from hybridpar.planning.program import Action, Operation, Program

Key = tuple[int, int]
"""(block, micro-batch)."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank."""

    parameters: int
    """And buffers."""
    gradients: int
    optimizer: int
    batch: int
    """The step's own input samples, held all through it."""
    saved: tuple[int, ...]
    """After every action: what the forward passes keep for their backward passes, by distinct storage.

    These are the tensors that autograd saves and the blocks' inputs, without parameters and the batch."""
    moving: tuple[int, ...]
    """After every action: outputs, gradients and arriving inputs between computations and communication."""
    transient: tuple[int, ...]
    """In every action: what is alive beside all that was before it, and gone when it ends.

    In the backward of a recomputed block that is what the second forward keeps, and its output."""

    @property
    def persistent(self) -> int:
        """Bytes that stay from step to step, and the batch."""
        return self.parameters + self.gradients + self.optimizer + self.batch

    @property
    def peak(self) -> int:
        """Most bytes alive at any time of the step."""
        after = [s + m for s, m in zip(self.saved, self.moving, strict=True)]
        within = [b + t for b, t in zip((0, *after), self.transient, strict=False)]
        return self.persistent + max(after + within, default=0)


def memory(program: Program, rank: int) -> Memory:
    """Count the memory of a rank over a program. Transient workspace inside a layer is not included."""
    plan, chain = program.plan, program.chain
    parameters = gradients = optimizer = 0
    for block in program.blocks:
        position = program.positions[block.position]
        if rank in position.ranks:
            own = _owned_elements(block, position, rank, chain) * plan.itemsize
            parameters += own + sum(layer.buffer_bytes for layer in chain.layers[slice(*block.layers)])
            if program.mode == "train":
                gradients += own
                states = own * plan.recipe.optimizer_states
                optimizer += -(-states // len(position.ranks)) if is_zero(plan, position) else states
    reads = sum(length(i) for i in program.reads(rank))
    itemsize = plan.itemsize if chain.input_dtype == "float" else 8
    walk = _Walk(program, rank)
    walk.run()
    batch = reads * math.prod(chain.in_shape) * itemsize
    return Memory(
        parameters, gradients, optimizer, batch, tuple(walk.saved), tuple(walk.moving), tuple(walk.transient)
    )


def _owned_elements(block: Block, position: Position, rank: int, chain: Chain) -> int:
    """Parameter elements of a block on one of its ranks."""
    if not block.spans:
        return bucket_count(chain, position, block)
    shard, total = position.ranks.index(rank), 0
    for span, layer in zip(block.spans[shard], chain.layers[slice(*block.layers)], strict=False):
        if layer.linear is None:
            continue
        rows, columns, bias = layer.linear.out_features, layer.linear.in_features, layer.linear.bias
        if span.mode == "column":
            total += length(span.outputs) * (columns + bias)
        else:
            total += length(span.inputs) * rows + rows * bias * (shard == 0)
    return total


@dataclass(frozen=True)
class _Kept:
    """What a block's forward keeps, per (elements per sample, bytes per sample, elements, bytes)."""

    inside: tuple[int, int, int, int]
    """Everything but the input."""
    input: int
    """Elements per sample of the input."""
    output_kept: bool
    """The output's storage is among what is kept (or is the input itself)."""
    output_is_input: bool

    def bytes(self, samples: int, itemsize: int) -> int:
        """Return the bytes inside for a micro-batch."""
        elements, own_bytes, constant, constant_bytes = self.inside
        return (elements * samples + constant) * itemsize + own_bytes * samples + constant_bytes


@lru_cache(maxsize=4096)
def _kept(block: Block, shard: int, chain: Chain) -> _Kept:
    """Follow the storages through a block: views share one, and what is saved twice counts once."""
    elements = own_bytes = constant = constant_bytes = 0
    entering = length(block.features(chain, shard, "in")) * math.prod(block.shape(chain, "in")[1:])
    current, sizes, saved = 0, {0: entering}, {0}
    for offset, layer in enumerate(chain.layers[slice(*block.layers)]):
        width = length(block.spans[shard][offset].outputs) if block.spans else layer.out_shape[0]
        if layer.saves_input:
            saved.add(current)
        if not layer.aliases_input:
            current = len(sizes)
            sizes[current] = width * math.prod(layer.out_shape[1:])
        if layer.saves_output:
            saved.add(current)
        share = width / layer.out_shape[0]
        elements += round(layer.saved.elements_per_sample * share)
        own_bytes += round(layer.saved.bytes_per_sample * share)
        constant += layer.saved.elements
        constant_bytes += layer.saved.bytes
    elements += sum(sizes[s] for s in saved if s != 0)
    return _Kept((elements, own_bytes, constant, constant_bytes), entering, current in saved, current == 0)


class _Walk:
    """Replays a rank's actions and keeps books as the executor does."""

    def __init__(self, program: Program, rank: int) -> None:
        self.program, self.rank = program, rank
        self.itemsize = program.plan.itemsize
        self.train = program.mode == "train"
        self.saved: list[int] = []
        self.moving: list[int] = []
        self.transient: list[int] = []
        self.held: dict[Key, int] = {}
        self.shared: set[Key] = set()
        self.alive: dict[tuple[str, Key], int] = {}
        self.in_transit: dict[int, int] = {}
        self.uses = self._uses()

    def run(self) -> None:
        """Fill ``saved`` and ``moving``."""
        now_saved = 0
        for action in self.program.actions[self.rank]:
            key, within = (action.block or 0, action.micro_batch or 0), 0
            if action.kind == "forward":
                now_saved += self._forward(key)
            elif action.kind == "backward":
                now_saved -= self._backward(key)
                within = self._recomputed(key)
            elif action.kind == "loss":
                self._loss(key)
            elif action.kind == "copy":
                self._copy(action)
            elif action.operation is not None:
                self._communicate(action, self.program.operations[action.operation])
            self.saved.append(now_saved)
            self.transient.append(within)
            self.moving.append(sum(self.alive.values()) + sum(self.in_transit.values()))

    def _uses(self) -> Counter[tuple[str, Key]]:
        """Count how often each output and input gradient is copied or sent."""
        uses: Counter[tuple[str, Key]] = Counter()
        for action in self.program.actions[self.rank]:
            source = self._source(action)
            if source is not None:
                uses[source] += 1
        return uses

    def _source(self, action: Action) -> tuple[str, Key] | None:
        if action.kind == "copy" and action.transfer is not None:
            backward, boundary, m = (
                action.content == "gradient",
                action.block or 0,
                action.transfer.source_micro_batch,
            )
        elif action.kind == "start" and action.operation is not None:
            operation = self.program.operations[action.operation]
            backward, boundary = operation.content == "gradient" or operation.backward, operation.block or 0
            if operation.transfer is not None and operation.transfer.source == self.rank:
                m = operation.transfer.source_micro_batch
            elif operation.content == "sum":
                m = operation.micro_batch or 0
            else:
                return None
        else:
            return None
        return ("input gradient", (boundary + 1, m)) if backward else ("output", (boundary, m))

    def _samples(self, key: Key) -> int:
        return length(self.program.interval(*key, self.rank))

    def _shard(self, block: int) -> int:
        return self.program.positions[self.program.blocks[block].position].ranks.index(self.rank)

    def _value_bytes(self, block: int, side: str, samples: int) -> int:
        described, chain = self.program.blocks[block], self.program.chain
        where: Literal["in", "out"] = "in" if side == "in" else "out"
        features = described.features(chain, self._shard(block), where)
        trailing = described.shape(chain, where)[1:]
        return samples * length(features) * math.prod(trailing) * self.itemsize

    def _forward(self, key: Key) -> int:
        block, samples = key[0], self._samples(key)
        described = self.program.blocks[block]
        kept = _kept(described, self._shard(block), self.program.chain)
        total = 0 if described.recompute else kept.bytes(samples, self.itemsize)
        self.alive.pop(("input", key), None)
        if block > 0 and key not in self.shared:
            total += kept.input * samples * self.itemsize
        if not self.train:
            total = 0
        self.held[key] = total
        if self.uses["output", key] or block == len(self.program.blocks) - 1:
            counted = self.train and (kept.output_is_input if described.recompute else kept.output_kept)
            self.alive["output", key] = 0 if counted else self._value_bytes(block, "out", samples)
        return total

    def _loss(self, key: Key) -> None:
        self.alive.pop(("output", key), None)
        if self.train:
            self.alive["gradient", key] = self._value_bytes(key[0], "out", self._samples(key))

    def _backward(self, key: Key) -> int:
        self.alive.pop(("gradient", key), None)
        if key[0] > 0:
            self.alive["input gradient", key] = self._value_bytes(key[0], "in", self._samples(key))
        return self.held.pop(key)

    def _recomputed(self, key: Key) -> int:
        """Return the bytes that live in the backward of a block only because it runs the forward again."""
        described, samples = self.program.blocks[key[0]], self._samples(key)
        if not described.recompute:
            return 0
        kept = _kept(described, self._shard(key[0]), self.program.chain)
        output = 0 if kept.output_kept else self._value_bytes(key[0], "out", samples)
        return kept.bytes(samples, self.itemsize) + output

    def _arrive(self, content: str, boundary: int, micro_batch: int) -> None:
        """Make the buffer of an arriving input or gradient, once."""
        key = (boundary + 1, micro_batch) if content == "activation" else (boundary, micro_batch)
        name, side = ("input", "in") if content == "activation" else ("gradient", "out")
        if (name, key) not in self.alive:
            self.alive[name, key] = self._value_bytes(key[0], side, self._samples(key))

    def _hand_over(self, source: tuple[str, Key], content: str, target: Key) -> None:
        """Let a value serve as the next one without a copy."""
        size = self.alive.pop(source)
        if content == "activation":
            if self.train and size == 0:
                self.shared.add(target)
            self.alive["input", target] = size
        else:
            self.alive["gradient", target] = size

    def _copy(self, action: Action) -> None:
        transfer, boundary = action.transfer, action.block or 0
        source = self._source(action)
        assert transfer is not None
        assert source is not None
        self.uses[source] -= 1
        target = (boundary + (action.content == "activation"), transfer.target_micro_batch)
        if transfer.whole and not self.uses[source]:
            self._hand_over(source, str(action.content), target)
            return
        self._arrive(str(action.content), boundary, transfer.target_micro_batch)
        self._release(source)

    def _release(self, source: tuple[str, Key]) -> None:
        if not self.uses[source]:
            self.alive.pop(source, None)

    def _communicate(self, action: Action, operation: Operation) -> None:
        block, m = operation.block or 0, operation.micro_batch or 0
        if action.kind == "wait":
            self.in_transit.pop(operation.index, None)
            return
        source = self._source(action)
        if operation.content == "sum" and source is not None:
            self.uses[source] -= 1
            content = "gradient" if operation.backward else "activation"
            self._hand_over(source, content, (block + (not operation.backward), m))
        elif source is not None:
            self.uses[source] -= 1
            self.in_transit[operation.index] = operation.bytes
            self._release(source)
        elif operation.transfer is not None:
            self._arrive(operation.content, block, operation.transfer.target_micro_batch)
            if operation.transfer.add:
                self.in_transit[operation.index] = operation.bytes


def peak_per_rank(program: Program) -> tuple[int, ...]:
    """Return the peak bytes of every rank."""
    return tuple(memory(program, rank).peak for rank in range(program.plan.world))
