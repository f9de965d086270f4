"""Frozen dataclasses to plain JSON data and back, with errors that name the field."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from hybridpar.errors import HybridparError

T = TypeVar("T")


def to_data(value: Any) -> Any:
    """Turn dataclasses and tuples into dicts and lists that ``json`` can write."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_data(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple | list):
        return [to_data(v) for v in value]
    if isinstance(value, Mapping):
        return {str(k): to_data(v) for k, v in value.items()}
    return value


def digest(value: Any) -> str:
    """Return 12 hexadecimal digits that tell values apart by their JSON form.

    Fields that have their default are left out, so that a later version's new field does not change what an
    earlier one wrote down.
    """
    return hashlib.sha256(json.dumps(_told(value), sort_keys=True).encode()).hexdigest()[:12]


def _told(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: (f, getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {name: _told(own) for name, (field, own) in fields.items() if not _is_default(field, own)}
    if isinstance(value, tuple | list):
        return [_told(v) for v in value]
    return to_data(value)


def _is_default(field: dataclasses.Field[Any], value: Any) -> bool:
    if field.default_factory is not dataclasses.MISSING:
        return bool(value == field.default_factory())
    return field.default is not dataclasses.MISSING and bool(value == field.default)


def from_data(cls: type[T], data: Any, where: str, error: type[HybridparError]) -> T:
    """Build ``cls`` from plain data; unknown, missing and mistyped fields raise ``error`` naming the field."""
    return typing.cast("T", _convert(cls, data, where, error))


def read_json(cls: type[T], path: Path, error: type[HybridparError]) -> T:
    """Read a JSON file into ``cls``; a missing or malformed file raises ``error``."""
    try:
        data = json.loads(path.read_text())
    except OSError as e:
        raise error(f"cannot read {path}: {e.strerror}; give the path of an existing file") from e
    except ValueError as e:
        raise error(f"{path} is not JSON: {e}") from e
    return from_data(cls, data, path.name, error)


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _convert(kind: Any, data: Any, where: str, error: type[HybridparError]) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return data
    if origin in {Union, types.UnionType}:
        return _convert_union(arguments, data, where, error)
    if origin is Literal:
        if data not in arguments:
            raise error(f"{where}: {data!r} is not one of {', '.join(map(repr, arguments))}")
        return data
    if origin is tuple:
        return _convert_tuple(arguments, data, where, error)
    if origin is dict:
        if not isinstance(data, Mapping):
            raise error(f"{where}: expected a mapping, got {data!r}")
        return {str(k): _convert(arguments[1], v, f"{where}.{k}", error) for k, v in data.items()}
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _convert_dataclass(kind, data, where, error)
    return _convert_scalar(kind, data, where, error)


def _convert_union(options: tuple[Any, ...], data: Any, where: str, error: type[HybridparError]) -> Any:
    if data is None and type(None) in options:
        return None
    rest = [o for o in options if o is not type(None)]
    for option in rest[:-1]:
        try:
            return _convert(option, data, where, error)
        except error:
            continue
    return _convert(rest[-1], data, where, error)


def _convert_tuple(arguments: tuple[Any, ...], data: Any, where: str, error: type[HybridparError]) -> Any:
    if not isinstance(data, list | tuple):
        raise error(f"{where}: expected a list, got {data!r}")
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return tuple(_convert(arguments[0], v, f"{where}[{i}]", error) for i, v in enumerate(data))
    if len(arguments) != len(data):
        raise error(f"{where}: expected {len(arguments)} values, got {len(data)}")
    pairs = zip(arguments, data, strict=True)
    return tuple(_convert(a, v, f"{where}[{i}]", error) for i, (a, v) in enumerate(pairs))


def _convert_dataclass(kind: type, data: Any, where: str, error: type[HybridparError]) -> Any:
    if not isinstance(data, Mapping):
        raise error(f"{where}: expected a mapping with the fields of {kind.__name__}, got {data!r}")
    fields = {f.name: f for f in dataclasses.fields(kind) if f.init}
    for name in data:
        if name not in fields:
            raise error(f"{where}.{name}: unknown field; {kind.__name__} has {', '.join(fields)}")
    values = {}
    for name, field in fields.items():
        if name in data:
            values[name] = _convert(_hints(kind)[name], data[name], f"{where}.{name}", error)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise error(f"{where}.{name}: missing")
    try:
        return kind(**values)
    except error as e:
        raise error(f"{where}: {e}") from e


def _convert_scalar(kind: Any, data: Any, where: str, error: type[HybridparError]) -> Any:
    if kind is float and isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    if isinstance(data, kind) and not (isinstance(data, bool) and kind is not bool):
        return data
    raise error(f"{where}: expected {kind.__name__}, got {data!r}")
