"""The diff of two plans as text."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from hybridpar.model.chain import Chain
from hybridpar.planning.difference import Comparison, Difference, differences
from hybridpar.planning.plan import Plan, Prediction
from hybridpar.report.text import in_bytes, in_time, plural, titled

MOST_CONTRASTS = 5
LEAST_SHARE = 0.005
"""Of the step time: smaller changes of a part are not named."""


def show(comparison: Comparison, name: str, console: Console) -> None:
    """Print what differs between the plan and the one of file ``name``, their predictions, and why."""
    if not comparison.differences:
        console.print(f"diff: the plan is the one of {name}")
    else:
        console.print(_fields(comparison.differences, name))
    if comparison.other is None:
        console.print(f"{name} cannot run here: {comparison.reason}")
        return
    this, other = comparison.this.prediction, comparison.other.prediction
    assert this is not None
    assert other is not None
    console.print(f"this plan here: {_prediction(this)}")
    console.print(f"{name} here: {_prediction(other)}")
    ratio = this.samples_per_s / other.samples_per_s
    faster = f"this plan is {ratio:.3g}x as fast" if ratio >= 1 else f"{name} is {1 / ratio:.3g}x as fast"
    console.print(f"{faster}{_why(comparison)}")


def show_replanned(plan: Plan, former: Plan, chain: Chain, console: Console) -> None:
    """Print what a run that goes on with another number of ranks does otherwise than before."""
    console.print(f"the run had {plural(former.world, 'rank')} and goes on with {plan.world}, under a new plan")
    console.print(_fields(differences(plan, former, chain), "before"))


def _fields(found: Sequence[Difference], name: str) -> Table:
    table = titled("what differs")
    for column in ("field", "this plan", name):
        table.add_column(column)
    for difference in found:
        table.add_row(difference.field, difference.this, difference.other)
    return table


def _prediction(prediction: Prediction) -> str:
    return (
        f"step {in_time(prediction.step_s)}, {prediction.samples_per_s:,.0f} samples/s, "
        f"at most {in_bytes(max(prediction.memory_bytes))} per rank"
    )


def _why(comparison: Comparison) -> str:
    """Name the parts of the time split that changed most, with their change in milliseconds."""
    assert comparison.this.prediction is not None
    least_s = LEAST_SHARE * comparison.this.prediction.step_s
    named = [c for c in comparison.contrasts if abs(c.change_s) >= least_s][:MOST_CONTRASTS]
    if not named:
        return ""
    parts = ", ".join(f"{c.stage} {c.part} {c.change_s * 1e3:+.3g} ms" for c in named)
    same = comparison.other is not None and comparison.other.global_batch == comparison.this.global_batch
    unit = "per step" if same else f"per {comparison.this.global_batch} samples"
    return f"; {unit} and rank this plan has {parts}"
