"""A model whose weights are made later, one by one, by whoever owns them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import torch
from torch import nn

from hybridpar.errors import HybridparError, ModelError
from hybridpar.generators import borrowed
from hybridpar.model.chain import MADE_ELEMENTS
from hybridpar.model.copies import blank, named_tensors
from hybridpar.model.stretch import View
from hybridpar.model.tape import CallRecorder, NotReplayableError, OperationRecorder, Tape
from hybridpar.names import nearest


class Part(NamedTuple):
    """A slice of a parameter along one dim."""

    dim: int
    start: int
    stop: int

    def of(self, whole: torch.Tensor) -> torch.Tensor:
        """Return the view of a tensor that it is."""
        return whole.narrow(self.dim, self.start, self.stop - self.start)


class Source(Protocol):
    """A model's structure, and the initial value of each of its parameters and buffers."""

    @property
    def module(self) -> nn.Module:
        """The model; its tensors may be on the meta device."""
        ...

    def materialize(
        self, name: str, seed: int, dtype: torch.dtype | None = None, part: Part | None = None
    ) -> torch.Tensor:
        """Make the initial value of one parameter or buffer, or of a part of it, on the CPU.

        ``name`` is its full name in ``module``; a tied parameter has the same value under each of its names.
        A floating value is cast to ``dtype``, an integer one keeps its own. The value is a function of the name
        and the seed, the same in every process, and that of a part is a slice of the whole one, which is not made
        for it where its elements do not depend on each other. Leaves torch's generators as they were. Raises
        ModelError.
        """
        ...


class Deferred:
    """A model that was built on the meta device, with a tape of how its tensors were filled."""

    def __init__(self, builder: Callable[[], nn.Module]) -> None:
        self._tape = Tape()
        with (
            borrowed(),
            torch.device("meta"),
            CallRecorder(self._tape),
            OperationRecorder(self._tape),
        ):
            built = builder()
        named = named_tensors(built)
        self._views = {name: self._tape.view(tensor) for name, tensor in named.items()}
        self._tape.own(self._views)
        on_meta = all(tensor.is_meta for tensor in named.values())
        self._module = built if on_meta else blank(built, "meta")

    @property
    def module(self) -> nn.Module:
        """The model with every parameter and buffer on the meta device."""
        return self._module

    def materialize(
        self, name: str, seed: int, dtype: torch.dtype | None = None, part: Part | None = None
    ) -> torch.Tensor:
        """Make one parameter or buffer by replaying only what touches it; see ``Source``."""
        _check_name(name, self._views)
        view = self._views[name]
        with borrowed():
            try:
                if self._tape.partial(view):
                    return self._in_pieces(view, seed, dtype, part or Part(0, 0, view.size[0]))
                value = self._tape.replay(view, seed)
            except NotReplayableError as e:
                raise ModelError(
                    f"the initial value of {name} comes from outside its builder (a file, an array), so that it "
                    "cannot be made by its owner alone; build the model with its weights and pass the built model"
                ) from e
        return cast_floating(value if part is None else part.of(value).clone(), dtype)

    def _in_pieces(self, view: View, seed: int, dtype: torch.dtype | None, part: Part) -> torch.Tensor:
        """Make some rows after the other, so that there is never more of the whole than them and the part."""
        shape = [*view.size]
        shape[part.dim] = part.stop - part.start
        made = cast_floating(torch.empty(0, dtype=view.dtype), dtype).new_empty(shape)
        first, last = part[1:] if part.dim == 0 else (0, view.size[0])
        width = view.count // view.size[0]
        step = max(1, MADE_ELEMENTS // width)
        for start in range(first, last, step):
            stop = min(start + step, last)
            rows = self._tape.stretch(view, seed, start * width, stop * width).view(-1, *view.size[1:])
            made[start - first : stop - first].copy_(rows if part.dim == 0 else part.of(rows))
        return made


class Rebuilt:
    """A model whose builder needs real values: every process builds all of it on the CPU under the seed.

    Costs memory and time for the whole model in every process. The values are the same everywhere as long as the
    builder draws from torch's generator only.
    """

    def __init__(self, builder: Callable[[], nn.Module]) -> None:
        self._builder = builder
        self._seed = 0
        self._values = self._build(self._seed)
        self._module = blank(self._built, "meta")

    @property
    def module(self) -> nn.Module:
        """The model with every parameter and buffer on the meta device."""
        return self._module

    def materialize(
        self, name: str, seed: int, dtype: torch.dtype | None = None, part: Part | None = None
    ) -> torch.Tensor:
        """Copy one parameter or buffer out of the model that was built under ``seed``; see ``Source``."""
        _check_name(name, self._values)
        if seed != self._seed:
            self._values = self._build(seed)
            self._seed = seed
        return cast_floating(_cut(self._values[name].detach(), part).clone(), dtype)

    def _build(self, seed: int) -> dict[str, torch.Tensor]:
        with borrowed(seed), torch.device("cpu"):
            self._built = self._builder()
        return named_tensors(self._built)


class Ready:
    """A model that has its weights already; the seed changes nothing."""

    def __init__(self, model: nn.Module) -> None:
        self._module = model
        self._values = named_tensors(model)

    @property
    def module(self) -> nn.Module:
        """The model as it was given."""
        return self._module

    def materialize(
        self, name: str, seed: int, dtype: torch.dtype | None = None, part: Part | None = None
    ) -> torch.Tensor:
        """Copy one of the model's parameters or buffers; see ``Source``."""
        del seed
        _check_name(name, self._values)
        return cast_floating(_cut(self._values[name].detach(), part).cpu().clone(), dtype)


def defer(builder: Callable[[], nn.Module]) -> Source:
    """Build a model's structure without memory for its weights; its values are made later, one by one.

    The builder runs on the meta device. One that fails there (it reads values while it builds) runs on the CPU
    instead, in every process and for the whole model. Raises ModelError where it fails there too.
    """
    try:
        return Deferred(builder)
    except HybridparError:
        raise
    except Exception:  # noqa: BLE001, S110 - whatever it was, the builder meets it again on the CPU and it is told
        pass
    try:
        return Rebuilt(builder)
    except HybridparError:
        raise
    except Exception as e:
        raise ModelError(f"the model's builder failed: {type(e).__name__}: {e}") from e


def ready(model: nn.Module) -> Source:
    """Take a model that was built with its weights. Raises ModelError where a weight is on the meta device."""
    for name, tensor in named_tensors(model).items():
        if tensor.is_meta:
            raise ModelError(
                f"{name} is on the meta device and has no values; pass the builder instead of the model"
            )
    return Ready(model)


def _check_name(name: str, known: Mapping[str, object]) -> None:
    if name not in known:
        raise ModelError(f"the model has no parameter or buffer {name}{nearest(name, known)}")


def _cut(value: torch.Tensor, part: Part | None) -> torch.Tensor:
    return value if part is None else part.of(value)


def cast_floating(value: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """Return a floating value in ``dtype``, if that is given, and any other as it is."""
    return value.to(dtype) if dtype is not None and value.is_floating_point() else value
