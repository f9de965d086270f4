"""What a report says of a run, as tables of text that the terminal and the page show alike."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hybridpar.planning.blocks import positions
from hybridpar.report.comparison import HOW_TO_RECORD, Comparison
from hybridpar.report.overlap import Hidden, Overlap
from hybridpar.report.palette import stage_name
from hybridpar.report.run import Run
from hybridpar.report.shares import PHASES, Share
from hybridpar.report.text import in_bytes, in_time, plural, spans

MOST_ROWS = 64
"""Ranks of a table."""
DEVIATIONS = 12


@dataclass(frozen=True)
class Finding:
    """A table under its title, with remarks below. Its first column is text, the others are figures."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    texts: int = 1
    """So many of the first columns are text."""


def findings(run: Run, comparison: Comparison | None) -> tuple[Finding, ...]:
    """Return all that there is to say."""
    result = [_overview(run, comparison), _placement(run)]
    if comparison is not None:
        result += [_ranks(comparison), _stages(comparison), _overlap(comparison), _deviations(comparison)]
    if run.summary is not None:
        result.append(_memory(run))
    return tuple(result)


def beside(runs: Sequence[tuple[Run, Comparison | None]]) -> Finding:
    """Return several runs side by side, a row each."""
    rows = []
    for run, comparison in runs:
        prediction, last, tested = run.plan.prediction, run.steps.last, run.evaluations.last
        waiting = None
        if comparison is not None:
            waiting = sum(s.waiting_s / sum(s) for s in comparison.measured_shares) / len(
                comparison.measured_shares
            )
        rows.append(
            (
                run.name,
                " | ".join(f"{s.kind} {s.degree} x {s.micro_batch}" for s in run.plan.stages),
                str(run.plan.world),
                str(run.plan.global_batch),
                "unknown" if run.step_s is None else in_time(run.step_s),
                "unknown" if prediction is None else in_time(prediction.step_s),
                "unknown" if run.step_s is None else f"{run.plan.global_batch / run.step_s:.1f}",
                "unknown" if waiting is None else f"{waiting:.0%}",
                "none yet" if last is None else str(last.step + 1),
                "none yet" if last is None else f"{last.loss:.4f}",
                "none yet" if tested is None else f"{tested.top1:.4f}",
            )
        )
    columns = (
        "run",
        "stages: degree x micro-batch",
        "ranks",
        "global batch",
        "step",
        "predicted",
        "samples/s",
        "waiting",
        "steps",
        "loss",
        "test accuracy",
    )
    return Finding("side by side", columns, tuple(rows), texts=2)


def missing(run: Run) -> str | None:
    """Say why a run's timelines cannot be laid over each other, and what to do; None where they can."""
    if run.basis is None:
        return (
            "no simulated timeline: the run kept no profile.json and cluster.yaml; train again with this version"
        )
    if not run.timings:
        return f"no timeline was recorded under this plan: {HOW_TO_RECORD}"
    batch, first = run.plan.global_batch, run.plan.recipe.first_step
    if not any(step.samples == batch and step.step >= first for step in run.timings[0].steps):
        after = f" after step {first}, from where on gradients are compressed," if first else ""
        return f"no full step of {batch} samples{after} was recorded; set train.timeline to other steps"
    return None


def step_line(run: Run, comparison: Comparison | None) -> str:
    """Return the step time, measured and predicted."""
    prediction = run.plan.prediction
    known = [] if run.step_s is None else [f"{in_time(run.step_s)} measured"]
    if prediction is not None:
        off = "" if run.step_s is None else f"{prediction.step_s / run.step_s - 1:+.0%}, "
        known.append(f"{in_time(prediction.step_s)} predicted ({off}{prediction.source} profile)")
    if comparison is not None:
        known.append(f"{in_time(comparison.measured[0].length_s)} in the timeline's step")
    return ", ".join(known) or "unknown"


def _overview(run: Run, comparison: Comparison | None) -> Finding:
    plan, last, tested, best = run.plan, run.steps.last, run.evaluations.last, run.evaluations.best
    replicas = f", {plan.replicas} plan replicas" if plan.replicas > 1 else ""
    rows = [
        (
            "model",
            f"{plan.model}, global batch {plan.global_batch}, {plan.precision}, {plan.world} ranks{replicas}",
        )
    ]
    rows.append(("steps", "none yet" if last is None else f"{last.step + 1}, loss {last.loss:.4f}"))
    if tested is not None and best is not None:
        reached = f"{tested.top1:.4f} after {tested.step} steps (best {best.top1:.4f}), loss {tested.loss:.4f}"
        rows.append(("test accuracy", reached))
    if run.step_s is not None:
        rows.append(("throughput", f"{plan.global_batch / run.step_s:.1f} samples/s"))
    rows.append(("step time", step_line(run, comparison)))
    if plan.prediction is not None:
        rows.append(("on the wire", f"{in_bytes(plan.prediction.wire_bytes)} per step"))
    return Finding(run.name, ("", ""), tuple(rows), texts=2)


def _placement(run: Run) -> Finding:
    rows = []
    names = [layer.name for layer in run.basis.chain.layers] if run.basis else []
    for position in positions(run.plan):
        first, last = position.layers
        ends = [names[i] if names else str(i) for i in sorted({first, last - 1})]
        rows.append((stage_name(position), " .. ".join(ends), spans(position.ranks), str(position.micro_batch)))
    notes = (f"in each of {plural(run.plan.replicas, 'plan replica')}",) if run.plan.replicas > 1 else ()
    return Finding("what ran where", ("stage", "layers", "ranks", "micro-batch"), tuple(rows), notes, texts=3)


def _ranks(comparison: Comparison) -> Finding:
    rows = []
    pairs = zip(comparison.predicted_shares, comparison.measured_shares, strict=True)
    length_s = comparison.predicted[0].length_s
    for rank, (expected, found) in enumerate(pairs):
        cells = [
            _of(getattr(expected, k), length_s) + " → " + _of(getattr(found, k), sum(found)) for k in Share._fields
        ]
        rows.append((f"rank {rank}", *cells))
    notes = [
        "predicted → measured, with the share of the step",
        f"measured is the mean of {plural(comparison.steps, 'step')}",
    ]
    if comparison.uncertainty_s:
        notes.append(f"clocks of the hosts agree to {in_time(comparison.uncertainty_s)}")
    if len(rows) > MOST_ROWS:
        notes.append(f"and {len(rows) - MOST_ROWS} more ranks")
    columns = ("rank", "computing", "waiting", "rest")
    return Finding("where the step's time goes", columns, tuple(rows[:MOST_ROWS]), ("; ".join(notes),))


def _of(seconds: float, length_s: float) -> str:
    share = f" ({seconds / length_s:.0%})" if length_s else ""
    return f"{in_time(seconds)}{share}"


def _stages(comparison: Comparison) -> Finding:
    positions = comparison.predicted[0].program.positions
    rows = []
    for expected, found in zip(comparison.predicted_stages, comparison.measured_stages, strict=True):
        cells = [f"{in_time(expected.seconds[p])} → {in_time(found.seconds[p])}" for p in PHASES]
        rows.append((stage_name(positions[expected.position]), *cells))
    note = "mean over the stage's ranks; a wait counts where its data is needed"
    return Finding("stages, predicted → measured", ("stage", *PHASES), tuple(rows), (note,))


def _overlap(comparison: Comparison) -> Finding:
    found, expected = comparison.overlap, comparison.predicted_overlap
    rows = (
        ("gradient buckets under backward of their rank", *_hidden(found.buckets), _share(expected.buckets)),
        ("exchanges under other computation", *_hidden(found.exchanges), _share(expected.exchanges)),
        (
            "updates before the step's last backward ended",
            f"{found.early_updates} of {found.updates}",
            "",
            f"{expected.early_updates} of {expected.updates}",
        ),
        (
            "receives posted before the sender began",
            f"{found.early_receives} of {found.receives}",
            _lead(found),
            f"{expected.early_receives} of {expected.receives}",
        ),
    )
    return Finding("overlap", ("what", "measured", "", "predicted"), rows)


def _lead(found: Overlap) -> str:
    return "" if found.lead_s is None else f"{in_time(found.lead_s)} ahead (median)"


def _hidden(hidden: Hidden) -> tuple[str, str]:
    if not hidden.count:
        return "none", ""
    return f"{hidden.overlapped} of {hidden.count}", f"{_share(hidden)} of {in_time(hidden.seconds)} in flight"


def _share(hidden: Hidden) -> str:
    return "none" if hidden.share is None else f"{hidden.share:.0%}"


def _deviations(comparison: Comparison) -> Finding:
    rows = tuple(
        (
            d.name,
            str(d.rank),
            d.stage or "",
            "" if d.micro_batch is None else str(d.micro_batch),
            in_time(d.predicted_s),
            in_time(d.measured_s),
            f"{d.difference_s * 1e3:+.3g} ms",
        )
        for d in comparison.deviations[:DEVIATIONS]
    )
    columns = ("action", "rank", "stage", "micro-batch", "predicted", "measured", "difference")
    note = f"of {plural(len(comparison.deviations), 'action')}; measured is the median of the recorded steps"
    return Finding("largest deviations", columns, rows, (note,))


def _memory(run: Run) -> Finding:
    summary = run.summary
    assert summary is not None
    expected: Iterable[int | None] = summary.predicted_memory_bytes or (None,) * len(summary.measured_memory_bytes)
    limit = [
        in_bytes(run.basis.cluster.memory_bytes(r)) if run.basis else "unknown" for r in range(run.plan.world)
    ]
    rows = [
        (
            f"rank {rank}",
            in_bytes(found),
            "unknown" if predicted is None else in_bytes(predicted),
            "" if not predicted else f"{found / predicted - 1:+.0%}",
            limit[rank],
        )
        for rank, (found, predicted) in enumerate(zip(summary.measured_memory_bytes, expected, strict=True))
    ]
    notes = (f"and {len(rows) - MOST_ROWS} more ranks",) if len(rows) > MOST_ROWS else ()
    return Finding("memory", ("rank", "measured", "predicted", "off", "limit"), tuple(rows[:MOST_ROWS]), notes)
