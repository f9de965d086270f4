"""A tape of the operations that make and fill tensors, so that any one of them can be made again later.

The tape is written while a builder runs on meta tensors. It knows a tensor by its storage (its *slot*) and its
place in it, so that views need no entry of their own: an entry is an operation that makes a slot or writes to one.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from types import CodeType
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from hybridpar.model import stretch
from hybridpar.model.stretch import Entry, View

aten = torch.ops.aten

_EMPTY = {
    aten.empty,
    aten.empty_like,
    aten.empty_strided,
    aten.empty_permuted,
    aten.new_empty,
    aten.new_empty_strided,
}
_FILLS = {aten.zero_, aten.fill_, aten.normal_, aten.uniform_, aten.copy_, aten.random_, aten.exponential_}
_IS_META = vars(torch._C.TensorBase)["is_meta"].__get__  # noqa: SLF001 - not a public class yet
_READS = {
    torch.Tensor.item,
    torch.Tensor.tolist,
    torch.Tensor.__bool__,
    torch.Tensor.__int__,
    torch.Tensor.__float__,
    torch.Tensor.__index__,
    torch.Tensor.__format__,
}
_LITERALS = (torch.tensor, torch.as_tensor, torch.asarray)
_INITS: dict[CodeType, Callable[..., Any]] = {
    f.__code__: f for f in vars(nn.init).values() if inspect.isfunction(f)
}


class NotReplayableError(Exception):
    """A tensor's values came from outside the tape."""


class Tape:
    """Entries in the order in which they ran, and for each slot the entries that make it or write into it."""

    def __init__(self) -> None:
        self._entries: list[Entry] = []
        self._touching: dict[int, list[int]] = {}
        self._slots: dict[int, int] = {}
        self._storages: list[torch.UntypedStorage] = []  # kept, so that no identity is used twice
        self._literals: dict[int, torch.Tensor] = {}
        self._owners: dict[int, tuple[str, int]] = {}

    def view(self, tensor: torch.Tensor) -> View:
        """Where ``tensor`` lies; an unknown storage gets a slot that no entry makes."""
        storage = tensor.untyped_storage()
        slot = self._slots.get(storage._cdata)  # noqa: SLF001 - the storage's identity
        if slot is None:
            slot = self._slots[storage._cdata] = len(self._storages)  # noqa: SLF001
            self._storages.append(storage)
        return View(slot, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()), tensor.dtype)

    def add_literal(self, tensor: torch.Tensor) -> None:
        """Note a tensor whose values stand in the builder's code."""
        self._literals[self.view(tensor).slot] = tensor

    def add_operation(self, op: torch._ops.OpOverload, args: Any, kwargs: dict[str, Any], result: Any) -> None:
        """Note an operation that ran, unless it only reads or views."""
        inputs = [self.view(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        reads = frozenset(v.slot for v in inputs)
        written = _written_tensors(op, args, kwargs)
        writes = frozenset(self.view(t).slot for t in written)
        outputs = tuple(self.view(t) if isinstance(t, torch.Tensor) else None for t in tree_leaves(result))
        creates = frozenset(v.slot for v in outputs if v is not None) - reads
        if not creates and not writes:
            return
        if creates and "dtype" not in kwargs and any(a.name == "dtype" for a in op._schema.arguments):  # noqa: SLF001
            kwargs = {**kwargs, "dtype": next(v.dtype for v in outputs if v is not None)}
        packet = op.overloadpacket
        fills = packet in _FILLS and _covers(args[0])
        self._append(
            Entry(
                function=op,
                args=tree_map(self._pack, args),
                kwargs={k: tree_map(self._pack, v) for k, v in kwargs.items() if k != "pin_memory"},
                outputs=outputs,
                reads=reads,
                creates=creates,
                overwrites=writes if fills else frozenset(),
                random=torch.Tag.nondeterministic_seeded in op.tags,
                empty=packet in _EMPTY,
            ),
            creates | writes,
        )

    def add_init(self, function: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
        """Note a whole call of a function of ``torch.nn.init``: it fills the argument ``tensor``."""
        tensor = arguments["tensor"]
        slots = frozenset({self.view(tensor).slot})
        kwargs = {k: self._pack(v) for k, v in arguments.items()}
        overwrites = slots if _covers(tensor) else frozenset()
        self._append(Entry(function, (), kwargs, (), slots, frozenset(), overwrites, random=True), slots)

    def own(self, names: Mapping[str, View]) -> None:
        """Give each random entry to the first of ``names`` that depends on it; the name decides its seed.

        A copy of a parameter therefore starts with that parameter's values, whoever makes it.
        """
        for name, view in names.items():
            try:
                needed = self._needed(view.slot)
            except NotReplayableError:
                continue
            draws = (i for i in needed if self._entries[i].random)
            for count, index in enumerate(draws):
                self._owners.setdefault(index, (name, count))

    def replay(self, view: View, seed: int) -> torch.Tensor:
        """Make the tensor at ``view`` on the CPU, from the entries that touch it and nothing else.

        Changes the state of torch's default generator. Raises NotReplayableError.
        """
        slots: dict[int, torch.UntypedStorage] = {}
        with torch.no_grad(), torch.device("cpu"):
            for index in self._needed(view.slot):
                self._run(index, seed, slots)
            made: torch.Tensor = self._unpack(view, slots)
            whole = made.numel() * made.element_size() == slots[view.slot].nbytes()
            return made if whole else made.clone()

    def partial(self, view: View) -> bool:
        """Whether ``stretch`` can make a part of the tensor at ``view``. Raises NotReplayableError."""
        entries = [self._entries[index] for index in self._needed(view.slot)]
        return view.plain and stretch.fits(entries, view.count)

    def stretch(self, view: View, seed: int, start: int, stop: int) -> torch.Tensor:
        """Make the elements ``start`` to ``stop`` of the tensor at ``view``, flat, if it is ``partial``.

        They are those that ``replay`` gives. Changes the state of torch's default generator.
        """
        slots: dict[int, torch.Tensor] = {}
        with torch.no_grad(), torch.device("cpu"):
            for index in self._needed(view.slot):
                stretch.run(self._entries[index], slots, (start, stop), self._seeds(index, seed))
        return slots[view.slot]

    def constant(self, tensor: torch.Tensor) -> torch.Tensor:
        """Make the values that ``tensor`` has now, where no seed can change them. Raises NotReplayableError."""
        view = self.view(tensor)
        if any(self._entries[index].random for index in self._needed(view.slot)):
            raise NotReplayableError
        return self.replay(view, 0)

    def _append(self, entry: Entry, touched: frozenset[int]) -> None:
        for slot in touched:
            self._touching.setdefault(slot, []).append(len(self._entries))
        self._entries.append(entry)

    def _pack(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self.view(value)
        return torch.device("cpu") if isinstance(value, torch.device) else value

    def _unpack(self, value: Any, slots: dict[int, torch.UntypedStorage]) -> Any:
        if not isinstance(value, View):
            return value
        if value.slot in self._literals and value.slot not in slots:
            slots[value.slot] = self._literals[value.slot].clone().untyped_storage()
        tensor = torch.empty(0, dtype=value.dtype)
        return tensor.set_(slots[value.slot], value.offset, value.size, value.stride)

    def _needed(self, slot: int) -> list[int]:
        """Find the entries that the final values in ``slot`` depend on, in order."""
        needed: set[int] = set()
        seen: set[tuple[int, int]] = set()
        stack = [(slot, len(self._entries))]
        while stack:
            current = stack.pop()
            if current in seen:
                continue
            seen.add(current)
            for index in self._writers(*current):
                if index not in needed:
                    needed.add(index)
                    stack += [(read, index) for read in self._entries[index].reads]
        return sorted(needed)

    def _writers(self, slot: int, end: int) -> list[int]:
        """Find the entries before ``end`` that decide what ``slot`` holds there."""
        touching = [i for i in self._touching.get(slot, []) if i < end]
        known = slot in self._literals or (touching and slot in self._entries[touching[0]].creates)
        if not known:
            raise NotReplayableError
        last = max((n for n, i in enumerate(touching) if slot in self._entries[i].overwrites), default=0)
        return touching[:1] + touching[max(last, 1) :]

    def _seeds(self, index: int, seed: int) -> Callable[[int], int]:
        """Return what gives the seed of a block of the numbers that an entry draws."""
        return lambda block: _hash(seed, *self._owners[index], block)

    def _draw(self, index: int, drawn: View, seed: int, slots: dict[int, torch.UntypedStorage]) -> None:
        entry = self._entries[index]
        if drawn.slot in entry.creates:
            slots[drawn.slot] = torch.empty(drawn.count, dtype=drawn.dtype).untyped_storage()
        entry.draw(self._unpack(drawn, slots).view(-1), 0, self._seeds(index, seed))

    def _run(self, index: int, seed: int, slots: dict[int, torch.UntypedStorage]) -> None:
        entry = self._entries[index]
        if entry.drawn is not None:
            self._draw(index, entry.drawn, seed, slots)
            return
        if entry.random:
            torch.default_generator.manual_seed(_hash(seed, *self._owners[index]))
        is_view = lambda value: isinstance(value, View)  # noqa: E731 - a leaf test for both trees
        args, kwargs = (
            tree_map(lambda v: self._unpack(v, slots), tree, is_leaf=is_view)
            for tree in (entry.args, entry.kwargs)
        )
        leaves: Iterable[Any] = tree_leaves(entry.function(*args, **kwargs))
        for output, view in zip(leaves, entry.outputs, strict=False):
            if view is not None and view.slot in entry.creates and view.slot not in slots:
                if output.stride() != view.stride:
                    output = torch.empty_strided(view.size, view.stride, dtype=view.dtype).copy_(output)  # noqa: PLW2901
                slots[view.slot] = output.zero_().untyped_storage() if entry.empty else output.untyped_storage()


class OperationRecorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes every operation that runs to a tape."""

    def __init__(self, tape: Tape) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._tape = tape

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        result = func(*args, **(kwargs or {}))
        self._tape.add_operation(func, args, kwargs or {}, result)
        return result


class CallRecorder(TorchFunctionMode):
    """Writes what operations on meta tensors do not show: literals, and initialisers that skip meta tensors.

    Some functions of ``torch.nn.init`` depend on the values that they draw (rejection sampling) and return at once
    where ``tensor.is_meta``. That question is where their whole call is noted, however the builder imported them.

    A builder that reads a value (of ``torch.linspace``, say) gets it, unless it depends on the seed.
    """

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self._tape = tape

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        kwargs = kwargs or {}
        if func in _LITERALS and args and not isinstance(args[0], torch.Tensor) and _is_plain(args[0]):
            return self._literal(func, args, kwargs)
        if func == _IS_META:
            frame = inspect.currentframe()
            caller = frame.f_back if frame else None
            if caller is not None and caller.f_code in _INITS and func(*args):
                function = _INITS[caller.f_code]
                parameters = inspect.signature(function).parameters
                self._tape.add_init(function, {name: caller.f_locals[name] for name in parameters})
        if func in _READS and args[0].is_meta:
            return func(self._constant(args[0]), *args[1:], **kwargs)
        return func(*args, **kwargs)

    def _constant(self, tensor: torch.Tensor) -> torch.Tensor:
        """Give the values that a builder asks for; the same tensor where they depend on the seed."""
        with _disable_current_modes():
            try:
                return self._tape.constant(tensor.detach())
            except NotReplayableError:
                return tensor

    def _literal(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        device = kwargs.get("device")
        if device is not None and torch.device(device).type not in {"cpu", "meta"}:
            return func(*args, **kwargs)
        made = func(*args, **{**kwargs, "device": "cpu"})
        self._tape.add_literal(made.detach())
        if device is not None and torch.device(device).type == "cpu":
            return made
        return made.detach().to("meta").requires_grad_(made.requires_grad)


def _is_plain(data: Any) -> bool:
    """Whether data is Python numbers, possibly in lists: unlike an array, the same in every process."""
    if isinstance(data, list | tuple):
        return all(_is_plain(item) for item in data)
    return isinstance(data, bool | int | float | complex)


def _written_tensors(op: torch._ops.OpOverload, args: Any, kwargs: dict[str, Any]) -> list[torch.Tensor]:
    written = []
    for position, argument in enumerate(op._schema.arguments):  # noqa: SLF001 - the only description of an operation
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            written += [t for t in tree_leaves(value) if isinstance(t, torch.Tensor)]
    return written


def _covers(tensor: torch.Tensor) -> bool:
    return tensor.is_contiguous() and tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()


def _hash(*parts: object) -> int:
    """Make a seed of 63 bits from the parts."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
