"""Text as rows of characters, each with the one that follows it as its label."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hybridpar.data.keys import Keys
from hybridpar.data.samples import Batch, Indices
from hybridpar.errors import DataError

CHARACTERS = "".join(map(chr, range(ord(" "), ord("~") + 1))) + "\n"
"""The tokens: printable ASCII, and the end of a line. Any other character reads as a question mark."""
TEST_PART = 10
"""One of so many samples is for testing: the last ones of the text."""


class TextSamples:
    """Runs of a text's characters, one after the other, and the same runs one character later as their labels."""

    def __init__(self, runs: Tensor) -> None:
        """Take token ids (size, length + 1)."""
        self._inputs, self.labels = runs[:, :-1], runs[:, 1:]

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, indices: Indices, keys: Keys) -> Batch:  # noqa: ARG002 - nothing is random
        """Read samples by their indices (n,)."""
        chosen = torch.from_numpy(indices)
        return Batch(self._inputs.index_select(0, chosen), self.labels.index_select(0, chosen))


def split_text(text: str, length: int, name: str) -> tuple[TextSamples, TextSamples]:
    """Cut a text into samples of ``length`` tokens, to train on and to test on.

    What is left at its end is left out. Raises DataError where there are too few.
    """
    ids = torch.from_numpy(_encoded(text))
    size = (len(ids) - 1) // length
    test = size // TEST_PART
    if not test:
        raise DataError(
            f"{name} has {len(ids)} characters, which make {max(size, 0)} samples of {length}; the least "
            f"are {TEST_PART}, one of them for testing: set data.root to a longer text or model.in_shape to less"
        )
    runs = ids[: size * length + 1].unfold(0, length + 1, length)
    return TextSamples(runs[: size - test]), TextSamples(runs[size - test :])


def read_text(root: str | None) -> tuple[str, str]:
    """Return a text and its name: of a file, or the language reference that comes with Python for ``help()``.

    Raises DataError for a file that cannot be read.
    """
    if root is None:
        from pydoc_data.topics import topics  # noqa: PLC0415 - half a megabyte

        return "\n".join(topics[name] for name in sorted(topics)), "the language reference of Python"
    path = Path(root).expanduser()
    try:
        return path.read_text(encoding="utf-8"), str(path)
    except (OSError, UnicodeDecodeError) as e:
        raise DataError(f"data.root: cannot read {path} as text: {e}; give a file in UTF-8, or null") from e


def _encoded(text: str) -> NDArray[np.int64]:
    """Return the token ids of a text, (characters,)."""
    codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    known = np.full(ord("~") + 1, CHARACTERS.index("?"), dtype=np.int64)
    for number, character in enumerate(CHARACTERS):
        known[ord(character)] = number
    unknown = CHARACTERS.index("?")
    return np.where(codes <= ord("~"), known[np.minimum(codes, ord("~"))], unknown)
