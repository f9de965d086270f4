"""What a checkpoint holds of a stream: the state of its source on each rank that reads, as JSON, not pickled."""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np
import torch

from hybridpar.data.stream import Mark
from hybridpar.errors import CheckpointError, DamageError
from hybridpar.runtime.pieces import DTYPES, Piece, Stored

STREAM = "stream/"
_KINDS = "biuf"
"""Of numpy's numbers: truth values, integers, floating point."""


def piece_of(mark: Mark | None, rank: int) -> dict[str, Piece]:
    """Return what a rank writes of its place in a stream, nothing where it has none.

    Raises CheckpointError for a state of anything else than numbers, strings, bytes, tensors, arrays, and lists,
    tuples and dicts of them.
    """
    if mark is None:
        return {}
    text = json.dumps([mark.index, mark.opening, mark.begun, _encoded(mark.state, "state_dict()")])
    return {f"{STREAM}{rank}": Piece.whole(torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8))}


def mark_from(stored: Stored, rank: int) -> Mark | None:
    """Return from where a rank goes on; None where the checkpoint has no state of a stream.

    A rank that has none of its own, as under another plan, goes on from the latest that any had: streams are the
    same on all ranks. Raises DamageError for what is no state.
    """
    names, own = [name for name in stored.tensors if name.startswith(STREAM)], f"{STREAM}{rank}"
    marks = [_mark(stored, name) for name in ([own] if own in names else names)]
    return max(marks, key=lambda mark: mark.index, default=None)


def _mark(stored: Stored, name: str) -> Mark:
    try:
        index, opening, begun, state = json.loads(stored.read(name).numpy().tobytes())
        return Mark(int(index), int(opening), int(begun), _decoded(state))
    except (ValueError, TypeError, KeyError, RuntimeError) as e:
        raise DamageError(f"{stored.folder}: {name} is no place in a stream: {e}; use another checkpoint") from e


def _encoded(value: Any, where: str) -> Any:
    """Return JSON data for a value; what JSON has no word for becomes an object of its kind's name."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if type(value) is list:
        return [_encoded(v, f"{where}[{i}]") for i, v in enumerate(value)]
    if type(value) is tuple:
        return {"tuple": _encoded(list(value), where)}
    if type(value) is dict:
        return {
            "dict": [[_encoded(k, f"a key of {where}"), _encoded(v, f"{where}[{k!r}]")] for k, v in value.items()]
        }
    if isinstance(value, bytes):
        return {"bytes": base64.b64encode(value).decode()}
    if isinstance(value, np.generic | np.ndarray) and value.dtype.kind in _KINDS:
        array = np.ascontiguousarray(value)
        return {"array": [array.dtype.str, list(value.shape), base64.b64encode(array.tobytes()).decode()]}
    if isinstance(value, torch.Tensor) and str(value.dtype).removeprefix("torch.") in DTYPES:
        data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        kind = str(value.dtype).removeprefix("torch.")
        return {"tensor": [kind, list(value.shape), base64.b64encode(data).decode()]}
    raise CheckpointError(
        f"the stream's {where} is a {type(value).__name__}, which a checkpoint cannot hold; let it be made of "
        "numbers, strings, bytes, tensors, arrays, and lists, tuples and dicts, or set checkpoint.every=null"
    )


def _decoded(data: Any) -> Any:
    if isinstance(data, list):
        return [_decoded(v) for v in data]
    if not isinstance(data, dict):
        return data
    ((kind, content),) = data.items()
    if kind == "tuple":
        return tuple(_decoded(content))
    if kind == "dict":
        return {_decoded(k): _decoded(v) for k, v in content}
    if kind == "bytes":
        return base64.b64decode(content, validate=True)
    if kind not in {"array", "tensor"}:
        raise ValueError(f"{kind!r} is no kind of value")
    dtype, shape, text = content
    numbers = np.frombuffer(bytearray(base64.b64decode(text, validate=True)), dtype=np.uint8)
    if kind == "tensor":
        return torch.from_numpy(numbers).view(DTYPES[dtype]).reshape(shape)
    if np.dtype(dtype).kind not in _KINDS:
        raise ValueError(f"{dtype!r} is no kind of number")
    return numbers.view(dtype).reshape(shape)[()]
