"""Measured profiles on disk, found again by what they depend on."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from contextlib import suppress
from pathlib import Path

import torch

from hybridpar.cluster.describe import core_quota
from hybridpar.errors import ProfileError
from hybridpar.model.chain import Chain
from hybridpar.profiling.record import SCHEMA_VERSION, Profile

_METHOD = 5
"""Counts the ways in which profiles were measured: those of an earlier one are not used again."""


def device_name(device: str | torch.device) -> str:
    """Name of the device's hardware, for the profile and its cache key."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    quota = f", {core_quota():g} of a core" if core_quota() < 1 else ""
    return f"cpu ({names[0] if names else platform.machine()}{quota})"


def cache_directory() -> Path:
    """Folder of cached profiles: ``hybridpar`` in XDG_CACHE_HOME, or in ``~/.cache`` (XDG Base Directory 0.8)."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "hybridpar"


def cache_key(chain: Chain, device: str, dtype: str, *settings: object) -> str:
    """Hash over what a measured profile depends on: chain, device, dtype, versions, CPU quota, ``settings``."""
    versions = [torch.__version__, platform.python_version(), SCHEMA_VERSION, _METHOD]
    facts = [chain.fingerprint, device, dtype, *versions, core_quota(), *map(repr, settings)]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def find(directory: Path, key: str) -> Profile | None:
    """Return the profile that is kept under ``key`` in ``directory``; None where none can be read."""
    try:
        return Profile.load(_path(directory, key))
    except ProfileError:
        return None


def keep(directory: Path, key: str, profile: Profile) -> None:
    """Keep ``profile`` under ``key`` in ``directory``, where that can be written."""
    path = _path(directory, key)
    partial = path.with_suffix(f".{os.getpid()}")
    with suppress(OSError):
        directory.mkdir(parents=True, exist_ok=True)
        profile.save(partial)
        partial.replace(path)


def _path(directory: Path, key: str) -> Path:
    return directory / f"profile-{key}.json"
