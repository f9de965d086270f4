"""Bytes of all tensors that are alive, seen from outside: every storage that torch makes, until it is freed."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts storages while it is entered; ``apart`` are the storages not to count (``existing`` gives them).

    Counts from the start also what exists already, gradients included: ``tensors``, or all that Python knows.
    """

    def __init__(self, apart: set[int], tensors: Iterable[torch.Tensor] | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self._apart = apart
        for tensor in _tensors() if tensors is None else tensors:
            self.add(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and note the storages of what it returns."""
        del types
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.add(leaf)
        return result

    def add(self, tensor: torch.Tensor) -> None:
        """Count a tensor's storage as long as it lives."""
        if tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        reference = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
        if reference.cdata not in self._apart:
            self._alive[reference.cdata] = reference, storage.nbytes()

    def bytes(self) -> int:
        """Return the bytes of the storages that are still alive."""
        ended = [key for key, (reference, _) in self._alive.items() if reference.expired()]  # type: ignore[no-untyped-call]
        for key in ended:
            del self._alive[key]
        return sum(size for _, size in self._alive.values())


def existing() -> dict[int, StorageWeakRef]:
    """Return the storages alive now; keep the references, or their keys may come to mean other storages."""
    storages = [t.untyped_storage() for t in _tensors() if t.device.type != "meta"]
    references = [StorageWeakRef(s) for s in storages]  # type: ignore[no-untyped-call]
    return {r.cdata: r for r in references}


def _tensors() -> list[torch.Tensor]:
    """Return all tensors that Python knows, and the gradients of parameters."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some lazy modules warn at any look at them
        found = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
        return found + [t.grad for t in found if t.is_leaf and t.grad is not None]
