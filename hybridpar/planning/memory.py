"""Memory per rank, counted on the program: what is alive after every action."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

from hybridpar.model.chain import Chain
from hybridpar.planning.blocks import Block
from hybridpar.planning.layout import Interval, length
from hybridpar.planning.parameters import bucket_elements, is_zero
from hybridpar.planning.program import Action, Operation, Program

Key = tuple[int, int]
"""(block, micro-batch)."""
Value = tuple[str, Key]
"""What a rank holds: an input, an output, or the gradient of one."""


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
            own = bucket_elements(chain, position, block, rank) * plan.itemsize
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
def _kept_whole(layers: Interval, chain: Chain) -> _Kept:
    """Return what a block keeps that is not sharded, whatever its place in the plan."""
    return _kept(Block(0, 0, layers), 0, chain)


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
        self.alive: dict[Value, int] = {}
        self.in_transit: dict[int, int] = {}
        self.now_moving = 0
        """Bytes of ``alive`` and ``in_transit`` together."""
        self.last = len(program.blocks) - 1
        self.own = {b.index: _Own(program, b, rank) for b in program.blocks if rank in _ranks(program, b)}
        self.sources = [self._source(action) for action in program.actions[rank]]
        self.uses = Counter(source for source in self.sources if source is not None)
        """How often each output and input gradient is copied or sent."""

    def run(self) -> None:
        """Fill ``saved``, ``moving`` and ``transient``."""
        now_saved = 0
        for action, source in zip(self.program.actions[self.rank], self.sources, strict=True):
            kind, within = action.kind, 0
            if action.operation is not None:
                self._communicate(kind, self.program.operations[action.operation], source)
            elif kind == "copy":
                self._copy(action, source)
            else:
                key = (action.block or 0, action.micro_batch or 0)
                if kind == "forward":
                    now_saved += self._forward(key)
                elif kind == "backward":
                    now_saved -= self._backward(key)
                    within = self._recomputed(key)
                elif kind == "loss":
                    self._loss(key)
            self.saved.append(now_saved)
            self.transient.append(within)
            self.moving.append(self.now_moving)

    def _put(self, name: str, key: Key, size: int) -> None:
        self.alive[name, key] = size
        self.now_moving += size

    def _drop(self, name: str, key: Key) -> None:
        self.now_moving -= self.alive.pop((name, key), 0)

    def _source(self, action: Action) -> Value | None:
        """Return the output or input gradient that an action copies, sends or sums."""
        if action.kind == "copy" and action.transfer is not None:
            backward, boundary = action.content == "gradient", action.block or 0
            m = action.transfer.source_micro_batch
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

    def _forward(self, key: Key) -> int:
        block = key[0]
        own = self.own[block]
        samples, kept = own.samples[key[1]], own.kept
        total = 0 if own.recompute else kept.bytes(samples, self.itemsize)
        self._drop("input", key)
        if block > 0 and key not in self.shared:
            total += kept.input * samples * self.itemsize
        if not self.train:
            total = 0
        self.held[key] = total
        if self.uses["output", key] or block == self.last:
            counted = self.train and (kept.output_is_input if own.recompute else kept.output_kept)
            self._put("output", key, 0 if counted else own.out_bytes * samples)
        return total

    def _loss(self, key: Key) -> None:
        self._drop("output", key)
        if self.train:
            own = self.own[key[0]]
            self._put("gradient", key, own.out_bytes * own.samples[key[1]])

    def _backward(self, key: Key) -> int:
        self._drop("gradient", key)
        if key[0] > 0:
            own = self.own[key[0]]
            self._put("input gradient", key, own.in_bytes * own.samples[key[1]])
        return self.held.pop(key)

    def _recomputed(self, key: Key) -> int:
        """Return the bytes that live in the backward of a block only because it runs the forward again."""
        own = self.own[key[0]]
        if not own.recompute:
            return 0
        samples = own.samples[key[1]]
        output = 0 if own.kept.output_kept else own.out_bytes * samples
        return own.kept.bytes(samples, self.itemsize) + output

    def _arrive(self, content: str, boundary: int, micro_batch: int) -> None:
        """Make the buffer of an arriving input or gradient, once."""
        name, block = ("input", boundary + 1) if content == "activation" else ("gradient", boundary)
        key = (block, micro_batch)
        if (name, key) not in self.alive:
            own = self.own[block]
            self._put(name, key, (own.in_bytes if name == "input" else own.out_bytes) * own.samples[micro_batch])

    def _hand_over(self, source: Value, content: str, target: Key) -> None:
        """Let a value serve as the next one without a copy."""
        size = self.alive.pop(source)
        if content == "activation":
            if self.train and size == 0:
                self.shared.add(target)
            self.alive["input", target] = size
        else:
            self.alive["gradient", target] = size

    def _copy(self, action: Action, source: Value | None) -> None:
        transfer, boundary = action.transfer, action.block or 0
        assert transfer is not None
        assert source is not None
        self.uses[source] -= 1
        target = (boundary + (action.content == "activation"), transfer.target_micro_batch)
        if transfer.whole and not self.uses[source]:
            self._hand_over(source, str(action.content), target)
            return
        self._arrive(str(action.content), boundary, transfer.target_micro_batch)
        self._release(source)

    def _release(self, source: Value) -> None:
        if not self.uses[source]:
            self._drop(*source)

    def _communicate(self, kind: str, operation: Operation, source: Value | None) -> None:
        if kind == "wait":
            self.now_moving -= self.in_transit.pop(operation.index, 0)
            return
        block, transfer = operation.block or 0, operation.transfer
        if operation.content == "sum" and source is not None:
            self.uses[source] -= 1
            content = "gradient" if operation.backward else "activation"
            self._hand_over(source, content, (block + (not operation.backward), operation.micro_batch or 0))
        elif source is not None:
            self.uses[source] -= 1
            self._send(operation)
            self._release(source)
        elif transfer is not None:
            self._arrive(operation.content, block, transfer.target_micro_batch)
            if transfer.add:
                self._send(operation)

    def _send(self, operation: Operation) -> None:
        """Keep what travels until its wait."""
        self.in_transit[operation.index] = operation.bytes
        self.now_moving += operation.bytes


class _Own:
    """What a rank looks up about one of its blocks."""

    def __init__(self, program: Program, block: Block, rank: int) -> None:
        chain, itemsize = program.chain, program.plan.itemsize
        shard = _ranks(program, block).index(rank)
        self.recompute = block.recompute
        self.kept = _kept(block, shard, chain) if block.spans else _kept_whole(block.layers, chain)
        self.samples = [length(intervals[shard]) for intervals in program.micro_batches[block.position]]
        trailing = math.prod(block.shape(chain, "out")[1:])
        self.out_bytes = length(block.features(chain, shard, "out")) * trailing * itemsize
        """Per sample of the output, and of the input below."""
        self.in_bytes = self.kept.input * itemsize


def _ranks(program: Program, block: Block) -> tuple[int, ...]:
    return program.positions[block.position].ranks


def peak_per_rank(program: Program) -> tuple[int, ...]:
    """Return the peak bytes of every rank of the program's plan replica."""
    return tuple(memory(program, rank).peak for rank in range(program.plan.replica_world))
