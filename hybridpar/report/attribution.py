"""The attribution: what the time and the devices of a run went to, by stage and plan replica.

It is what a report shows and what advice rests on. Times come from the recorded timeline
(:mod:`hybridpar.report.parts`), what the devices did from the monitor's samples, cut by that timeline
(:mod:`hybridpar.report.device_use`), and from traces (:mod:`hybridpar.report.kernels`). What is unknown is None.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hybridpar.report.comparison import Comparison
from hybridpar.report.device_use import UNKNOWN, DeviceUse, device_uses
from hybridpar.report.kernels import KernelUse, RankKernels, together
from hybridpar.report.palette import stage_name
from hybridpar.report.parts import Parts, mean_parts, stage_parts
from hybridpar.report.run import Run


@dataclass(frozen=True)
class StageAttribution:
    """A position of the pipeline in one plan replica."""

    replica: int
    position: int
    stage: str
    """As all reports call it: ``front``, ``middle 0``, ``tail``."""
    ranks: tuple[int, ...]
    """Of all plan replicas."""
    micro_batch: int
    """Samples in one forward call on one of its ranks."""
    alone: bool
    """No rank of it works for another stage."""
    predicted: Parts
    measured: Parts
    """Mean over the recorded steps."""
    use: DeviceUse
    """By the monitor's samples: measured, over windows of many kernels."""
    kernels: KernelUse | None
    """By the traces of its ranks (``monitor.trace.steps``), kernel by kernel: estimated by Kineto, and on a CPU
    without occupancy. None: none was traced."""


@dataclass(frozen=True)
class Attribution:
    """All stages of all plan replicas."""

    predicted_step_s: float
    measured_step_s: float
    """Mean over the recorded steps."""
    steps: int
    """So many were recorded and count."""
    stages: tuple[StageAttribution, ...]
    """By replica, then by position."""


def attribute(run: Run, comparison: Comparison) -> Attribution:
    """Return what a run's time went to. Raises HybridparError where a file of the monitor is malformed."""
    uses = device_uses(run, comparison)
    traced = {trace.rank: trace for trace in run.traces}
    stages = []
    for replica, predicted in enumerate(comparison.predicted):
        program, first = predicted.program, replica * len(predicted.ranks)
        expected = stage_parts(predicted)
        found = mean_parts([stage_parts(step[replica]) for step in comparison.courses])
        for position in program.positions:
            others = {rank for p in program.positions if p is not position for rank in p.ranks}
            stages.append(
                StageAttribution(
                    replica,
                    position.index,
                    stage_name(position),
                    tuple(first + rank for rank in position.ranks),
                    position.micro_batch,
                    others.isdisjoint(position.ranks),
                    expected[position.index],
                    found[position.index],
                    uses.get((replica, position.index), UNKNOWN),
                    _kernels(traced, stage_name(position), [first + rank for rank in position.ranks]),
                )
            )
    lengths_s = [step[0].length_s for step in comparison.courses]
    return Attribution(
        comparison.predicted[0].length_s, sum(lengths_s) / len(lengths_s), comparison.steps, tuple(stages)
    )


def _kernels(traced: Mapping[int, RankKernels], stage: str, ranks: Sequence[int]) -> KernelUse | None:
    found = [traced[rank].stages[stage] for rank in ranks if rank in traced and stage in traced[rank].stages]
    return together(found) if found else None
