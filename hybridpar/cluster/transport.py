"""What a probe needs of a rank: to compute, to communicate, and a clock."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol, TypeVar

from hybridpar.cluster.topology import Collective

T = TypeVar("T")
What = Literal["message", Collective]
ACK_BYTES = 4


class Pending(Protocol):
    """Communication under way."""

    def wait(self) -> None:
        """Return when all of it is done."""


class Transport(Protocol):
    """One rank's way to compute and to communicate, and its clock."""

    rank: int
    world: int

    def now(self) -> float:
        """Return the clock's seconds."""

    def gather(self, value: T) -> list[T]:
        """Return every rank's value in rank order, on every rank; nobody returns before all have come."""

    def open(self, groups: Sequence[tuple[int, ...]]) -> None:
        """Prepare collectives among each of ``groups``; every rank calls it once, members or not."""

    def messages(self, source: int, target: int, payload_bytes: int, count: int) -> None:
        """Send ``count`` messages, each answered by one of ``ACK_BYTES``; both ends call it."""

    def collective(self, operation: Collective, ranks: tuple[int, ...], payload_bytes: int, count: int) -> None:
        """Run ``count`` collectives one after the other; ``payload_bytes`` is the size of the whole vector."""

    def start(self, what: What, ranks: tuple[int, ...], payload_bytes: int, count: int) -> Pending:
        """Start ``count`` messages from the first of two ranks to the second, or collectives, and return."""

    def compute(self, count: int) -> None:
        """Run a small computation of fixed work ``count`` times; does not wait for communication."""
