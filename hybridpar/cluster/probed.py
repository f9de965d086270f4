"""What a probe measured."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from hybridpar.cluster.fit import Fit
from hybridpar.cluster.topology import MOST_CONTENTION, Cluster, Level
from hybridpar.cluster.transport import What

Direction = Literal["forward", "reverse", "both"]


@dataclass(frozen=True)
class Series:
    """Median seconds by payload of one kind of communication on one level."""

    level: Level
    what: What
    direction: Direction
    ranks: int
    """Participants."""
    payload_bytes: tuple[int, ...]
    seconds: tuple[float, ...]
    fit: Fit


@dataclass(frozen=True)
class Overlap:
    """What a computation lost during communication on one level."""

    level: Level
    what: What
    payload_bytes: int
    lost_s: float
    """Of computation, in seconds of a core of its own where ranks share cores."""
    communication_s: float
    """How long the communication takes by itself."""

    @property
    def contention(self) -> float:
        """Lost seconds of computation per second of communication."""
        return limited(self.lost_s / self.communication_s)


@dataclass(frozen=True)
class Probed:
    """The measured cluster, and what it was fitted to."""

    cluster: Cluster
    series: tuple[Series, ...]
    overlaps: tuple[Overlap, ...]
    kernel_s: tuple[float, ...]
    """Seconds of the small computation on every rank."""
    unmeasured: tuple[str, ...]
    """What the budget did not suffice for, or could not be fitted, with the reason."""
    wall_s: float

    def about(self) -> dict[str, Any]:
        """Return the origin of the description as plain data: what was measured, and how well the lines fit."""
        return {
            "source": "measured",
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "measured": {
                "wall_s": rounded(self.wall_s),
                "kernel_s": [rounded(s) for s in self.kernel_s],
                "series": [
                    {
                        "level": s.level,
                        "what": s.what,
                        "direction": s.direction,
                        "ranks": s.ranks,
                        "latency_s": rounded(s.fit.latency_s),
                        "bytes_per_s": rounded(s.fit.bytes_per_s),
                        "median_error": rounded(s.fit.median_error),
                        "worst_error": rounded(s.fit.worst_error),
                        "payload_bytes": list(s.payload_bytes),
                        "seconds": [rounded(t) for t in s.seconds],
                    }
                    for s in self.series
                ],
                "overlaps": [
                    {
                        "level": o.level,
                        "what": o.what,
                        "payload_bytes": o.payload_bytes,
                        "lost_s": rounded(o.lost_s),
                        "communication_s": rounded(o.communication_s),
                    }
                    for o in self.overlaps
                ],
                "unmeasured": list(self.unmeasured),
            },
        }


def rounded(value: float) -> float:
    """Round to the four digits that a measurement deserves."""
    return float(f"{value:.4g}")


def limited(contention: float) -> float:
    """Return a measured contention within what a cluster takes."""
    return min(MOST_CONTENTION, max(0.0, contention))
