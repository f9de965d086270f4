"""Larger or smaller micro-batches of a stage: all usual sizes simulated, the best one planned again."""

from __future__ import annotations

from hybridpar.advice.evidence import Evidence
from hybridpar.advice.occupancy import HalfEmpty
from hybridpar.advice.replan import LEAST_GAIN, Outcome
from hybridpar.planning.microbatches import best_micro_batch
from hybridpar.planning.plan import Kind, Prediction
from hybridpar.report.advice import Advice, Advised
from hybridpar.report.text import in_time


def other_sizes(known: Evidence) -> Advised:
    """Advise another micro-batch of every stage whose best one gains enough."""
    if known.comparison is None:
        return Advised()
    return Advised.merged(_other_size(known, index) for index in range(len(known.plan.stages)))


def _other_size(known: Evidence, index: int) -> Advised:
    outcome, empty, kind = _best(known, index), known.half_empty(index), known.plan.stages[index].kind
    advices = () if outcome is None else (_advice(known, index, outcome, empty),)
    if empty is None or (empty.verdict == "fault" and outcome is not None):
        return Advised(advices)
    if empty.verdict == "unknown":
        return Advised(advices, lacking=(f"{kind}: {empty.text}",))
    vain = ", but the planner predicts no gain of another micro-batch" if empty.verdict == "fault" else ""
    return Advised(advices, remarks=(f"{kind}: {empty.text}{vain}",))


def _best(known: Evidence, index: int) -> Outcome | None:
    """Return what the planner makes of the best size of a stage; None where it gains too little.

    That is the fastest in the run's own plan, or what the planner chooses where it may.
    """
    planner, stage = known.planner, known.plan.stages[index]
    effect = best_micro_batch(planner.trials, known.plan, index)
    if effect is None or effect.step_s is None or planner.now.step_s / effect.step_s - 1 < LEAST_GAIN:
        return None
    sizes = {effect.micro_batch}
    if planner.asked.request.pin(stage.kind).micro_batch is not None:
        chosen = planner.outcome(planner.asked.pinned(stage.kind, None))
        sizes |= {s.micro_batch for s in (chosen.plan.stages if chosen else ()) if s.kind == stage.kind}
    found = [planner.outcome(planner.asked.pinned(stage.kind, size)) for size in sorted(sizes)]
    return max((o for o in found if o is not None), key=lambda o: o.forecast.gain, default=None)


def _advice(known: Evidence, index: int, outcome: Outcome, empty: HalfEmpty | None) -> Advice:
    stage = known.plan.stages[index]
    then = outcome.change.request.pin(stage.kind).micro_batch
    assert then is not None
    word = "larger" if then > stage.micro_batch else "smaller"
    evidence = [known.computing(index), _predicted(known, outcome, stage.kind)]
    if empty is not None and empty.verdict == "fault" and word == "larger":
        evidence.append(empty.text)
    return Advice(
        "micro_batch",
        stage.kind,
        f"give the {stage.kind} a {word} micro-batch: {then} instead of {stage.micro_batch}",
        tuple(evidence),
        outcome.change.overrides,
        outcome.forecast,
    )


def _predicted(known: Evidence, outcome: Outcome, kind: Kind) -> str:
    """Say what the stage's busiest rank computes for it, now and then."""
    now, then = (_passes_s(p, kind) for p in (known.planner.now, outcome.plan.prediction))
    return f"by itself its busiest rank is predicted to compute {in_time(now)} per step now, {in_time(then)} then"


def _passes_s(prediction: Prediction | None, kind: Kind) -> float:
    assert prediction is not None
    return sum(s.forward_s + s.backward_s for s in prediction.stages if s.kind == kind)
