"""What the sampler process tells its parent while it runs, one JSON line each."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from typing import Literal, get_args

from hybridpar.schema import to_data

Kind = Literal["started", "gap", "ended"]


@dataclass(frozen=True)
class Answer:
    """One thing that the sampler tells."""

    kind: Kind
    """It samples; some data is missing from now on; it ends before it was told to."""
    reason: str | None = None
    """Of "started": why there is no data of any GPU, None where there is; else what happened. One sentence."""
    lost: bool = False
    """Whether data of a GPU had been there before and is not any more."""


def to_line(answer: Answer) -> str:
    """Return the answer as a line of JSON, newline included."""
    return json.dumps(to_data(answer)) + "\n"


def parse(line: bytes) -> Answer | None:
    """Return the answer in a line; None where it is none, as of a warning or a traceback."""
    with contextlib.suppress(ValueError, TypeError):
        answer = Answer(**json.loads(line))
        if answer.kind in get_args(Kind):
            return answer
    return None
