"""The measurements of an experiment: every plan, on all ranks, each under its quota."""

from __future__ import annotations

import json
import random
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from hybridpar.errors import ConfigError
from hybridpar.schema import from_data, read_json, to_data
from scripts.bench.accuracy.experiment import Experiment, Folder
from scripts.bench.accuracy.launch import on_ranks
from scripts.bench.accuracy.predict import Predicted, Predictions
from scripts.bench.accuracy.worker import OBSERVED_STEPS, RankResult
from scripts.bench.beat import Beat
from scripts.bench.children import LaunchFailedError
from scripts.bench.files import digest, write_json

SET_UP_S = 180.0
"""Starting, importing, making the weights."""
PATIENCE = 10.0
"""A measurement may take so many times as long as predicted before it counts as failed."""


@dataclass(frozen=True)
class Measured:
    """One measurement of one plan."""

    name: str
    turn: int
    """Its round, from 0."""
    predictions_sha256: str
    """Of the file of predictions that was there before."""
    date: str
    """UTC, at the start."""
    step_s: float | None
    """Median of ``steps_s``; None where the plan failed."""
    steps_s: tuple[float, ...]
    """Seconds from the end of a step on the last rank to the end of the next one on the last rank."""
    foreign_cores: float | None
    """CPU seconds per second that other processes took meanwhile."""
    ranks: tuple[RankResult, ...]
    error: str | None = None
    beat_s: float | None = None
    """Of the beat, meanwhile."""


def measure_all(experiment: Experiment, folder: Folder, beat: Beat, say: Callable[[str], None]) -> None:
    """Measure every plan in every round, in an order shuffled by the seed; what was measured stays.

    A plan that fails is written down with its error. Raises CgroupError where there can be no quotas, ConfigError
    for predictions or measurements that are not this experiment's.
    """
    predictions = read_json(Predictions, folder.predictions, ConfigError)
    dice = random.Random(experiment.seed)  # noqa: S311 - has to be repeatable
    for turn in range(experiment.rounds):
        order = list(predictions.plans)
        dice.shuffle(order)
        for number, predicted in enumerate(order, 1):
            path = folder.result(predicted.name, turn)
            if not path.exists():
                measured = _measure(experiment, folder, predicted, turn, beat)
                write_json(path, to_data(measured))
                taken = measured.error or f"{measured.step_s:.3f} s per step"
                say(f"round {turn + 1}, {number} of {len(order)}: {predicted.name} {taken}")


def read_results(folder: Folder, predictions: Predictions, rounds: int) -> dict[str, list[Measured]]:
    """Return every plan's measurements. Raises ConfigError for one that is missing or has other predictions."""
    results: dict[str, list[Measured]] = {}
    sha256 = digest(folder.predictions)
    for predicted in predictions.plans:
        own = [read_json(Measured, folder.result(predicted.name, t), ConfigError) for t in range(rounds)]
        for m in own:
            if m.predictions_sha256 != sha256:
                raise ConfigError(f"{folder.result(m.name, m.turn)} was measured for other predictions; remove it")
        results[predicted.name] = own
    return results


def _measure(experiment: Experiment, folder: Folder, predicted: Predicted, turn: int, beat: Beat) -> Measured:
    plan, name = folder.plan(predicted.name), f"{predicted.name}-round{turn}"
    if digest(plan) != predicted.plan_sha256:
        raise ConfigError(f"{plan} is not the plan that was predicted; draw again in another folder")
    date, sha256 = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()), digest(folder.predictions)
    out = folder.path / "ranks" / name
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    observed = experiment.actions and turn == 0
    steps = experiment.warm_up + experiment.steps + observed * OBSERVED_STEPS + 1
    counts = [str(n) for n in (experiment.warm_up, experiment.steps, int(observed))]
    arguments = ["-m", "scripts.bench.accuracy.worker", str(plan), str(out), *counts, *experiment.overrides]
    error: str | None = None
    ranks: tuple[RankResult, ...] = ()
    try:
        limit_s = SET_UP_S + PATIENCE * steps * predicted.step_s
        on_ranks(arguments, [experiment.cores] * experiment.world, folder.log(name), limit_s, late=True)
        ranks = tuple(_rank(out / f"rank{r}.json") for r in range(experiment.world))
    except LaunchFailedError as e:
        error = str(e)
    if not ranks:
        return Measured(predicted.name, turn, sha256, date, None, (), None, (), error)
    steps_s = periods(ranks)
    return Measured(
        predicted.name,
        turn,
        sha256,
        date,
        statistics.median(steps_s),
        steps_s,
        foreign_cores(ranks),
        ranks,
        beat_s=beat.median_s(ranks[0].ends_s[0], ranks[0].ends_s[-1]),
    )


def _rank(path: Path) -> RankResult:
    return from_data(RankResult, json.loads(path.read_text()), path.name, ConfigError)


def periods(ranks: tuple[RankResult, ...]) -> tuple[float, ...]:
    """Return the seconds between the ends of neighbouring steps, a step's end being its last rank's."""
    ends_s = [max(ends) for ends in zip(*(r.ends_s for r in ranks), strict=True)]
    return tuple(b - a for a, b in pairwise(ends_s))


def foreign_cores(ranks: tuple[RankResult, ...]) -> float:
    """Return the CPU seconds per second that anything but the ranks took during the timed steps."""
    span_s = max(r.ends_s[-1] for r in ranks) - min(r.ends_s[0] for r in ranks)
    busy_s = statistics.fmean(r.busy_cpu_s for r in ranks)
    return max(0.0, busy_s - sum(r.cpu_s for r in ranks)) / span_s
