"""Compressed gradients on a rank: what ``hybridpar.planning.compression`` describes, on a bucket's tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch

from hybridpar.planning.compression import Compression, Matrix, Sum
from hybridpar.runtime.modules import Owned


class Compressor(Protocol):
    """What becomes of the gradients of one block before, between and after their sums."""

    def compress(self, scale: float) -> None:
        """Make what is summed first, of this rank's gradients, which are those of a loss times ``scale``."""
        ...

    def factor(self) -> None:
        """Make the right factors from the sums of the left ones."""
        ...

    def restore(self, scale: float) -> None:
        """Put the summed gradients into the bucket, at their ``scale``."""
        ...

    def end(self, *, taken: bool) -> None:
        """End a step that may be skipped: forget what it has left behind, unless it was ``taken``."""
        ...

    def part(self, content: Sum) -> torch.Tensor:
        """Return the flat tensor that is summed in place."""
        ...

    def kept(self) -> Iterator[tuple[str, Owned, torch.Tensor]]:
        """Yield what has to be known in the next step: (what, of which gradient, tensor)."""
        ...


def order(compression: Compression | None, owned: Sequence[Owned]) -> list[Owned]:
    """Return some parameters as their gradients lie in a bucket: those that are compressed as matrices first."""
    if compression is None:
        return list(owned)
    return sorted(owned, key=lambda o: compression.matrix(tuple(o.tensor.shape)) is None)


def compressor(
    compression: Compression, bucket: torch.Tensor, owned: Sequence[Owned], seed: int, *, undoing: bool
) -> Compressor | None:
    """Return what compresses a bucket, whose gradients lie in ``order``; None where there is nothing to compress.

    ``seed`` is that of the first right factors, which all ranks make alike; ``undoing``: steps may be skipped.
    """
    if compression.method == "bfloat16":
        return _Lowered(bucket) if bucket.numel() else None
    found = [(o, compression.matrix(tuple(o.tensor.shape))) for o in owned]
    matrices = [(o, m) for o, m in found if m is not None]
    feedback = compression.error_feedback
    return _LowRank(bucket, matrices, seed, feedback=feedback, undoing=undoing) if matrices else None


class _Lowered:
    """A bucket that is summed in bfloat16."""

    def __init__(self, bucket: torch.Tensor) -> None:
        self._bucket, self._low = bucket, torch.empty_like(bucket, dtype=torch.bfloat16)

    def compress(self, scale: float) -> None:
        del scale  # a rounding is the same at any power of two
        self._low.copy_(self._bucket)

    def factor(self) -> None:
        raise AssertionError("a bucket of bfloat16 has no factors")

    def restore(self, scale: float) -> None:
        del scale
        self._bucket.copy_(self._low)

    def end(self, *, taken: bool) -> None:
        """Nothing stays behind."""

    def part(self, content: Sum) -> torch.Tensor:
        assert content == "lowered"
        return self._low

    def kept(self) -> Iterator[tuple[str, Owned, torch.Tensor]]:
        return iter(())


class _Factors(NamedTuple):
    """One matrix: views of the flat tensors."""

    of: Owned
    whole: torch.Tensor
    """(rows, columns): its place in the bucket."""
    error: torch.Tensor
    """(rows, columns): what earlier steps have lost, and within a step the gradient with it; without error
    feedback ``whole`` itself."""
    left: torch.Tensor
    """(rows, rank)."""
    right: torch.Tensor
    """(columns, rank)."""


class _LowRank:
    """A bucket whose matrices, which lie first in it, are summed as products of two thin ones.

    Errors are those of gradients that are not scaled, so that they may be added to those of the next step, whose
    scale may be another one. A gradient that is not finite spoils errors and factors of all ranks: with
    ``undoing`` they become what they were, if the step is skipped.
    """

    def __init__(
        self,
        bucket: torch.Tensor,
        matrices: Sequence[tuple[Owned, Matrix]],
        seed: int,
        *,
        feedback: bool,
        undoing: bool,
    ) -> None:
        inside = sum(m.elements for _, m in matrices)
        self._whole, self._rest = bucket[:inside], bucket[inside:]
        self._error = torch.zeros_like(self._whole) if feedback else self._whole
        self._left = bucket.new_empty(sum(m.rows * m.rank for _, m in matrices))
        self._right = bucket.new_empty(sum(m.columns * m.rank for _, m in matrices))
        self._feedback = feedback
        self._factors: list[_Factors] = []
        flat = [self._whole, self._error, self._left, self._right]
        at = [0] * len(flat)
        for owned, m in matrices:
            shapes = (m.rows, m.columns), (m.rows, m.columns), (m.rows, m.rank), (m.columns, m.rank)
            views = []
            for i, (rows, columns) in enumerate(shapes):
                views.append(flat[i][at[i] : at[i] + rows * columns].view(rows, columns))
                at[i] += rows * columns
            self._factors.append(_Factors(owned, *views))
            _draw(views[-1], f"{seed}/{owned.name}/{owned.start}")
        kept = [*[self._error] * feedback, self._right]
        self._copies = [(tensor, torch.empty_like(tensor)) for tensor in kept if undoing]
        self._copied = False

    def compress(self, scale: float) -> None:
        for tensor, copy in self._copies:
            copy.copy_(tensor)
        self._copied = True
        for f in self._factors:
            if self._feedback:
                f.error.add_(f.whole, alpha=1 / scale)
            _orthogonalise(f.right)
            torch.mm(f.error, f.right, out=f.left)

    def factor(self) -> None:
        for f in self._factors:
            _orthogonalise(f.left)
            torch.mm(f.error.t(), f.left, out=f.right)
            if self._feedback:  # what this rank's own part of the sum does not hold
                f.error.addmm_(f.left, f.right.t(), alpha=-1)

    def restore(self, scale: float) -> None:
        for f in self._factors:  # without feedback the factors are at the scale of the gradients
            f.whole.addmm_(f.left, f.right.t(), beta=0, alpha=scale if self._feedback else 1)

    def end(self, *, taken: bool) -> None:
        if self._copied and not taken:
            for tensor, copy in self._copies:
                tensor.copy_(copy)
        self._copied = False

    def part(self, content: Sum) -> torch.Tensor:
        return {"left": self._left, "right": self._right, "rest": self._rest}[content]

    def kept(self) -> Iterator[tuple[str, Owned, torch.Tensor]]:
        for f in self._factors:
            yield "right", f.of, f.right
            if self._feedback:
                yield "error", f.of, f.error


def _draw(tensor: torch.Tensor, key: str) -> None:
    """Fill a tensor with normal numbers, a function of the key alone."""
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) >> 1)
    tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64))


def _orthogonalise(tensor: torch.Tensor) -> None:
    """Replace columns by orthonormal ones that span the same, if they can: zeros become any."""
    tensor.copy_(torch.linalg.qr(tensor)[0])
