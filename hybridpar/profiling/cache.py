"""Measured profiles on disk, found again by what they depend on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from hybridpar.errors import ProfileError
from hybridpar.model.chain import Chain
from hybridpar.profiling.record import SCHEMA_VERSION, Profile


def cache_directory() -> Path:
    """Folder of cached profiles: ``hybridpar`` in XDG_CACHE_HOME, or in ``~/.cache`` (XDG Base Directory 0.8)."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "hybridpar"


def cache_key(chain: Chain, device: str, dtype: str, *settings: object) -> str:
    """Hash over what a measured profile depends on: chain, device, dtype, torch, record version, ``settings``."""
    facts = [chain.fingerprint, device, dtype, torch.__version__, SCHEMA_VERSION, *map(repr, settings)]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def cached(directory: Path, key: str, make: Callable[[], Profile]) -> Profile:
    """Return the profile kept under ``key`` in ``directory``, or make it and keep it where that can be written."""
    path = directory / f"profile-{key}.json"
    try:
        return Profile.load(path)
    except ProfileError:
        profile = make()
    partial = path.with_suffix(f".{os.getpid()}")
    with suppress(OSError):
        directory.mkdir(parents=True, exist_ok=True)
        profile.save(partial)
        partial.replace(path)
    return profile
