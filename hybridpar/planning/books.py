"""The books of a rank's memory: what is alive after every action of a program, storage by storage."""

from __future__ import annotations

import math
from collections import Counter

from hybridpar.model.chain import Chain
from hybridpar.planning.blocks import Block
from hybridpar.planning.kept import kept
from hybridpar.planning.layout import Transfer, length
from hybridpar.planning.moments import calls
from hybridpar.planning.parameters import bucket_elements
from hybridpar.planning.program import Action, Operation, Program
from hybridpar.planning.workspaces import MAPPED_BYTES
from hybridpar.planning.zero import keeps_no_bucket, piece_elements

Key = tuple[int, int]
"""(block, micro-batch)."""
Value = tuple[str, Key]
"""What a rank holds: an input, an output, the gradient of one, figures of the loss, or gradients to be reduced."""
FIGURE_BYTES = 8
"""Of a label, a metric and a norm."""


class Storage:
    """Some bytes, and how many forwards keep them and how many values they are at the moment."""

    __slots__ = ("kept", "size", "used")

    def __init__(self, size: int) -> None:
        self.size, self.kept, self.used = size, 0, 0


class Books:
    """Replays a rank's actions and keeps books as the executor does."""

    def __init__(self, program: Program, rank: int) -> None:
        self.program, self.rank = program, rank
        self.itemsize = program.plan.itemsize
        self.train = program.mode == "train"
        self.saved: list[int] = []
        self.moving: list[int] = []
        self.accumulated: list[int] = []
        self.transient: list[int] = []
        self.large: list[int] = []
        """After every action: of saved and moving, what lies in storages from ``MAPPED_BYTES`` on."""
        self.fresh: list[bool] = []
        """Of every action: whether it is a backward that finds no gradients of its parameters."""
        self.now_saved = self.now_moving = self.now_accumulated = self.now_large = 0
        self.held: dict[Key, tuple[list[Storage], int, int]] = {}
        """Storages that a forward shares with values, and the bytes of the others, all and large ones."""
        self.values: dict[Value, Storage] = {}
        self.in_transit: dict[int, Storage] = {}
        self.last = len(program.blocks) - 1
        self.own = {b.index: Own(program, b, rank) for b in program.blocks if rank in ranks_of(program, b)}
        self.sources = [self._source(action) for action in program.actions[rank]]
        self.uses = Counter(source for source in self.sources if source is not None)
        """How often each output and input gradient is copied or sent."""

    def run(self) -> None:
        """Fill the lists."""
        operations = self.program.operations
        for action, source in zip(self.program.actions[self.rank], self.sources, strict=True):
            kind, within, fresh = action.kind, 0, False
            if action.operation is not None:
                operation = operations[action.operation]
                self._communicate(kind, operation, source)
                within = self._meeting(operation) if kind == "start" else 0
            elif kind == "copy":
                self._copy(action, source)
            elif kind == "norm":
                self.now_moving += FIGURE_BYTES
            elif kind == "update":
                within = self._collected(action.block or 0)
            else:
                key = (action.block or 0, action.micro_batch or 0)
                if kind == "forward":
                    self._forward(key)
                elif kind == "backward":
                    fresh = self._backward(key)
                    within = self._recomputed(key)
                elif kind == "score":
                    self._put("figures", key, Storage(self._figure_bytes(key)))
                elif kind == "loss":
                    self._loss(key)
            self.saved.append(self.now_saved)
            self.moving.append(self.now_moving)
            self.accumulated.append(self.now_accumulated)
            self.transient.append(within)
            self.large.append(self.now_large)
            self.fresh.append(fresh)

    # Storages: what a forward keeps counts as saved, whatever else it is

    def _keep(self, storage: Storage) -> None:
        if not storage.kept:
            self.now_saved += storage.size
            if storage.used:
                self.now_moving -= storage.size
            elif storage.size >= MAPPED_BYTES:
                self.now_large += storage.size
        storage.kept += 1

    def _keep_no_more(self, storage: Storage) -> None:
        storage.kept -= 1
        if not storage.kept:
            self.now_saved -= storage.size
            if storage.used:
                self.now_moving += storage.size
            elif storage.size >= MAPPED_BYTES:
                self.now_large -= storage.size

    def _use(self, storage: Storage) -> None:
        if not storage.used and not storage.kept:
            self.now_moving += storage.size
            if storage.size >= MAPPED_BYTES:
                self.now_large += storage.size
        storage.used += 1

    def _use_no_more(self, storage: Storage) -> None:
        storage.used -= 1
        if not storage.used and not storage.kept:
            self.now_moving -= storage.size
            if storage.size >= MAPPED_BYTES:
                self.now_large -= storage.size

    def _put(self, name: str, key: Key, storage: Storage) -> None:
        self.values[name, key] = storage
        self._use(storage)

    def _drop(self, name: str, key: Key) -> None:
        storage = self.values.pop((name, key), None)
        if storage is not None:
            self._use_no_more(storage)

    # Computation

    def _forward(self, key: Key) -> None:
        own, first = self.own[key[0]], key[0] == 0
        samples, described = own.samples[key[1]], own.kept
        entering = None if first else self.values.get(("input", key)) or Storage(own.in_bytes * samples)
        out = entering if described.output_is_input else Storage(own.out_bytes * samples)
        if self.train and own.block.backward:
            shared = [] if entering is None else [entering]
            if not own.recompute and described.output_kept and out is not None and out is not entering:
                shared.append(out)
            for storage in shared:
                self._keep(storage)
            inside = (own.met_bytes, 0) if own.recompute else own.inside(samples)
            self.held[key] = shared, *inside
            self.now_saved += inside[0]
            self.now_large += inside[1]
        if self.uses["output", key] or key[0] == self.last:
            self._put("output", key, out or Storage(0))  # without a storage of its own it is the batch's
        self._drop("input", key)

    def _figure_bytes(self, key: Key) -> int:
        if not self.program.positions[-1].sharded:
            return 0
        labels = self.own[key[0]].samples[key[1]] * self.program.chain.labels
        return self.program.figures * self.itemsize * labels

    def _loss(self, key: Key) -> None:
        self._drop("output", key)
        self._drop("figures", key)
        if self.train:
            own = self.own[key[0]]
            self._put("gradient", key, Storage(own.out_bytes * own.samples[key[1]]))

    def _backward(self, key: Key) -> bool:
        """Return whether it is the first one that makes the gradients of its block."""
        own = self.own[key[0]]
        if own.block.answers:
            self._put("input gradient", key, Storage(own.in_bytes * own.samples[key[1]]))
        self._drop("gradient", key)
        for index in own.filled:
            self._gather_bucket(self.own[index])
        shared, inside, large = self.held.pop(key)
        for storage in shared:
            self._keep_no_more(storage)
        self.now_saved -= inside
        self.now_large -= large
        fresh, own.makes_gradients = own.makes_gradients, False
        self.now_accumulated += own.gradient_bytes * fresh
        return fresh

    def _gather_bucket(self, own: Own) -> None:
        """Make the bucket of a block that keeps none, unless it is there."""
        place = "bucket", (own.block.index, 0)
        if own.bucket_bytes is not None and place not in self.values:
            self._put(*place, Storage(own.bucket_bytes))

    def _recomputed(self, key: Key) -> int:
        """Return the bytes that live in the backward of a block only because it runs the forward again."""
        own = self.own[key[0]]
        if not own.recompute:
            return 0
        samples = own.samples[key[1]]
        return own.inside(samples)[0] + own.out_bytes * samples * (not own.kept.output_is_input)

    def _collected(self, position: int) -> int:
        """Return the bytes of the optimizer's state of sampled classes, collected for an update."""
        heads = sum(own.head for own in self.own.values() if own.block.position == position)
        return heads * self.program.plan.recipe.optimizer_states * self.itemsize

    # Exchange

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

    @staticmethod
    def _target(content: str, boundary: int, micro_batch: int) -> Value:
        if content == "activation":
            return "input", (boundary + 1, micro_batch)
        return "gradient", (boundary, micro_batch)

    def _arrive(self, target: Value) -> None:
        """Make the buffer of an arriving input or gradient, once."""
        if target not in self.values:
            name, key = target
            own = self.own[key[0]]
            size = own.in_bytes if name == "input" else own.out_bytes
            self._put(name, key, Storage(size * own.samples[key[1]]))

    def _copy(self, action: Action, source: Value | None) -> None:
        transfer = action.transfer
        assert transfer is not None
        assert source is not None
        target = self._target(str(action.content), action.block or 0, transfer.target_micro_batch)
        if transfer.whole:
            self._put(*target, self.values[source])
        else:
            self._arrive(target)
        self._used(source)

    def _used(self, source: Value) -> None:
        """Let go of a value after its last use."""
        self.uses[source] -= 1
        if not self.uses[source]:
            self._drop(*source)

    def _communicate(self, kind: str, operation: Operation, source: Value | None) -> None:
        if kind == "wait":
            storage = self.in_transit.pop(operation.index, None)
            if storage is not None:
                self._use_no_more(storage)
            self._drop("piece", (operation.index, 0))
            return
        block, transfer = operation.block or 0, operation.transfer
        if operation.content == "statistics":
            self._gather(operation)
        elif operation.content == "bucket":
            self._reduce(operation)
        elif operation.content == "sum" and source is not None:
            content = "gradient" if operation.backward else "activation"
            self._put(*self._target(content, block, operation.micro_batch or 0), self.values[source])
            self._used(source)
        elif source is not None and transfer is not None:
            value = self.values[source]
            whole = self._contiguous(transfer, block, source[1][0], source[0] == "output")
            self._travel(operation, value if whole else Storage(operation.bytes))
            self._used(source)
        elif transfer is not None:
            target = self._target(operation.content, block, transfer.target_micro_batch)
            self._arrive(target)
            if transfer.add or not self._contiguous(transfer, block, target[1][0], target[0] == "gradient"):
                self._travel(operation, Storage(operation.bytes))

    def _reduce(self, operation: Operation) -> None:
        """A bucket that does not stay travels; of a later round what arrives is added to what is there."""
        own = self.own[operation.block or 0]
        if own.bucket_bytes is None:
            return
        self._gather_bucket(own)
        self._travel(operation, self.values["bucket", (own.block.index, 0)])
        self._drop("bucket", (own.block.index, 0))
        if operation.micro_batch:
            self._put("piece", (operation.index, 0), Storage(own.piece_bytes))

    def _gather(self, operation: Operation) -> None:
        """All shards' figures arrive beside the own ones."""
        name, key = "figures", (operation.block or 0, operation.micro_batch or 0)
        self._travel(operation, self.values[name, key])
        self._drop(name, key)
        self._put(name, key, Storage(operation.bytes * len(operation.ranks)))

    def _meeting(self, operation: Operation) -> int:
        """Return the bytes of what batch norms tell each other while they do."""
        if operation.content != "moments":
            return 0
        gathered = self.program.participants(operation) if operation.kind == "all_gather" else 0
        return operation.bytes * (1 + gathered)

    def _contiguous(self, transfer: Transfer, boundary: int, block: int, is_output: bool) -> bool:
        """Whether a transfer's part of a value of ``block`` is one run of memory."""
        own = self.own[block]
        width, rows = (own.out_features, own.out_rows) if is_output else (own.in_features, own.in_rows)
        last = self.program.blocks[boundary].out_last(self.program.chain)
        return length(transfer.features) == width or (length(transfer.samples) * rows <= 1 and not last)

    def _travel(self, operation: Operation, storage: Storage) -> None:
        """Hold a storage until the operation's wait."""
        self.in_transit[operation.index] = storage
        self._use(storage)


class Own:
    """What a rank looks up about one of its blocks."""

    def __init__(self, program: Program, block: Block, rank: int) -> None:
        chain, self.itemsize = program.chain, program.plan.itemsize
        position = program.positions[block.position]
        self.shard = position.ranks.index(rank)
        self.block, self.recompute = block, block.recompute
        self.kept = kept(block, self.shard, chain)
        self.samples = [length(intervals[self.shard]) for intervals in program.micro_batches[block.position]]
        self.out_features = length(block.features(chain, self.shard, "out"))
        self.in_features = length(block.features(chain, self.shard, "in"))
        self.out_rows, self.in_rows = _rows(chain, block.point("out")), _rows(chain, block.point("in"))
        trailing = block.trailing(chain, "out")
        self.out_bytes = self.out_features * trailing * block.out_itemsize(chain, self.itemsize)
        """Per sample of the output, and of the input below."""
        self.gathered, self.head = self.kept.gathered, 0
        """Elements of each tensor for gradients that gather in place; and of the expected classes of a sampled
        head, which has its copy of them, and their gradient."""
        if block.sampled is not None:
            self.out_bytes = round(self.out_bytes * block.sampled)
            self.head = round(self.gathered[-1] * block.sampled)
            self.gathered = (*self.gathered[:-1], self.head, self.head)
        self.in_bytes = self.kept.bytes(0, self.itemsize)
        self.makes_gradients = program.mode == "train" and not position.reduced
        self.gradient_bytes = 0
        if self.makes_gradients:
            elements = bucket_elements(chain, position, block, rank) - sum(self.kept.gathered)
            self.gradient_bytes = elements * self.itemsize
        self.met_bytes = 0
        """What the batch norms of a recomputed block are told in its first forward, for the second one."""
        if block.recompute:
            met = calls(position, block, chain, backward=False)
            self.met_bytes = sum(call.norm.figures for call in met) * self.itemsize
        self.filled = _filled(program, block)
        """Blocks into whose buckets its backward puts gradients."""
        self.bucket_bytes: int | None = None
        """Of a bucket that goes when it is reduced; None: there is none, or it stays."""
        self.piece_bytes = 0
        """What the rank gets of it."""
        if keeps_no_bucket(program.plan, position):
            self.bucket_bytes = bucket_elements(chain, position, block, rank) * self.itemsize
            self.piece_bytes = piece_elements(program.plan, chain, position, block, rank) * self.itemsize
        self._inside: dict[int, tuple[int, int]] = {}

    def inside(self, samples: int) -> tuple[int, int]:
        """Return the bytes that a forward keeps apart from input and output: all, and those in large storages."""
        if samples not in self._inside:
            sizes = self.kept.inside(samples, self.itemsize)
            self._inside[samples] = sum(sizes), sum(s for s in sizes if s >= MAPPED_BYTES)
        return self._inside[samples]


def _filled(program: Program, block: Block) -> tuple[int, ...]:
    """Return a block, and those to which trained parameters belong that it shares with earlier layers."""
    chain, (start, stop) = program.chain, block.layers
    shared = {name: layers for name, layers in chain.tied if name not in chain.frozen}
    homes = [layers[0] for layers in shared.values() if any(start <= i < stop for i in layers)]
    others = (b.index for b in program.blocks for i in homes if b.layers[0] <= i < b.layers[1])
    return tuple(dict.fromkeys((block.index, *others)))


def _rows(chain: Chain, point: int) -> int:
    """Return how many rows of features a sample has: its tokens."""
    return math.prod(chain.shape(point)[: chain.axes[point]])


def ranks_of(program: Program, block: Block) -> tuple[int, ...]:
    """Return the ranks that run a block."""
    return program.positions[block.position].ranks
