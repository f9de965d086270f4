"""GPUs whose clocks are kept down: what keeps them, and what the step would take at full clocks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import mean

from hybridpar.advice.evidence import Evidence
from hybridpar.advice.replan import LEAST_GAIN
from hybridpar.monitor.record import GpuSample, read
from hybridpar.report.advice import Advice, Advised
from hybridpar.report.text import plural

REASONS = {
    "power_cap": "power",
    "hardware": "temperature or power",
    "thermal": "temperature",
    "hardware_thermal": "temperature",
    "power_brake": "power",
}
"""What keeps clocks down against anybody's will, by NVML's names."""
OFTEN = 0.2
"""Share of a GPU's samples with such a reason from which on it counts as throttled."""


@dataclass(frozen=True)
class Throttled:
    """One GPU of the job."""

    ranks: tuple[int, ...]
    share: float
    """Of its samples."""
    speed: float
    """What throttling leaves of it: its clock over its highest, 1 in samples without, as the mean."""
    reason: str
    """The most frequent one."""


def throttled(known: Evidence) -> Advised:
    """Advise cooling or power where clocks are kept down and the step would gain by full clocks."""
    found = sorted(_throttled(known), key=lambda t: t.speed)
    if not found:
        return Advised()
    worst, planner = found[0], known.planner
    speeds = {rank: gpu.speed for gpu in found for rank in gpu.ranks}
    slowed_s = planner.trials.step_with_speeds_s(planner.program, speeds)
    if slowed_s / planner.now.step_s - 1 < LEAST_GAIN:
        return Advised()
    advice = Advice(
        "throttled",
        None,
        _remedy(worst),
        (_seen(found), "predicted for computing times that go with the clock, beside those of the profile"),
        (),
        planner.forecast(planner.now, known.plan.global_batch, slowed_s - planner.now.step_s),
    )
    return Advised((advice,))


def _seen(found: Sequence[Throttled]) -> str:
    worst = found[0]
    return (
        f"{plural(len(found), 'GPU')} throttled; the worst, of rank {', '.join(map(str, worst.ranks))}, in "
        f"{worst.share:.0%} of its samples, mostly by {worst.reason}, which left it {worst.speed:.0%} of its clock"
    )


def _remedy(gpu: Throttled) -> str:
    if "power" in REASONS[gpu.reason]:
        return "give the throttled GPUs more power (nvidia-smi -q -d POWER shows the limit), or cooler air"
    return "cool the throttled GPUs"


def _throttled(known: Evidence) -> Iterable[Throttled]:
    ranks: dict[tuple[str, str], list[int]] = {}
    for record in known.run.timings:
        if record.host is not None and record.gpu is not None:
            ranks.setdefault((record.host, record.gpu), []).append(record.rank)
    for gpu, samples in _samples(known, ranks).items():
        held = [s for s in samples if _reason(s) is not None]
        clocks = [s.sm_clock_hz / s.sm_clock_max_hz for s in held if s.sm_clock_hz and s.sm_clock_max_hz]
        if clocks and len(held) >= OFTEN * len(samples):
            share, (reason, _) = len(held) / len(samples), Counter(map(_reason, held)).most_common(1)[0]
            yield Throttled(tuple(ranks[gpu]), share, 1 - share + share * mean(clocks), str(reason))


def _reason(sample: GpuSample) -> str | None:
    return next((reason for reason in sample.throttle or () if reason in REASONS), None)


def _samples(known: Evidence, gpus: Iterable[tuple[str, str]]) -> dict[tuple[str, str], list[GpuSample]]:
    """Return the samples of the job's GPUs that tell what keeps clocks down."""
    found: dict[tuple[str, str], list[GpuSample]] = {gpu: [] for gpu in gpus}
    for path in sorted(known.run.folder.glob("monitor*.jsonl")) if found else ():
        for record in read(path):
            if isinstance(record, GpuSample) and record.uuid is not None and record.throttle is not None:
                found.get((record.host, record.uuid), []).append(record)
    return found
