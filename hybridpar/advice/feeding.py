"""Ranks that wait for samples: how many cores it takes to read them as fast as they are used."""

from __future__ import annotations

import math
from collections import Counter

from hybridpar.advice.evidence import Evidence
from hybridpar.planning.layout import length
from hybridpar.report.advice import Advice, Advised
from hybridpar.report.text import in_time, plural

BOUND = 0.1
"""Share of the step that a rank of the first stage waits for samples, from which on input is what is lacking."""


def feeding(known: Evidence) -> Advised:
    """Advise more processes that read, where ranks wait for samples and the profile says how fast a core reads."""
    if known.attribution is None:
        return Advised()
    waited_s = max(s.measured.input_s for s in known.attribution.stages)
    share = waited_s / known.attribution.measured_step_s
    if share < BOUND:
        return Advised()
    measured = f"reading ranks waited {in_time(waited_s)} per step for samples ({share:.0%} of it)"
    read_s = known.basis.profile.loader_samples_per_s
    if read_s is None:
        remedy = "a profile from `hybridpar profile` with this data set says how fast a core reads"
        return Advised(lacking=(f"input: {measured}, but not how many cores reading needs; {remedy}",))
    rate = _samples_per_s(known)
    cores, config = math.ceil(rate / read_s), known.planner.config
    workers = 0 if config is None else config.data.workers
    readers = len(_reading(known)) * known.plan.replicas
    needed = (
        f"a reading rank uses {rate:.4g} samples/s in the predicted step, and a core reads {read_s:.4g} "
        f"({known.basis.profile.data}): {plural(cores, 'core')} for each of {plural(readers, 'rank')}"
    )
    if workers >= cores:
        slower = "fewer cores are free, or the disk is slower, than when the profile was taken"
        return Advised(remarks=(f"input: {measured}; {needed}, and {plural(workers, 'worker')} read: {slower}",))
    if not _spare(known, cores):
        return Advised(remarks=(f"input: {measured}; {needed}, and a node's cores are busy with computing",))
    return Advised((_advice(known, cores, waited_s, (measured, needed)),))


def _spare(known: Evidence, cores: int) -> bool:
    """Whether so many cores are left for every reading rank; of GPUs' hosts, which nobody counted, they are."""
    cluster = known.basis.cluster
    readers = Counter(cluster.node_of[rank] for rank in known.plan.everywhere(_reading(known)))
    computing = cluster.device.kind == "cpu"
    return all(
        not computing or node.cores is None or node.devices + cores * readers[number] <= node.cores
        for number, node in enumerate(cluster.nodes)
    )


def _advice(known: Evidence, cores: int, waited_s: float, evidence: tuple[str, ...]) -> Advice:
    """The planner knows no wait for samples, so that the run's step is its prediction and the wait."""
    now = known.planner.now
    return Advice(
        "input",
        known.plan.stages[0].kind,
        f"read with {plural(cores, 'worker')} per reading rank",
        (
            *evidence,
            "the first of the predicted times is the planner's with the measured wait, which it knows not of",
        ),
        (f"data.workers={cores}",),
        known.planner.forecast(now, known.plan.global_batch, waited_s),
    )


def _samples_per_s(known: Evidence) -> float:
    """Return what the rank that reads most uses."""
    program = known.planner.program
    most = max(sum(map(length, program.reads(rank))) for rank in range(len(program.actions)))
    return most / known.planner.now.step_s


def _reading(known: Evidence) -> tuple[int, ...]:
    """Return the ranks of a plan replica that read."""
    program = known.planner.program
    return tuple(rank for rank in range(len(program.actions)) if program.reads(rank))
