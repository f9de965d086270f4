"""The simulated time: when what was computed and what was on the wire."""

from __future__ import annotations

from dataclasses import dataclass, field

from hybridpar.planning.program import Action


@dataclass(frozen=True, slots=True)
class Span:
    """One computation of a rank."""

    rank: int
    start_s: float
    end_s: float
    action: Action


@dataclass(frozen=True, slots=True)
class Flight:
    """One operation on the wire, from the moment all participants and links were ready for it."""

    operation: int
    """Index into the program's operations."""
    start_s: float
    end_s: float


@dataclass
class Timeline:
    """The simulated steps."""

    ends_s: list[float]
    """When each step was over on all ranks."""
    spans: list[Span] = field(default_factory=list)
    """Computations of the last step."""
    flights: list[Flight] = field(default_factory=list)
    """Operations of the last step; what one rank of the job has for itself has none."""

    @property
    def period_s(self) -> float:
        """Time of a step in the steady state: the last end minus the one before."""
        return self.ends_s[-1] - (self.ends_s[-2] if len(self.ends_s) > 1 else 0.0)
