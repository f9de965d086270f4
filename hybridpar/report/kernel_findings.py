"""What a report says of traced steps, as a table."""

from __future__ import annotations

from hybridpar.report.findings import Finding
from hybridpar.report.kernels import KernelUse, by_stage, together
from hybridpar.report.run import Run
from hybridpar.report.text import plural, spans

_SOURCES = {
    "kineto": "occupancies are Kineto's estimates from how kernels were launched",
    "cpu": "on a CPU operators stand for kernels and waits for communication, and nothing has an occupancy",
}
TITLE = "kernels of the traced steps"
COLUMNS = (
    "stage",
    "kernels",
    "busy",
    "occupancy while busy",
    "over the window",
    "below 50%",
    "communication",
    "exposed",
)


def kernel_findings(run: Run) -> tuple[Finding, ...]:
    """Return the table of a run's traces, if it has any."""
    if not run.traces:
        return ()
    rows = [_row(name, use) for name, use in by_stage(run.traces).items()]
    rows.append(_row("all of the devices", together(trace.device for trace in run.traces)))
    steps = sorted({step for trace in run.traces for step in trace.steps})
    ranks = tuple(trace.rank for trace in run.traces)
    sources = "; ".join(_SOURCES[source] for source in sorted({trace.source for trace in run.traces}))
    note = (
        f"steps {spans(tuple(steps))} of {plural(len(ranks), 'rank')} ({spans(ranks)}), as shares of the window; "
        f"kernels that run at once count once, and their occupancies add up; {sources}"
    )
    return (Finding(TITLE, COLUMNS, tuple(rows), (note,)),)


def _row(name: str, use: KernelUse) -> tuple[str, ...]:
    shares = (
        use.busy,
        use.occupancy,
        use.occupancy_over_window,
        use.below_half,
        use.communication_s / use.window_s if use.window_s else None,
        use.exposed_s / use.window_s if use.window_s else None,
    )
    return (name, str(use.kernels), *("unknown" if share is None else f"{share:.0%}" for share in shares))
