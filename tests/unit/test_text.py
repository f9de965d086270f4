"""Text as samples: rows of characters with the ones that follow."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from hybridpar.data.datasets import Splits, check, load
from hybridpar.data.spec import DataSpec
from hybridpar.data.text import CHARACTERS, read_text, split_text
from hybridpar.errors import ConfigError, DataError

LENGTH, CLASSES = 64, len(CHARACTERS)


def text_of(rows: list[list[int]]) -> str:
    return "".join(CHARACTERS[number] for row in rows for number in row)


def read(splits: Splits, split: str, *indices: int) -> tuple[list[list[int]], list[list[int]]]:
    samples = getattr(splits, split)
    tokens, labels = samples.read(np.array(indices), np.zeros(len(indices), dtype=np.uint64))
    assert tokens.is_contiguous()
    assert labels.is_contiguous()
    return tokens.tolist(), labels.tolist()


def test_every_character_is_a_sample_once_and_a_label_once(tmp_path: Path) -> None:
    text = "".join(chr(ord("a") + i % 26) for i in range(103))
    (tmp_path / "text.txt").write_text(text)
    splits = load(DataSpec("text", root=str(tmp_path / "text.txt")), (5,), CLASSES, label_shape=(5,))
    assert (len(splits.train), len(splits.test)) == (18, 2)
    tokens, labels = (
        a + b for a, b in zip(read(splits, "train", *range(18)), read(splits, "test", 0, 1), strict=True)
    )
    assert (text_of(tokens), text_of(labels)) == (text[:100], text[1:101])


def test_what_is_not_ascii_is_a_question_mark() -> None:
    train, _ = split_text("a\tb\N{GREEK SMALL LETTER ALPHA}\n~\N{FACE WITH TEARS OF JOY} " * 20, 8, "it")
    assert text_of(train.read(np.array([0]), np.zeros(1, dtype=np.uint64)).inputs.tolist()) == "a?b?\n~? "


def test_the_text_of_python_is_language() -> None:
    """Long enough to learn from, and far from evenly spread characters."""
    text, _ = read_text(None)
    counts = Counter(c if c in CHARACTERS else "?" for c in text)
    entropy = -sum(n / len(text) * math.log(n / len(text)) for n in counts.values())
    assert len(text) > 300_000
    assert counts["?"] < len(text) / 100
    assert 2.5 < entropy < 3.5


@pytest.mark.parametrize(
    ("in_shape", "classes", "label_shape", "said"),
    [
        ((LENGTH,), CLASSES - 1, (LENGTH,), "has 96 classes, but the model has 95"),
        ((LENGTH,), CLASSES, (), "one row of logits per sample"),
        ((3, 8), CLASSES, (3,), r"the model takes \(3, 8\)"),
        ((10**6,), CLASSES, (10**6,), "0 samples of 1000000"),
    ],
)
def test_models_that_do_not_fit_are_refused(
    in_shape: tuple[int, ...], classes: int, label_shape: tuple[int, ...], said: str
) -> None:
    with pytest.raises(DataError, match=said):
        load(DataSpec("text"), in_shape, classes, label_shape=label_shape)


def test_files_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\xff")
    for name in ("binary", "missing"):
        with pytest.raises(DataError, match=rf"data\.root: cannot read .*{name}"):
            read_text(str(tmp_path / name))
    with pytest.raises(ConfigError, match=r"data\.augment=shift does not work with data set text"):
        DataSpec("text", augment="shift")
    check(DataSpec("text"), CLASSES, (LENGTH,))
