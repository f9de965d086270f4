"""Time that ranks wait for each other: communication that nothing hides, and bubble."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from hybridpar.advice.evidence import Evidence
from hybridpar.advice.replan import Change, Outcome
from hybridpar.planning.plan import Plan
from hybridpar.planning.trial import scaled_levels
from hybridpar.report.advice import Advice, Advised
from hybridpar.report.explanation import WHERE
from hybridpar.report.text import in_time, plural

BOUND = 0.2
"""Share of the step, mean over all ranks, from which on a wait is what the step is bound by."""

Wait = Literal["communication", "bubble"]
_WORDS: dict[Wait, str] = {
    "communication": "for communication that nothing hid",
    "bubble": "for other ranks that had not come so far",
}


def communication(known: Evidence) -> Advised:
    """Advise what makes ranks wait less, where they wait long for communication."""
    asked = known.planner.asked
    changes = [asked.free()]
    if known.plan.reduces and known.plan.recipe.sharding == "none" and known.plan.recipe.compression is None:
        changes.append(asked.lowered())
    return _waiting(known, "communication", changes)


def bubble(known: Evidence) -> Advised:
    """Advise what makes ranks wait less, where they wait long for each other."""
    return _waiting(known, "bubble", [known.planner.asked.free()])


def _waiting(known: Evidence, wait: Wait, changes: Sequence[Change | None]) -> Advised:
    """Plan again under some changes where ranks wait long; each one that gains enough is advised."""
    if known.attribution is None:
        return Advised()
    share = known.waited(wait)
    if share < BOUND:
        return Advised()
    measured = f"ranks waited {share:.0%} of the step {_WORDS[wait]}, most of it {known.most_waited(wait)}"
    found = [known.planner.outcome(change) for change in changes if change is not None]
    advices = tuple(_advice(outcome, wait, measured) for outcome in found if outcome is not None)
    return Advised(advices, () if advices else (f"{measured}; {_no_remedy(known, wait)}",))


def _advice(outcome: Outcome, wait: Wait, measured: str) -> Advice:
    if outcome.plan.recipe.compression is not None:
        what = "send gradients as bfloat16, which rounds them"
    else:
        what = f"leave more to the planner, which then chooses {_described(outcome.plan)}"
    return Advice(wait, None, what, (measured,), outcome.change.overrides, outcome.forecast)


def _described(plan: Plan) -> str:
    stages = ", ".join(
        f"{s.kind} on {plural(len(s.ranks), 'rank')} in micro-batches of {s.micro_batch}" for s in plan.stages
    )
    return stages if plan.replicas == 1 else f"{plan.replicas} replicas of {stages}"


def _no_remedy(known: Evidence, wait: Wait) -> str:
    """Say that no setting helps, and what a faster network would do."""
    nothing = "the planner knows no faster plan of this global batch"
    if wait == "bubble":
        return nothing
    trials = known.planner.trials
    level, step_s = scaled_levels(trials.cluster)[0], trials.step_s(known.planner.program, bandwidth=2.0)
    now_s = known.planner.now.step_s
    return f"{nothing}; twice the bandwidth {WHERE[level]}: step {in_time(now_s)} → {in_time(step_s)} predicted"
