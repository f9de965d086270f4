"""Dropout whose mask depends on what is dropped, not on where it is computed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from hybridpar.errors import ModelError

_WORD = (1 << 64) - 1
# Two rounds of a mixer with low bias (C. Wellons, "Hash Function Prospector", 2018: lowbias32) and a Weyl
# constant, as signed 32-bit numbers.
_FIRST, _SECOND, _WEYL = 0x7FEB352D, 0x846CA68B - (1 << 32), 0x9E3779B9 - (1 << 32)


class Window(NamedTuple):
    """The slice of a sample's values that a rank holds: along ``axis`` of their shape, from ``start`` on."""

    axis: int
    start: int
    width: int
    """Of the whole values along the axis."""


@dataclass(frozen=True)
class Keys:
    """What the masks of one forward call depend on, besides the layer and the feature."""

    seed: int
    step: int
    sample_ids: torch.Tensor
    """(samples,) int64, on the device of the activations."""


class KeyedDropout(nn.Module):
    """Dropout with a mask that is a pure function of (seed, step, layer, sample id, feature).

    Whoever computes an interval of samples or features gets that part of the whole mask, on any device, and a
    recomputed forward gets it again. Set ``keys`` before each forward in training mode. ``layer`` tells the
    model's dropouts apart. A rank that holds a slice of features sets ``window``. In evaluation mode,
    and for ``p`` = 0, the input passes unchanged.

    Raises ModelError for ``p`` outside 0..1.
    """

    def __init__(self, p: float = 0.5, layer: int = 0) -> None:
        super().__init__()
        if not 0.0 <= p <= 1.0:
            raise ModelError(f"dropout probability {p} is not between 0 and 1")
        self.p = p
        self.layer = layer
        self.window: Window | None = None
        self.keys: Keys | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Drop elements of ``x`` (samples, ...); saves one byte per element for the backward.

        Raises ModelError where keys are missing or do not fit the samples.
        """
        keys = self._usable_keys(x)
        if keys is None:
            return x
        kept = keep_mask(keys, self.layer, self.p, tuple(x.shape[1:]), self.window)
        return _masked(x, kept, self.p)

    def _usable_keys(self, x: torch.Tensor) -> Keys | None:
        """Give the keys, or None where nothing is to be dropped."""
        if not self.training or self.p == 0.0:
            return None
        if self.keys is None:
            raise ModelError(
                f"dropout {self.layer} has no keys; set its `keys` to Keys(seed, step, sample_ids) first"
            )
        if self.keys.sample_ids.shape != x.shape[:1]:
            raise ModelError(
                f"dropout {self.layer} got {x.shape[0]} samples but keys for {tuple(self.keys.sample_ids.shape)}; "
                "give one sample id per sample"
            )
        return self.keys

    def extra_repr(self) -> str:
        """Show the probability and the layer."""
        return f"p={self.p}, layer={self.layer}"


class KeyedStochasticDepth(KeyedDropout):
    """Drops whole samples of a residual branch (Huang et al., ECCV 2016), keyed as dropout is.

    A slice of features meets the same mask as the whole.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Drop samples of ``x`` (samples, ...); saves one byte per sample for the backward. Raises ModelError."""
        keys = self._usable_keys(x)
        if keys is None:
            return x
        kept = keep_mask(keys, self.layer, self.p, (1,) * (x.ndim - 1))
        return _masked(x, kept, self.p)


def _masked(x: torch.Tensor, kept: torch.Tensor, p: float) -> torch.Tensor:
    dropped: torch.Tensor = _Mask.apply(x, kept, 1.0 / (1.0 - p) if p < 1.0 else 0.0)
    return dropped


def keep_mask(
    keys: Keys, layer: int, p: float, shape: tuple[int, ...], window: Window | None = None
) -> torch.Tensor:
    """Which elements stay: (samples, *shape) of bool, each True with probability 1 - p.

    Element (s, f), with f its position among all of a sample, of which ``shape`` is a ``window``, stays where
    ``hash(key(seed, step, layer, sample_ids[s]), f) >= p * 2**32``. The hash works in place on two buffers of
    int32, the only integers that are fast everywhere.
    """
    ids = keys.sample_ids
    if p >= 1.0:
        return torch.zeros((len(ids), *shape), dtype=torch.bool, device=ids.device)
    low, high = _row_keys(keys, layer)
    index = _positions(shape, window, ids.device).to(torch.int32).mul_(_WEYL)
    state = torch.bitwise_xor(low[:, None], index)
    spare = torch.empty_like(state)
    _shift_xor(state, spare, 16)
    state.mul_(_FIRST).bitwise_xor_(high[:, None])
    _shift_xor(state, spare, 15)
    state.mul_(_SECOND)
    # The mixer's last shift changes low bits only, which the comparison hardly sees.
    return (state >= round(p * (1 << 32)) - (1 << 31)).view(len(ids), *shape)


def _positions(shape: tuple[int, ...], window: Window | None, device: torch.device) -> torch.Tensor:
    """Where the elements of a window stand among all of a sample, (elements,)."""
    if window is None:
        return torch.arange(math.prod(shape), device=device)
    behind = math.prod(shape[window.axis + 1 :])
    run = torch.arange(window.start * behind, (window.start + shape[window.axis]) * behind, device=device)
    runs = torch.arange(math.prod(shape[: window.axis]), device=device) * (window.width * behind)
    return (runs[:, None] + run).flatten()


class _Mask(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, kept: torch.Tensor, scale: float) -> torch.Tensor:
        ctx.save_for_backward(kept)
        ctx.scale = scale
        return x.mul(kept).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (kept,) = ctx.saved_tensors
        return grads[0].mul(kept).mul_(ctx.scale), None, None


def _row_keys(keys: Keys, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """64 bits per sample from (seed, step, layer, sample id), as two int32 tensors of shape (samples,)."""
    base = _mix(_mix(_mix(keys.seed) ^ (keys.step & _WORD)) ^ (layer & _WORD))
    state = keys.sample_ids.to(torch.int64) ^ _signed(base)
    state = (state ^ ((state >> 30) & ((1 << 34) - 1))) * _signed(0xBF58476D1CE4E5B9)
    state = (state ^ ((state >> 27) & ((1 << 37) - 1))) * _signed(0x94D049BB133111EB)
    state = state ^ ((state >> 31) & ((1 << 33) - 1))
    return state.to(torch.int32), (state >> 32).to(torch.int32)


def _shift_xor(state: torch.Tensor, spare: torch.Tensor, bits: int) -> None:
    """``state ^= state >>> bits`` in place; the mask makes torch's signed shift a logical one."""
    torch.bitwise_right_shift(state, bits, out=spare)
    state.bitwise_xor_(spare.bitwise_and_((1 << (32 - bits)) - 1))


def _mix(value: int) -> int:
    """One step of splitmix64 (Steele, Lea, Flood, OOPSLA 2014): a bijection of 64 bits."""
    value = (value + 0x9E3779B97F4A7C15) & _WORD
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _WORD
    return value ^ (value >> 31)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value
