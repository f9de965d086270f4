"""What the doctor finds: one thing that was looked at, what it is like, and what to do where it is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "note", "wrong"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    topic: str
    status: Status
    """``note``: jobs run, but some kind of them does not, or not well."""
    what: str
    remedy: str | None = None


@dataclass(frozen=True)
class Rank:
    """Where a rank of the job runs, and whom it cannot reach."""

    host: str
    process: int
    node: int
    device: str
    interface: str
    """Through which it talks to other nodes, with its address."""
    unreachable: tuple[str, ...] = ()
    """What went wrong with which rank."""


@dataclass(frozen=True)
class Diagnosis:
    """What the doctor found on all ranks."""

    findings: tuple[tuple[Finding, tuple[int, ...]], ...]
    """Each with the ranks that found it; of one process, that is 0."""
    ranks: tuple[Rank, ...]

    @property
    def wrong(self) -> int:
        """How many things are wrong."""
        return sum(found.status == "wrong" for found, _ in self.findings)


def ok(topic: str, what: str) -> Finding:
    """Return what is as it should be."""
    return Finding(topic, "ok", what)


def note(topic: str, what: str, remedy: str | None = None) -> Finding:
    """Return what some jobs suffer from."""
    return Finding(topic, "note", what, remedy)


def wrong(topic: str, what: str, remedy: str) -> Finding:
    """Return what has to be mended."""
    return Finding(topic, "wrong", what, remedy)


def merge(per_rank: Sequence[Sequence[Finding]]) -> tuple[tuple[Finding, tuple[int, ...]], ...]:
    """Return every finding once, with the ranks that have it, in the order of the first."""
    ranks: dict[Finding, list[int]] = {}
    for rank, found in enumerate(per_rank):
        for finding in found:
            ranks.setdefault(finding, []).append(rank)
    return tuple((finding, tuple(at)) for finding, at in ranks.items())
