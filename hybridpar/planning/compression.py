"""Compressed sums of gradients: what is sent of a bucket instead of all of it. Lossy.

``bfloat16``: every rank rounds its gradients, and their sum is one of bfloat16 numbers.

``power_sgd`` (Vogels, Karimireddy and Jaggi, "PowerSGD: Practical Low-Rank Gradient Compression for Distributed
Optimization", NeurIPS 2019, arXiv 1905.13727, algorithm 1): of a matrix M, n x m, the sum over the ranks is
approximated by L R' of rank r. With R of the step before, ``L = orth(sum of M orth(R))`` and ``R = sum of M' L``
are two sums of (n + m) r elements instead of n m. With error feedback (algorithm 2) a rank adds
``M - L (M' L)'``, what its own M lost, to its next gradient. Tensors that are no matrices, and matrices that would
not become smaller, are summed as they are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

Method = Literal["bfloat16", "power_sgd"]
Sum = Literal["bucket", "lowered", "left", "rest", "right"]
SUMS: tuple[Sum, ...] = ("bucket", "lowered", "left", "rest", "right")
"""What is summed of a block's gradients: all as they are; all as bfloat16; all L; what is in no matrix; all R."""
Work = Literal["compress", "factor", "restore"]
WORKS: tuple[Work, ...] = ("compress", "factor", "restore")
"""Before the first sums, between those of L and R, after the last ones."""

LOWERED_ITEMSIZE = 2
"""Bytes of a bfloat16."""
ORTHOGONALISE = 4
"""Floating point operations of the orthonormal factor of an n x r matrix, per n r^2: Householder vectors, and the
factor made of them (Golub and Van Loan, "Matrix Computations", 4th edition, section 5.2)."""


@dataclass(frozen=True)
class Compression:
    """How gradients are compressed before they are summed over those who hold the same parameters."""

    method: Method
    rank: int = 4
    """Of ``power_sgd``, like all that follows: columns of L and R."""
    error_feedback: bool = True
    warmup_steps: int = 100
    """First steps of a training, in which gradients are summed as they are."""
    min_rate: float = 2.0
    """A matrix is compressed if that divides its elements by more than this."""

    def matrix(self, shape: tuple[int, ...]) -> Matrix | None:
        """Return the matrix that a gradient is compressed as, (shape[0], the rest); None: it is not compressed."""
        if self.method != "power_sgd" or len(shape) < 2:
            return None
        rows, columns = shape[0], math.prod(shape[1:])
        rank = min(self.rank, rows, columns)
        if rank and (rows + columns) * rank * self.min_rate < rows * columns:
            return Matrix(rows, columns, rank)
        return None

    def sent_bytes(self, shape: tuple[int, ...], itemsize: int) -> int:
        """Return the bytes of the sums of one gradient."""
        if self.method == "bfloat16":
            return math.prod(shape) * LOWERED_ITEMSIZE
        matrix = self.matrix(shape)
        return itemsize * (math.prod(shape) if matrix is None else (matrix.rows + matrix.columns) * matrix.rank)

    @property
    def first_step(self) -> int:
        """The first step, from 0, whose gradients are compressed."""
        return self.warmup_steps if self.method == "power_sgd" else 0

    @property
    def most_sums(self) -> int:
        """Sums that a bucket takes at most."""
        return 3 if self.method == "power_sgd" else 1

    def __str__(self) -> str:
        """Name the method, and what it is told."""
        if self.method != "power_sgd":
            return self.method
        feedback = "" if self.error_feedback else ", no error feedback"
        return f"power_sgd, rank {self.rank}{feedback}, from step {self.warmup_steps + 1} on"


class Matrix(NamedTuple):
    """A gradient that is summed as a product of two thin matrices."""

    rows: int
    columns: int
    rank: int

    @property
    def elements(self) -> int:
        """Of the whole matrix."""
        return self.rows * self.columns


@dataclass(frozen=True)
class Reduction:
    """How the gradients of one block are summed."""

    elements: int
    """All of them."""
    compression: Compression | None = None
    matrices: tuple[Matrix, ...] = ()
    undone: bool = False
    """Whether a step may be skipped, so that what the next one goes on from is copied before."""

    @property
    def compressed(self) -> bool:
        """Whether there is anything to compress."""
        return self.lowered or bool(self.matrices)

    @property
    def lowered(self) -> bool:
        """Whether the whole bucket becomes bfloat16."""
        return self.compression is not None and self.compression.method == "bfloat16" and self.elements > 0

    @property
    def left(self) -> int:
        """Elements of all L."""
        return sum(m.rows * m.rank for m in self.matrices)

    @property
    def right(self) -> int:
        """Elements of all R."""
        return sum(m.columns * m.rank for m in self.matrices)

    @property
    def rest(self) -> int:
        """Elements beside the matrices."""
        return self.elements - sum(m.elements for m in self.matrices)

    def sums(self, itemsize: int) -> tuple[tuple[Sum, int], ...]:
        """Return what is summed before anything is factored, and the bytes, in the order of their starts."""
        if self.lowered:
            return (("lowered", self.elements * LOWERED_ITEMSIZE),)
        if not self.matrices:
            return (("bucket", self.elements * itemsize),) if self.elements else ()
        rest: tuple[tuple[Sum, int], ...] = (("rest", self.rest * itemsize),) if self.rest else ()
        return (("left", self.left * itemsize), *rest)

    def all_sums(self, itemsize: int) -> tuple[int, ...]:
        """Return the bytes of every sum."""
        return (*(size for _, size in self.sums(itemsize)), *[self.right * itemsize] * bool(self.matrices))

    def held(self, itemsize: int) -> tuple[int, ...]:
        """Return the bytes of the tensors that stay from step to step beside the bucket."""
        if self.lowered:
            return (self.elements * LOWERED_ITEMSIZE,)
        if not self.matrices or self.compression is None:
            return ()
        errors = (self.elements - self.rest,) * self.compression.error_feedback
        copies = (*errors, self.right) * self.undone
        return tuple(n * itemsize for n in (*errors, self.left, self.right, *copies))

    def steps(self) -> tuple[Work, ...]:
        """Return what becomes of the gradients beside their sums."""
        if self.matrices:
            return WORKS
        return ("compress", "restore") if self.lowered else ()

    def workspace(self, kind: Work, itemsize: int) -> tuple[int, ...]:
        """Return the bytes that an action needs while it runs: copies of the largest factor that it turns."""
        if kind == "restore" or not self.matrices:
            return ()
        return (max((m.columns if kind == "compress" else m.rows) * m.rank for m in self.matrices) * itemsize,) * 2

    def work(self, kind: Work, itemsize: int) -> tuple[float, float]:
        """Return the floating point operations of an action and the bytes that it reads and writes."""
        if self.lowered:
            return 0.0, float(self.elements * (itemsize + LOWERED_ITEMSIZE))
        inside = self.elements - self.rest
        product = 2.0 * sum(m.elements * m.rank for m in self.matrices)
        if kind == "restore":
            return product, float(inside * itemsize)
        side = [m.columns if kind == "compress" else m.rows for m in self.matrices]
        turned = ORTHOGONALISE * sum(n * m.rank**2 for n, m in zip(side, self.matrices, strict=True))
        feedback = self.compression is not None and self.compression.error_feedback
        if kind == "compress":
            # The gradient is added to the error, which may be copied before, and the sum is read.
            return product + turned, float((1 + (3 + 2 * self.undone) * feedback) * inside * itemsize)
        return (1 + feedback) * product + turned, float((1 + 2 * feedback) * inside * itemsize)
