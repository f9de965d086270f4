"""All advice on a run, from what its folder holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from hybridpar.advice.evidence import Evidence
from hybridpar.advice.feeding import feeding
from hybridpar.advice.memory import head_room
from hybridpar.advice.micro_batches import other_sizes
from hybridpar.advice.replan import Replanner
from hybridpar.advice.throttled import throttled
from hybridpar.advice.waiting import bubble, communication
from hybridpar.config import load
from hybridpar.errors import HybridparError
from hybridpar.report.account import Account
from hybridpar.report.advice import Advised
from hybridpar.report.findings import missing
from hybridpar.report.run import Run
from hybridpar.report.text import in_time

FAR = 1.5
"""Measured over predicted step time, or the inverse, from which on forecasts are to be doubted."""
CONFIGURATION = "config.yaml"
"""Of a run of the command line; a loop of one's own leaves none."""
RULES: tuple[Callable[[Evidence], Advised], ...] = (
    other_sizes,
    communication,
    bubble,
    feeding,
    throttled,
    head_room,
)


def advise(account: Account) -> Advised:
    """Return what to change about a run, each with its evidence and what the planner predicts of it.

    The planner plans again for every change that is thought of, on the run's own profile and cluster: that takes
    as long as ``hybridpar plan`` does, a few times. Without evidence nothing is said; ``lacking`` names what is
    missing. Raises HybridparError where a file of the monitor is malformed.
    """
    run = account.run
    if run.basis is None:
        return Advised(lacking=(str(missing(run)),))
    path = run.folder / CONFIGURATION
    try:
        planner = Replanner(run.plan, run.basis, load(path) if path.exists() else None)
    except HybridparError as e:
        return Advised(lacking=(f"the run cannot be planned again: {e}",))
    evidence = Evidence(run, run.basis, planner, account.comparison, account.attribution)
    lacking = () if account.comparison is not None else (f"micro-batches, waits and throttling: {missing(run)}",)
    found = Advised.merged([*(rule(evidence) for rule in RULES), Advised(lacking=lacking)])
    return replace(found, remarks=(*found.remarks, *_doubt(run, planner))) if found.advices else found


def _doubt(run: Run, planner: Replanner) -> Iterator[str]:
    """Say so where the run took another time than the planner says of it."""
    measured_s, predicted_s = run.step_s, planner.now.step_s
    if measured_s is None or 1 / FAR < measured_s / predicted_s < FAR:
        return
    yield (
        f"a step took {in_time(measured_s)} where {in_time(predicted_s)} are predicted: believe in which "
        "direction predictions point, not how far; a measured profile and a probed cluster predict better"
    )
