"""A stretch of a tensor's elements, made without the rest of the tensor.

Random numbers of a large tensor are drawn in blocks of elements, each block from a seed of its own, so that
whoever needs a slice draws the blocks that it meets and nothing else. No value depends on who asks for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from hybridpar.model.chain import DRAWN_ELEMENTS

aten = torch.ops.aten

_FACTORIES = {aten.zeros, aten.ones, aten.full}
"""Their first argument is the size."""
_COPIES = {aten.copy_, aten.fill_, aten.zero_}
"""They work on each element by itself, though they are not tagged so."""
_DRAWS = {aten.normal_, aten.uniform_}
_DRAWING_INITS = {torch.nn.init.trunc_normal_}
_DRAWING_FACTORIES: dict[Any, Callable[..., Any]] = {
    aten.randn.default: lambda out, _size: out.normal_(),
    aten.rand.default: lambda out, _size: out.uniform_(),
    aten.normal.float_float: lambda out, mean, std, _size: out.normal_(mean, std),
}
"""How they fill what they make."""


@dataclass(frozen=True)
class View:
    """Where a tensor lies: its slot, its place there (in elements) and its dtype."""

    slot: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.size)

    @property
    def plain(self) -> bool:
        """Whether it begins where its slot does and has its elements in their order, without gaps."""
        expected, stride = 1, []
        for size in reversed(self.size):
            stride.append(expected)
            expected *= size
        return self.offset == 0 and self.stride == tuple(reversed(stride))


@dataclass(frozen=True)
class Entry:
    """An operation that made slots or wrote to some."""

    function: Callable[..., Any]
    args: Any
    kwargs: dict[str, Any]
    outputs: tuple[View | None, ...]
    reads: frozenset[int]
    creates: frozenset[int]
    overwrites: frozenset[int]
    """Slots in which nothing older survives."""
    random: bool
    empty: bool = False

    @property
    def views(self) -> list[View]:
        """All tensors that the operation gets and gives."""
        given = tree_leaves((self.args, self.kwargs), is_leaf=_is_view)
        return [v for v in (*given, *self.outputs) if isinstance(v, View)]

    @property
    def drawn(self) -> View | None:
        """The tensor that the operation fills with random numbers block by block; None: it does no such thing."""
        if not self.random or self.kwargs.get("generator") is not None:
            return None
        if self.function in _DRAWING_INITS:
            found = self.kwargs["tensor"]
        elif self.function in _DRAWING_FACTORIES:
            found = self.outputs[0]
        elif getattr(self.function, "overloadpacket", None) in _DRAWS:
            found = self.args[0]
        else:
            return None
        filled = self.creates | self.overwrites
        return found if found.plain and found.slot in filled and found.count > DRAWN_ELEMENTS else None

    def draw(self, out: torch.Tensor, start: int, seeds: Callable[[int], int]) -> None:
        """Fill ``out``, which is flat, with the elements from ``start`` on; ``seeds`` gives that of a block."""
        drawn = self.drawn
        assert drawn is not None
        stop = start + len(out)
        for block in range(start // DRAWN_ELEMENTS, -(-stop // DRAWN_ELEMENTS)):
            first = block * DRAWN_ELEMENTS
            last = min(first + DRAWN_ELEMENTS, drawn.count)
            low, high = max(start, first), min(stop, last)
            target = out[low - start : high - start]
            alone = (low, high) == (first, last)
            values = target if alone else torch.empty(last - first, dtype=out.dtype)
            torch.default_generator.manual_seed(seeds(block))
            self._fill(values)
            if not alone:
                target.copy_(values[low - first : high - first])

    def _fill(self, out: torch.Tensor) -> None:
        if self.function in _DRAWING_INITS:
            self.function(**{**self.kwargs, "tensor": out})
        elif self.function in _DRAWING_FACTORIES:
            _DRAWING_FACTORIES[self.function](out, *self.args)
        else:
            self.function(out, *self.args[1:], **self.kwargs)


def fits(entries: Sequence[Entry], count: int) -> bool:
    """Whether the entries make each of ``count`` elements by itself, and are worth being run on a part of them."""
    return count > DRAWN_ELEMENTS and all(_fits(entry, count) for entry in entries)


def _fits(entry: Entry, count: int) -> bool:
    views = entry.views
    if any(not v.plain or v.count != count for v in views) or len({v.size for v in views}) != 1:
        return False
    if entry.random:
        return entry.drawn is not None
    packet = getattr(entry.function, "overloadpacket", None)
    known = entry.empty or packet in _FACTORIES or packet in _COPIES
    return known or torch.Tag.pointwise in getattr(entry.function, "tags", ())


def run(
    entry: Entry, slots: dict[int, torch.Tensor], stretch: tuple[int, int], seeds: Callable[[int], int]
) -> None:
    """Run an entry that ``fits`` on the elements of ``stretch``; ``slots`` hold those of every slot, flat."""
    start, stop = stretch
    drawn = entry.drawn
    if drawn is not None:
        if drawn.slot in entry.creates:
            slots[drawn.slot] = torch.empty(stop - start, dtype=drawn.dtype)
        entry.draw(slots[drawn.slot], start, seeds)
        return
    outputs = [v for v in entry.outputs if v is not None and v.slot in entry.creates]
    if entry.empty:
        for view in outputs:
            slots[view.slot] = torch.zeros(stop - start, dtype=view.dtype)
        return
    args, kwargs = (
        tree_map(lambda v: slots[v.slot] if isinstance(v, View) else v, tree, is_leaf=_is_view)
        for tree in (entry.args, entry.kwargs)
    )
    if getattr(entry.function, "overloadpacket", None) in _FACTORIES:
        args = ([stop - start], *args[1:])
    made = entry.function(*args, **kwargs)
    for view in outputs:
        slots[view.slot] = made


def _is_view(value: Any) -> bool:
    return isinstance(value, View)
