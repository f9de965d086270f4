"""References: objects of a user's own modules that a configuration names."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from hybridpar.errors import ConfigError
from hybridpar.names import nearest


def resolve(reference: str, key: str) -> Any:
    """Return what ``module:name`` stands for; the module may lie in the working directory.

    ``key`` is where the configuration names it. Raises ConfigError where there is no such thing.
    """
    module_name, colon, name = reference.partition(":")
    if not (module_name and colon and name):
        raise ConfigError(f"{key}: {reference!r} is not of the form module:name")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as e:
        raise ConfigError(f"{key}: {reference} cannot be imported: {e}; put it on PYTHONPATH, or in {here}") from e
    except Exception as e:
        raise ConfigError(f"{key}: {reference} cannot be imported: {type(e).__name__}: {e}") from e
    if not hasattr(module, name):
        public = [n for n in vars(module) if not n.startswith("_")]
        raise ConfigError(f"{key}: {module_name} has no {name}{nearest(name, public)}")
    return getattr(module, name)
