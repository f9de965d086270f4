"""From a builder's name in the configuration to a function that builds the model."""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from hybridpar.errors import ModelError
from hybridpar.names import nearest

_HOME = "hybridpar.models"


def build(
    builder: str,
    options: Mapping[str, Any],
    *,
    classes: int | None = None,
    in_shape: Sequence[Any] | None = None,
) -> Callable[[], nn.Module]:
    """Resolve ``builder``, "module:function", and bind its keyword arguments.

    The module is one of ``hybridpar.models`` ("vgg:vgg"), else any that can be imported, also from the working
    directory. ``options`` are passed as they are; ``classes`` (also as ``num_classes``) and ``in_shape`` (the
    shape of one sample, or several) only where the function has parameters of that name. Calling the result builds
    the model. Raises ModelError for an unknown module, function or option.
    """
    function = _resolve(builder)
    keywords = dict(options)
    offered = {
        "classes": classes,
        "num_classes": classes,
        "in_shape": tuple(in_shape) if in_shape is not None else None,
    }
    accepted, takes_any = _accepted(function)
    for name in keywords:
        if name not in accepted and not takes_any:
            raise ModelError(
                f"model builder {builder} has no option {name}{nearest(name, accepted)}; "
                f"it accepts {', '.join(accepted) or 'none'}"
            )
    for name, value in offered.items():
        if value is not None and name in accepted:
            keywords.setdefault(name, value)
    return functools.partial(_call, builder, function, keywords)


def _call(builder: str, function: Callable[..., Any], keywords: dict[str, Any]) -> nn.Module:
    model = function(**keywords)
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"model builder {builder} gave a {type(model).__name__}; it must return a torch.nn.Module"
        )
    return model


def _resolve(builder: str) -> Callable[..., Any]:
    module_name, _, function_name = builder.partition(":")
    if not module_name or not function_name:
        raise ModelError(f"model.builder={builder!r} is not of the form module:function, for example vgg:vgg")
    module = _import(builder, module_name)
    function = getattr(module, function_name, None)
    if not callable(function):
        public = [n for n, v in vars(module).items() if inspect.isfunction(v) and not n.startswith("_")]
        raise ModelError(f"{module.__name__} has no builder {function_name}{nearest(function_name, public)}")
    return function  # type: ignore[no-any-return]


def _import(builder: str, module_name: str) -> ModuleType:
    own = [m.name for m in pkgutil.iter_modules(importlib.import_module(_HOME).__path__)]
    if module_name in own:
        return importlib.import_module(f"{_HOME}.{module_name}")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as e:
        if e.name is None or not f"{module_name}.".startswith(f"{e.name}."):
            raise ModelError(f"model builder {builder} cannot be imported: {e}; install what it needs") from e
        raise ModelError(
            f"model builder {builder}: there is no module {module_name}{nearest(module_name, own)}; "
            f"hybridpar has {', '.join(own)}, and your own must lie in {here} or be installed"
        ) from e
    except Exception as e:
        raise ModelError(f"model builder {builder} cannot be imported: {type(e).__name__}: {e}") from e


def _accepted(function: Callable[..., Any]) -> tuple[list[str], bool]:
    """List the names that can be passed by keyword, and whether any other can too."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return [], True
    by_keyword = {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    return [p.name for p in parameters if p.kind in by_keyword], takes_any
