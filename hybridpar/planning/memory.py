"""Memory per rank, counted on the program: the tensors that are alive after every action."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hybridpar.planning.blocks import Position
from hybridpar.planning.books import FIGURE_BYTES, Books
from hybridpar.planning.layout import length
from hybridpar.planning.parameters import bucket_elements, held_elements, parameter_count, reduction_of
from hybridpar.planning.program import METRICS, Program
from hybridpar.planning.zero import is_zero, keeps_no_bucket, part_elements, sharing


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank: of every tensor that the executor, the modules and the optimizer hold.

    Apart from step counters of optimizers (Adam has one number per parameter).
    """

    parameters: int
    """And buffers; those of batch norms twice where a step may be skipped, which takes them back."""
    gradients: int
    """In buckets, those that gather in place, and the own part of those that are sharded; they stay from step to
    step."""
    compression: int
    """What is sent instead of gradients, and the error feedback; it stays likewise."""
    optimizer: int
    """And the average of the weights. Of sharded state the own part, with DeepSpeed's copy of its parameters,
    unless it lies in the memory of a device's host."""
    batch: int
    """The step's own input samples, held all through it."""
    control: int
    """The labels of the step and those of the own samples, and the metrics."""
    saved: tuple[int, ...]
    """After every action: what the forward passes keep for their backward passes, by distinct storage.

    These are the tensors that autograd saves and the blocks' inputs, without parameters and the batch."""
    moving: tuple[int, ...]
    """After every action: outputs, gradients and arriving inputs between computations and communication, buckets
    that do not stay, figures of a sharded loss, and the norm."""
    accumulated: tuple[int, ...]
    """After every action: all other gradients. A block's first backward makes them; they go when the next
    step begins."""
    transient: tuple[int, ...]
    """In every action: what is alive beside all that was before it, and gone when it ends.

    In the backward of a recomputed block that is what the second forward keeps, and its output."""

    @property
    def persistent(self) -> int:
        """Bytes that stay all through the step."""
        return self.parameters + self.gradients + self.compression + self.optimizer + self.batch + self.control

    @property
    def alive(self) -> tuple[int, ...]:
        """Bytes of all tensors after every action."""
        moment = zip(self.saved, self.moving, self.accumulated, strict=True)
        return tuple(self.persistent + s + m + a for s, m, a in moment)

    @property
    def peak(self) -> int:
        """Most bytes alive at any time of the step, without the workspace of layers."""
        after = self.alive
        within = [b + t for b, t in zip((self.persistent, *after), self.transient, strict=False)]
        return max((*after, *within), default=self.persistent)


def memory(program: Program, rank: int) -> Memory:
    """Count the memory of a rank over a program. Workspace inside a layer is not included."""
    books = Books(program, rank)
    books.run()
    return memory_of(books)


def memory_of(books: Books) -> Memory:
    """Sum up the books of a rank."""
    program, rank = books.program, books.rank
    plan, chain = program.plan, program.chain
    parameters = gradients = compression = optimizer = 0
    for block in program.blocks:
        position = program.positions[block.position]
        if rank in position.ranks:
            parameters += held_elements(chain, position, block, rank) * plan.itemsize
            parameters += sum(layer.buffer_bytes for layer in chain.layers[slice(*block.layers)])
            if program.mode == "train" and plan.recipe.scaling:
                parameters += sum(n.buffer_bytes for n in chain.layers[slice(*block.layers)] if n.batch_norm)
            if program.mode == "train":
                own = bucket_elements(chain, position, block, rank) * plan.itemsize
                if not position.reduced:
                    gradients += sum(books.own[block.index].gathered) * plan.itemsize
                elif not keeps_no_bucket(plan, position):
                    gradients += own
                compression += sum(reduction_of(plan, chain, position, block, rank).held(plan.itemsize))
                optimizer += own * plan.recipe.average
                if not is_zero(plan, position):
                    optimizer += own * plan.recipe.optimizer_states
    if program.mode == "train":
        parts = [parts_of(program, p) for p in program.positions if rank in p.ranks and is_zero(plan, p)]
        gradients += sum(gradient for gradient, _ in parts)
        optimizer += sum(sum(sizes) for _, sizes in parts)
    batch, control = _read(program, rank)
    lists = books.saved, books.moving, books.accumulated, books.transient
    return Memory(parameters, gradients, compression, optimizer, batch, control, *map(tuple, lists))


def parts_of(program: Program, position: Position) -> tuple[int, tuple[int, ...]]:
    """Return the bytes of a rank's part of the gradients, and of what keeps its optimizer: tensor by tensor.

    Those are DeepSpeed's copy of the parameters and the states; or, where they lie on the host, a buffer for the
    largest gradient. The parameters themselves lie in a padded vector.
    """
    plan, chain = program.plan, program.chain
    part = part_elements(plan, chain, position) * plan.itemsize
    if plan.recipe.offload:
        trained = {p.name: p.count for layer in chain.layers[slice(*position.layers)] for p in layer.parameters}
        kept: tuple[int, ...] = (
            max((n for name, n in trained.items() if name not in chain.frozen), default=0) * plan.itemsize,
        )
    else:
        kept = (part,) * (1 + plan.recipe.optimizer_states)
    whole = parameter_count(chain, position.layers, trained=True) * plan.itemsize
    return part, (*kept, part * sharing(plan, position) - whole)


def _read(program: Program, rank: int) -> tuple[int, int]:
    """Return the bytes of the inputs that a rank reads, and of labels and metrics, or of what is predicted."""
    chain = program.chain
    reads = sum(length(i) for i in program.reads(rank))
    itemsize = program.plan.itemsize if chain.input_dtype == "float" else 8
    labelled = program.step_samples * 2 * program.best if program.mode == "predict" else reads
    control = ((program.step_samples + labelled) * chain.labels + len(METRICS)) * FIGURE_BYTES
    return reads * math.prod(chain.in_shape) * itemsize, control
