"""All that a report knows of one run, put together once for the terminal and the page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from hybridpar.report.advice import Advised, advice_finding
from hybridpar.report.attribution import Attribution, attribute
from hybridpar.report.comparison import Comparison, compare
from hybridpar.report.device_findings import device_findings, lacking
from hybridpar.report.findings import Finding, findings, missing
from hybridpar.report.kernel_findings import kernel_findings
from hybridpar.report.run import Run
from hybridpar.report.turns import Turns, turns_of


@dataclass(frozen=True)
class Account:
    """A run, its timelines laid over each other, and what its devices did for which stage."""

    run: Run
    comparison: Comparison | None
    """None where the run lacks one of the two timelines."""
    attribution: Attribution | None
    """Likewise."""
    advised: Advised | None = None
    """None where nobody was asked."""

    @staticmethod
    def load(folder: Path) -> Account:
        """Read a run's folder. Raises RecordError where it is none, or holds a malformed file, which is named."""
        return Account.of(Run.load(folder))

    @staticmethod
    def of(run: Run) -> Account:
        """Put together what a run's records tell."""
        comparison = compare(run)
        return Account(run, comparison, None if comparison is None else attribute(run, comparison))

    @cached_property
    def turns(self) -> Mapping[int, Turns]:
        """By rank, for which stages it computes; empty without a measured timeline."""
        return turns_of(self.comparison)

    @cached_property
    def findings(self) -> tuple[Finding, ...]:
        """All tables but the advice, the overview first."""
        return (
            *findings(self.run, self.comparison),
            *device_findings(self.run, self.attribution, self.turns),
            *kernel_findings(self.run),
        )

    @property
    def advice(self) -> Finding | None:
        """What is advised."""
        return None if self.advised is None else advice_finding(self.advised)

    @cached_property
    def lacking(self) -> tuple[str, ...]:
        """What is missing for more, each once, with the remedy."""
        timelines = missing(self.run) if self.comparison is None else None
        return tuple(text for text in (timelines, lacking(self.run)) if text is not None)
