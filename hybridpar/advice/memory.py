"""Memory that a run leaves unused: a larger global batch, as far as it fits."""

from __future__ import annotations

from hybridpar.advice.evidence import Evidence
from hybridpar.advice.replan import LEAST_GAIN, Outcome
from hybridpar.report.advice import Advice, Advised
from hybridpar.report.text import in_bytes

MOST_FULL = 0.6
"""Share of its memory that the fullest rank may use where there is said to be room."""
FACTORS = (2, 4)
"""Of the global batch."""


def head_room(known: Evidence) -> Advised:
    """Advise a larger global batch where memory is left and the throughput gains by it."""
    if known.run.summary is None:
        return Advised(lacking=("memory head-room: the peaks are written when the run ends",))
    used = known.run.summary.measured_memory_bytes
    limits = [known.basis.cluster.memory_bytes(rank) for rank in range(known.plan.world)]
    rank = max(range(len(used)), key=lambda r: used[r] / limits[r])
    share = used[rank] / limits[rank]
    if share > MOST_FULL:
        return Advised()
    measured = (
        f"rank {rank}, the fullest, used at most {in_bytes(used[rank])} of its {in_bytes(limits[rank])} "
        f"({share:.0%})"
    )
    outcome = _best(known, max(1.0, used[rank] / max(known.planner.now.memory_bytes)))
    if outcome is None:
        return Advised(remarks=(f"{measured}, but no larger global batch is predicted to fit and to gain by it",))
    return Advised((_advice(outcome, measured),))


def _best(known: Evidence, off: float) -> Outcome | None:
    """Return the largest batch up to which each one gains on the one before it.

    It also fits where all needs ``off`` times the memory that is predicted.
    """
    planner, cluster, best = known.planner, known.basis.cluster, None
    least = min(cluster.memory_bytes(rank) for rank in range(cluster.world))
    for factor in FACTORS:
        outcome = planner.outcome(planner.asked.batch(factor * known.plan.global_batch))
        if outcome is None or outcome.forecast.then_bytes * off > least:
            break
        if best is not None and outcome.forecast.gain < best.forecast.gain + LEAST_GAIN:
            break
        best = outcome
    return best


def _advice(outcome: Outcome, measured: str) -> Advice:
    forecast = outcome.forecast
    return Advice(
        "memory",
        None,
        f"use the memory that is left: a global batch of {forecast.then_batch} instead of {forecast.now_batch} "
        "(which changes the training: the learning rate has to go with it)",
        (measured,),
        outcome.change.overrides,
        forecast,
    )
