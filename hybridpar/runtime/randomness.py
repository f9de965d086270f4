"""The states of a process's random generators as tensors: torch's, numpy's and Python's own.

A checkpoint holds them as plain numbers, so that nothing has to be unpickled.
"""

from __future__ import annotations

import random

import numpy as np
import torch

from hybridpar.errors import CheckpointError

_WORDS = 624
"""Of a Mersenne Twister, which both numpy's global generator and Python's are."""


def states(device: torch.device) -> dict[str, torch.Tensor]:
    """Return the states of all global generators that a user's code may draw from in a training on ``device``.

    Those of numpy and Python are (627,) int64: the words, the position in them, whether a normal number is held
    back, and its bits. Raises CheckpointError where numpy's generator was replaced by one of another kind.
    """
    found = {"cpu": torch.default_generator.get_state(), "numpy": _of_numpy(), "python": _of_python()}
    if device.type == "cuda":
        found["cuda"] = torch.cuda.get_rng_state(device)
    return found


def restore(kind: str, state: torch.Tensor, device: torch.device) -> None:
    """Give a generator a state of ``states``. Raises CheckpointError for one that it cannot have."""
    try:
        if kind == "cpu":
            torch.default_generator.set_state(state)
        elif kind == "cuda":
            torch.cuda.set_rng_state(state, device)
        else:
            _restore_twister(kind, state)
    except (RuntimeError, TypeError, ValueError, OverflowError) as e:
        raise CheckpointError(
            f"the checkpoint's state of the {kind} random generator is none: {e}; use another checkpoint"
        ) from e


def _of_numpy() -> torch.Tensor:
    state = np.random.get_state(legacy=False)
    if not isinstance(state, dict) or state["bit_generator"] != "MT19937":
        raise CheckpointError(
            "numpy's global generator was replaced, and a checkpoint holds that of kind MT19937 only; draw from "
            "a generator of your own and keep its state, or set checkpoint.every=null"
        )
    words, at = state["state"]["key"], state["state"]["pos"]
    return _packed([int(w) for w in words], int(at), state["gauss"] if state["has_gauss"] else None)


def _of_python() -> torch.Tensor:
    _, (*words, at), gauss = random.getstate()
    return _packed(words, at, gauss)


def _packed(words: list[int], at: int, gauss: float | None) -> torch.Tensor:
    bits = torch.tensor(gauss or 0.0, dtype=torch.float64).view(torch.int64)
    return torch.tensor([*words, at, int(gauss is not None), int(bits)])


def _restore_twister(kind: str, state: torch.Tensor) -> None:
    if state.shape != (_WORDS + 3,) or state.dtype != torch.int64:
        raise ValueError(f"{state.dtype} {list(state.shape)} instead of int64 [{_WORDS + 3}]")
    *words, at, held, _ = state.tolist()
    if not all(0 <= w < 2**32 for w in words) or not 0 <= at <= _WORDS or held not in {0, 1}:
        raise ValueError("its words or its position are out of range")
    gauss = float(state[-1].view(torch.float64))
    if kind == "python":
        random.setstate((3, (*words, at), gauss if held else None))
    else:
        np.random.set_state(("MT19937", np.array(words, dtype=np.uint32), at, held, gauss))
