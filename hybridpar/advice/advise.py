"""All advice on a run, from what its folder holds."""

from __future__ import annotations

from collections.abc import Callable

from hybridpar.advice.evidence import Evidence
from hybridpar.advice.memory import head_room
from hybridpar.advice.micro_batches import other_sizes
from hybridpar.advice.replan import Replanner
from hybridpar.config import load
from hybridpar.errors import HybridparError
from hybridpar.report.advice import Advised
from hybridpar.report.comparison import Comparison
from hybridpar.report.findings import missing
from hybridpar.report.run import Run

RULES: tuple[Callable[[Evidence], Advised], ...] = (other_sizes, head_room)


def advise(run: Run, comparison: Comparison | None) -> Advised:
    """Return what to change about a run, each with its evidence and what the planner predicts of it.

    The planner plans again for every change that is thought of, on the run's own profile and cluster: that takes
    as long as ``hybridpar plan`` does, a few times. Without evidence nothing is said; ``lacking`` names what is
    missing.
    """
    if run.basis is None:
        return Advised(lacking=(str(missing(run)),))
    try:
        planner = Replanner(run.plan, run.basis, load(run.folder / "config.yaml"))
    except HybridparError as e:
        return Advised(lacking=(f"the run cannot be planned again: {e}",))
    evidence = Evidence(run, run.basis, planner, comparison)
    lacking = () if comparison is not None else (f"micro-batches: {missing(run)}",)
    return Advised.merged([*(rule(evidence) for rule in RULES), Advised(lacking=lacking)])
