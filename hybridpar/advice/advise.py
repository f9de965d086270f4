"""All advice on a run, from what its folder holds."""

from __future__ import annotations

from collections.abc import Callable

from hybridpar.advice.evidence import Evidence
from hybridpar.advice.feeding import feeding
from hybridpar.advice.memory import head_room
from hybridpar.advice.micro_batches import other_sizes
from hybridpar.advice.replan import Replanner
from hybridpar.advice.throttled import throttled
from hybridpar.advice.waiting import bubble, communication
from hybridpar.config import load
from hybridpar.errors import HybridparError
from hybridpar.report.advice import Advised
from hybridpar.report.attribution import attribute
from hybridpar.report.comparison import Comparison
from hybridpar.report.findings import missing
from hybridpar.report.run import Run

RULES: tuple[Callable[[Evidence], Advised], ...] = (
    other_sizes,
    communication,
    bubble,
    feeding,
    throttled,
    head_room,
)


def advise(run: Run, comparison: Comparison | None) -> Advised:
    """Return what to change about a run, each with its evidence and what the planner predicts of it.

    The planner plans again for every change that is thought of, on the run's own profile and cluster: that takes
    as long as ``hybridpar plan`` does, a few times. Without evidence nothing is said; ``lacking`` names what is
    missing. Raises HybridparError where a file of the monitor is malformed.
    """
    if run.basis is None:
        return Advised(lacking=(str(missing(run)),))
    try:
        planner = Replanner(run.plan, run.basis, load(run.folder / "config.yaml"))
    except HybridparError as e:
        return Advised(lacking=(f"the run cannot be planned again: {e}",))
    attribution = None if comparison is None else attribute(run, comparison)
    evidence = Evidence(run, run.basis, planner, comparison, attribution)
    lacking = () if comparison is not None else (f"micro-batches, waits and throttling: {missing(run)}",)
    return Advised.merged([*(rule(evidence) for rule in RULES), Advised(lacking=lacking)])
