"""The program: for every rank of a plan replica, the ordered list of actions of one step.

It is data: printed, checked, simulated, drawn and executed. Every communication is an operation in it, with
communicator, participants and bytes, started and waited for by actions. Ranks in it are numbered in the replica.
The replicas of a plan run a program each, on their own samples, and meet in the operations ``across``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

from hybridpar.model.chain import Chain
from hybridpar.planning.blocks import Block, Position
from hybridpar.planning.communicators import Communicator
from hybridpar.planning.layout import Interval, Transfer, length
from hybridpar.planning.plan import Plan

Mode = Literal["train", "evaluate", "predict"]
"""predict: labels and losses are left out, and every rank gets the classes of the largest logits."""

OperationKind = Literal["send", "broadcast", "all_reduce", "reduce_scatter", "all_gather", "sharded_update"]

Content = Literal[
    "activation",
    "gradient",
    "label",
    "sum",
    "bucket",
    "lowered",
    "left",
    "rest",
    "right",
    "moments",
    "statistics",
    "weight",
    "norm",
    "metrics",
    "best",
    "zero",
    "running_statistics",
]
"""What an operation moves.

activation, gradient: a transfer of an exchange. label: all labels of the step, of which the loss takes its own and
the global weight. sum: summands of a tail's value, forward or backward. bucket: gradients of a block's parameters,
of which each rank gets the whole sum, or, by a reduce-scatter, that of its own part.
lowered, left, rest, right: the same, compressed (``hybridpar.planning.compression``).
moments: statistics of a synchronised batch norm, and in its backward the sums that its gradient needs; see
:mod:`hybridpar.planning.moments`.
statistics: the figures per label of a sharded cross-entropy. norm: squared norm of all gradients, to clip by it
and to see whether they are finite. metrics: loss and hits. best: of a prediction the largest logits
of all samples, and their classes. zero: an update of a rank's part of sharded state,
after which DeepSpeed gathers the parameters. running_statistics: buffers of batch norms, averaged over the
replicas before an evaluation. No program holds it, as it happens between two steps.
"""

ActionKind = Literal[
    "load",
    "forward",
    "score",
    "loss",
    "backward",
    "copy",
    "start",
    "wait",
    "compress",
    "factor",
    "restore",
    "norm",
    "update",
]
"""compress, factor, restore: what becomes of a block's gradients before, between and after compressed sums."""

STATISTICS: dict[Mode, int] = {"train": 3, "evaluate": 3 + 2 * 5, "predict": 0}
"""Figures per label that shards of logits exchange: largest logit, sum of exponentials, target's logit; for
evaluation also the five largest logits and their classes; for a prediction only as many as are asked for."""

METRICS = ("loss_sum", "weight", "samples", "top1", "top5")
"""What the metrics operation sums over all ranks that see logits, for every rank, in float64."""


@dataclass(frozen=True, slots=True)
class Operation:
    """One communication between ranks.

    ``block`` is the boundary's earlier block for transfers, the block for sums and gradients, the position's index
    for ``zero``. ``micro_batch`` is of a bucket the round in which it is reduced. ``bytes`` is the payload: of the
    message for a send, of each rank's contribution for a collective.
    """

    index: int
    kind: OperationKind
    content: Content
    communicator: str
    ranks: tuple[int, ...]
    """Of a send: (source, target). Of a broadcast the first one is who gives."""
    bytes: int
    block: int | None = None
    micro_batch: int | None = None
    transfer: Transfer | None = None
    backward: bool = False
    """A sum of input gradients rather than of outputs; moments of a backward."""
    across: bool = False
    """The participants are ``ranks`` in every plan replica, of which there are several."""
    norm: int | None = None
    """Of moments: the block's batch norm that needs them, in the order of the forward's calls."""

    @property
    def alone(self) -> bool:
        """Whether there is one participant only, so that nothing needs to be done."""
        return len(self.ranks) == 1 and not self.across

    @property
    def place(self) -> tuple[str, Content, int | None, bool, int | None]:
        """What tells an operation across replicas from the others of a step; its index may differ by replica."""
        return self.communicator, self.content, self.block, self.backward, self.norm


class Action(NamedTuple):
    """One thing a rank does. ``block`` is a position index for updates; ``transfer`` belongs to copies."""

    kind: ActionKind
    block: int | None = None
    micro_batch: int | None = None
    operation: int | None = None
    content: Content | None = None
    transfer: Transfer | None = None


@dataclass(frozen=True, eq=False)
class Program:
    """The actions of one step for every rank of a plan replica, and what they refer to."""

    plan: Plan
    chain: Chain
    samples: int
    """Of this replica; 0 where a small step has none for it."""
    mode: Mode
    positions: tuple[Position, ...]
    blocks: tuple[Block, ...]
    operations: tuple[Operation, ...]
    actions: tuple[tuple[Action, ...], ...]
    communicators: tuple[Communicator, ...]
    sequence: tuple[int, ...]
    """The rank of every action, in one order of all of them in which none waits for a later one."""
    replica: int
    """Which one of the plan's."""
    step_samples: int
    """Of all replicas."""
    first: int
    """Where this replica's samples begin among those of the step."""
    best: int = 0
    """Of a prediction the number of classes per label."""

    @property
    def figures(self) -> int:
        """Figures per label that shards of logits exchange."""
        return STATISTICS[self.mode] + 2 * self.best

    @cached_property
    def micro_batches(self) -> tuple[tuple[tuple[Interval, ...], ...], ...]:
        """Work-number intervals in the replica: [position][micro-batch][index in the position's ranks]."""
        return tuple(p.micro_batches(self.samples) for p in self.positions)

    def interval(self, block: int, micro_batch: int, rank: int) -> Interval:
        """Return the work numbers, counted in the replica, of a rank's micro-batch in a block."""
        position = self.positions[self.blocks[block].position]
        return self.micro_batches[position.index][micro_batch][position.ranks.index(rank)]

    def numbers(self, block: int, micro_batch: int, rank: int) -> Interval:
        """Return the work numbers, counted over all replicas, of a rank's micro-batch in a block."""
        start, stop = self.interval(block, micro_batch, rank)
        return self.first + start, self.first + stop

    def works(self, block: int, micro_batch: int, rank: int) -> bool:
        """Whether a rank has samples of a micro-batch; a replica without any in the step has no micro-batches."""
        chunks = self.micro_batches[self.blocks[block].position]
        return micro_batch < len(chunks) and length(self.interval(block, micro_batch, rank)) > 0

    def participants(self, operation: Operation) -> int:
        """Return how many ranks take part in an operation, of all replicas."""
        return len(operation.ranks) * (self.plan.replicas if operation.across else 1)

    def reads(self, rank: int) -> tuple[Interval, ...]:
        """Return the work numbers, over all replicas, whose inputs and labels the rank reads; most read none."""
        first = self.positions[0]
        if rank not in first.ranks:
            return ()
        own = first.ranks.index(rank)
        at = self.first
        return tuple((at + m[own][0], at + m[own][1]) for m in self.micro_batches[0] if m[own][1] > m[own][0])

    def describe(self, action: Action) -> str:
        """Return a printable name: ``forward front.0 micro-batch 3``."""
        if action.operation is not None:
            operation = self.operations[action.operation]
            where = "" if operation.block is None else f" at {self._place(operation.block)}"
            part = "" if operation.micro_batch is None else f" micro-batch {operation.micro_batch}"
            part += "" if operation.norm is None else f" norm {operation.norm}" + " backward" * operation.backward
            ranks = ">".join(map(str, operation.ranks)) if operation.kind == "send" else operation.communicator
            return f"{action.kind} {operation.kind} of {operation.content}{where}{part} ({ranks})"
        if action.kind == "update":
            return f"update {self.positions[action.block or 0].name}"
        if action.block is None:
            return action.kind
        part = "" if action.micro_batch is None else f" micro-batch {action.micro_batch}"
        return f"{action.kind} {self._place(action.block)}{part}"

    def _place(self, block: int) -> str:
        position = self.positions[self.blocks[block].position]
        first, last = self.blocks[block].layers
        if first == last:
            return f"{position.name} (loss)"
        return f"{position.name} ({self.chain.layers[first].name}..{self.chain.layers[last - 1].name})"
