"""What a verification found, and how it is printed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rich.console import Console

from hybridpar.report.text import plural, titled

What = Literal["output", "loss", "gradient", "parameter", "statistics"]
"""What is compared, in the order in which a step makes it."""


@dataclass(frozen=True)
class Finding:
    """One value that was compared with that of a single process, at its worst element."""

    step: int
    what: What
    layer: str
    """The layer's name; ``loss`` for the loss."""
    place: str
    """Which rank computed it, of which samples or features, or the parameter's name and rank."""
    actual: float
    expected: float
    error: float
    """Largest difference, as a share of the layer's largest value; infinite for what is missing or no number."""
    tolerance: float

    @property
    def diverges(self) -> bool:
        """Whether the difference is more than rounding."""
        return not self.error <= self.tolerance

    def __str__(self) -> str:
        return (
            f"step {self.step}: {self.what} of {self.layer} on {self.place} is {self.actual:.9g}, "
            f"in a single process {self.expected:.9g}: off by {self.error:.3g} of the layer's largest value, "
            f"tolerance {self.tolerance:.3g}"
        )


@dataclass(frozen=True)
class Verification:
    """The result of comparing a plan with a single process."""

    model: str
    world: int
    precision: str
    samples: tuple[int, ...]
    """Of every step that was run."""
    counts: tuple[tuple[What, int], ...]
    """How many values of each kind were compared."""
    worst: tuple[Finding, ...]
    """The largest error of each kind."""
    first: Finding | None
    """The first divergent value: layers forwards for outputs, backwards for gradients; None: all agree."""
    notes: tuple[str, ...] = ()
    """What was not compared, and why."""


def show(found: Verification, console: Console) -> None:
    """Print the verdict, and the largest error of every kind."""
    steps = f"{plural(len(found.samples), 'step')} of {', '.join(map(str, found.samples))} samples"
    console.print(
        f"{found.model} on {plural(found.world, 'rank')} against a single process, {found.precision}: {steps}"
    )
    table = titled("")
    for name in ("compared", "values", "largest error", "tolerance", "where"):
        table.add_column(name)
    counts = dict(found.counts)
    for worst in found.worst:
        where = f"step {worst.step}, {worst.layer}, {worst.place}"
        table.add_row(worst.what, str(counts[worst.what]), f"{worst.error:.3g}", f"{worst.tolerance:.3g}", where)
    console.print(table)
    for note in found.notes:
        console.print(note)
    console.print("all agree" if found.first is None else f"first divergence: {found.first}", soft_wrap=True)
