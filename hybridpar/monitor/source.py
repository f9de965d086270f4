"""What the sampler reads from, and the figures of a GPU that several origins give together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from hybridpar.monitor.record import Record

Figures = dict[str, Any]
"""Fields of a GpuSample by name; what is unknown is None or left out."""


@dataclass(frozen=True)
class Unavailable:
    """A source gives no data at all."""

    reason: str
    """One sentence."""


class Source(Protocol):
    """Something that is read at every tick."""

    name: str
    """Of what there is no data where reading fails, as in "no {name} data"."""

    @property
    def gaps(self) -> Sequence[str]:
        """What will be unknown and why, one sentence each."""

    def read(self, time_s: float) -> Sequence[Record]:
        """Return the records of a tick, stamped ``time_s`` (seconds since the epoch).

        What a single call refuses is None in them. A cause for missing data is a Gap, once.
        """

    def close(self) -> None:
        """Give back whatever it holds."""


class Meter(Protocol):
    """One origin of figures of one GPU."""

    source: str
    """What its figures are marked with."""

    def read(self, time_s: float) -> Figures:
        """Return the figures of the window that ends now, ``time_s`` (seconds since the epoch)."""

    def close(self) -> None:
        """Give back whatever it holds."""


class Refused(Exception):  # noqa: N818 - no error, but an answer: this time there are no figures
    """A meter was refused every figure; the message is the origin's own."""
