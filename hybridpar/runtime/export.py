"""Export: a checkpoint's parameters and buffers as a state dict that the plain model loads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from hybridpar.errors import CheckpointError, ConfigError
from hybridpar.runtime.manifest import Manifest, find
from hybridpar.runtime.pieces import Stored
from hybridpar.runtime.state import AVERAGE, BUFFER, PARAMETER, mean_buffer

SUFFIXES = (".safetensors", ".pt", ".pth")


@dataclass(frozen=True)
class Exported:
    """What was written."""

    checkpoint: Path
    step: int
    tensors: int
    unused: tuple[str, ...]
    """Tensors of the model that none of its layers uses: they were never trained, and are left out."""


def export(path: Path, out: Path, *, ema: bool = False) -> Exported:
    """Write the state dict of a checkpoint, or of the latest one of a run, to ``out``, by its suffix's format.

    A parameter that has several names is written under each. Batch-norm statistics are the mean over those who
    held them, as in an evaluation. ``ema``: of what was trained the moving average. ``out`` is replaced as a
    whole, or left as it was. Raises ConfigError for ``out``, CheckpointError for the checkpoint.
    """
    check_out(out)
    folder = find(path)
    manifest = Manifest.load(folder)
    stored = Stored(folder, manifest.ranks)
    if ema and not any(name.startswith(AVERAGE) for name in stored.tensors):
        raise CheckpointError(f"ema=true: {folder} holds no average of the weights; it was made without train.ema")
    tensors = {name: _value(stored, saved, ema=ema) for name, saved in manifest.names.items()}
    partial = out.with_name(f".{out.name}.partial")
    try:
        _write(tensors, partial, out.suffix)
        partial.replace(out)
    except (OSError, RuntimeError, SafetensorError) as e:
        # Torch's writer and the one of safetensors wrap what the system says.
        partial.unlink(missing_ok=True)
        why = getattr(e, "strerror", None) or e
        raise ConfigError(f"out: cannot write {out}: {why}; free space, or name another file") from e
    return Exported(folder, manifest.position.step, len(tensors), manifest.unused)


def check_out(out: Path) -> None:
    """Raise ConfigError for a file that cannot be written, or whose format is unknown."""
    if out.suffix not in SUFFIXES:
        raise ConfigError(f"out: {out} has none of the suffixes {', '.join(SUFFIXES)}; name the format by one")
    if not out.absolute().parent.is_dir():
        raise ConfigError(f"out: {out} lies in no existing folder; make it first")


def _value(stored: Stored, saved: str, *, ema: bool) -> torch.Tensor:
    average = AVERAGE + saved.removeprefix(PARAMETER)
    if ema and saved.startswith(PARAMETER) and average in stored.tensors:
        return stored.read(average)
    if saved.startswith(PARAMETER):
        return stored.read(saved)
    if saved.startswith(BUFFER):
        return mean_buffer(stored, saved.removeprefix(BUFFER))
    raise CheckpointError(
        f"{stored.folder}: {saved} names neither a parameter nor a buffer; use another checkpoint"
    )


def _write(tensors: Mapping[str, torch.Tensor], path: Path, suffix: str) -> None:
    if suffix == ".safetensors":
        save_file(dict(tensors), path, metadata={"format": "pt"})
    else:
        torch.save(dict(tensors), path)
