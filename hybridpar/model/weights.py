"""Weights from a file: the state dict of a plain PyTorch model in place of a model's initial values."""

from __future__ import annotations

import pickle
import warnings
import zipfile
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from hybridpar.errors import ModelError
from hybridpar.model.copies import named_tensors
from hybridpar.model.deferred import Part, Source, cast_floating

_SHOWN = 3
"""Names in an error."""


class Weights:
    """A model whose parameters and saved buffers have the values of a state dict's file, read one by one.

    Args:
        source: the model; gives the values of what is not saved in state dicts.
        path: a ``.safetensors`` file, or one of ``torch.save``, from which tensors alone are unpickled.
        fresh: patterns of names, as ``classifier.6.*``, that keep their initial values, whatever the file has.

    Raises:
        ModelError: the file cannot be read, or its names and shapes are not the model's.

    """

    def __init__(self, source: Source, path: Path, fresh: Sequence[str] = ()) -> None:
        self._source, self._path = source, path
        shapes, self._read = _opened(path)
        self._there = self._matched(shapes, fresh)

    @property
    def module(self) -> nn.Module:
        """The model; its tensors may be on the meta device."""
        return self._source.module

    def materialize(
        self, name: str, seed: int, dtype: torch.dtype | None = None, part: Part | None = None
    ) -> torch.Tensor:
        """Read one parameter or buffer or a part of it alone, or make its initial value; see ``Source``."""
        if name not in self._there:
            return self._source.materialize(name, seed, dtype, part)
        value = self._read(self._there[name], part)
        expected = named_tensors(self.module)[name].dtype
        return cast_floating(value.to(expected), dtype)

    def _matched(self, shapes: dict[str, tuple[int, ...]], fresh: Sequence[str]) -> dict[str, str]:
        """Return, by name in the model, that in the file; a tied tensor may be there under any of its names."""
        everything = self.module.state_dict(keep_vars=True)
        saved = {name: t for name, t in everything.items() if isinstance(t, torch.Tensor)}
        for pattern in fresh:
            if not any(fnmatchcase(name, pattern) for name in saved):
                raise ModelError(
                    f"model.fresh: {pattern} matches no parameter of the model, whose last ones are "
                    f"{', '.join(list(saved)[-_SHOWN:])}"
                )
        begun = {id(t) for name, t in saved.items() if any(fnmatchcase(name, p) for p in fresh)}
        wanted = {name: t for name, t in saved.items() if id(t) not in begun}
        aliases: dict[int, str] = {id(t): name for name, t in saved.items() if name in shapes}
        there = {name: name if name in shapes else aliases.get(id(t), "") for name, t in wanted.items()}
        self._refuse("lacks", [name for name, found in there.items() if not found])
        self._refuse("has, but the model has not,", [name for name in shapes if name not in saved])
        for name, found in there.items():
            if shapes[found] != tuple(wanted[name].shape):
                raise ModelError(
                    f"model.weights: {self._path} has {found} in the shape {list(shapes[found])}, but the model "
                    f"needs {list(wanted[name].shape)}; set model.fresh=[{name.rpartition('.')[0]}.*] to begin "
                    "with initial values there, as for a new head, or build the model that was saved"
                )
        names = {id(t): there[name] for name, t in wanted.items()}
        return {name: names[id(t)] for name, t in named_tensors(self.module).items() if id(t) in names}

    def _refuse(self, what: str, names: list[str]) -> None:
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            raise ModelError(
                f"model.weights: {self._path} {what} {', '.join(names[:_SHOWN])}{more}; give the weights of this "
                "model, or name in model.fresh what is to begin with initial values"
            )


def _opened(path: Path) -> tuple[dict[str, tuple[int, ...]], Callable[[str, Part | None], torch.Tensor]]:
    """Return the shapes in a file, and what reads one of its tensors. Raises ModelError."""
    if not path.is_file():
        raise ModelError(f"model.weights: there is no file {path}; give the path of a state dict")
    try:
        if path.suffix == ".safetensors":
            file = safe_open(path, framework="pt")
            names: list[str] = file.keys()  # type: ignore[no-untyped-call]
            shapes = {n: tuple(file.get_slice(n).get_shape()) for n in names}  # type: ignore[no-untyped-call]

            def read(name: str, part: Part | None) -> torch.Tensor:
                if part is None:
                    found: torch.Tensor = file.get_tensor(name)  # type: ignore[no-untyped-call]
                else:
                    where = (slice(None),) * part.dim + (slice(part.start, part.stop),)
                    found = file.get_slice(name)[where]  # type: ignore[no-untyped-call]
                return found.clone()  # nobody shares the file's pages

            return shapes, read
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of an unusual pickle: what it holds decides
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as e:
        raise ModelError(
            f"model.weights: {path} holds more than tensors, or is damaged, and is not unpickled; save a plain "
            "state dict: torch.save(model.state_dict(), FILE)"
        ) from e
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError) as e:
        raise ModelError(f"model.weights: {path} cannot be read: {e}; give the file of a state dict") from e
    if not isinstance(loaded, dict) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
        raise ModelError(
            f"model.weights: {path} holds no state dict of tensors; save one: torch.save(model.state_dict(), FILE)"
        )
    tensors: dict[str, torch.Tensor] = {str(name): tensor for name, tensor in loaded.items()}

    def cut(name: str, part: Part | None) -> torch.Tensor:
        return (tensors[name] if part is None else part.of(tensors[name])).clone()

    return {name: tuple(t.shape) for name, t in tensors.items()}, cut
