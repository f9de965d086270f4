"""What of the requirement holds, and what does not."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from scripts.bench.cluster.field import OURS
from scripts.bench.cluster.launch import KILLED
from scripts.bench.cluster.summary import DDP, Result, Row
from scripts.bench.cluster.tables import VGG16

NO_SLOWER, AS_DATA_PARALLEL = 1.0, 1.03
"""Times the best peer's step that ours may take; the second where the planner chose data parallelism too."""
OF_THE_FLOOR = 1.12
"""Times the floor that ours may take on VGG16 at 3.3 and 10 Gbit/s."""
TO_DDP, TO_PIPELINE = 3.5, 2.0
"""Times our step that DistributedDataParallel takes at 1 Gbit/s, and the best pipeline at 3.3."""
MEDIAN_ERROR, WORST_ERROR = 0.05, 0.15
"""Of the predictions."""
REGRET = 0.05
"""By what share the choice may be slower than the best of all our plans that ran."""
PIPELINES = ("deepspeed_pipeline", "torch_gpipe", "torch_1f1b", "torch_interleaved")


@dataclass(frozen=True)
class Verdict:
    """One part of the requirement; ``holds`` is None where it was not measured."""

    what: str
    wanted: str
    found: str
    holds: bool | None


def verdicts(results: Sequence[Result]) -> list[Verdict]:
    """Return what can be judged of the settings that were measured."""
    found = [_agreement(results)]
    for result in results:
        found.append(_as_fast(result))
        found += _of_vgg16(result)
        found += _choice(result)
        found += _memory(result)
    return found + _predictions(results)


def _agreement(results: Sequence[Result]) -> Verdict:
    bad = [
        f"{row.name} ({r.setting.name})"
        for r in results
        for row in r.rows
        if row.cell.able and row.agreement is not None and not row.agreement.holds
    ]
    return Verdict("same losses as one process", "1e-5 (lossy ones apart)", ", ".join(bad) or "all", not bad)


def _as_fast(result: Result) -> Verdict:
    ours, best = result.of(OURS), result.best_peer
    alike = ours is not None and ours.cell.entry.shape == "data_parallel"
    limit = AS_DATA_PARALLEL if alike else NO_SLOWER
    named = best.name if best is not None else "the best peer"
    what = f"{result.setting.name}: our step over that of {named}"
    return _at_most(what, limit, result.ratio(OURS, best))


def _of_vgg16(result: Result) -> list[Verdict]:
    """Return what is asked of VGG16 with 16 images per rank alone."""
    gbit = result.setting.gbit_per_s
    if result.setting != replace(VGG16, gbit_per_s=gbit):
        return []
    found = []
    ours = result.of(OURS)
    if gbit in {3.3, 10.0}:
        step_s, floor_s = (ours.step_s, ours.floor_s) if ours is not None else (None, None)
        share = step_s / floor_s if step_s is not None and floor_s is not None else None
        found.append(_at_most(f"{result.setting.name}: our step over the floor", OF_THE_FLOOR, share))
    if gbit == 1.0:
        found.append(_at_least(f"{result.setting.name}: DDP's step over ours", TO_DDP, _over(result, DDP)))
    if gbit == 3.3:
        ratios = [ratio for name in PIPELINES if (ratio := _over(result, name)) is not None]
        what = f"{result.setting.name}: the best pipeline's step over ours"
        found.append(_at_least(what, TO_PIPELINE, min(ratios, default=None)))
    return found


def _memory(result: Result) -> list[Verdict]:
    """Return whether a memory limit is one that data parallelism exceeds and our plan keeps."""
    if result.setting.memory_mb is None:
        return []
    row = next((row for row in result.rows if row.name == DDP), None)
    what = f"{result.setting.name}: DDP is killed for its memory, and our plan trains"
    if row is None:
        return [Verdict(what, "so", "not measured", None)]
    killed, trains = KILLED in (row.cell.error or ""), result.of(OURS) is not None
    found = f"DDP {row.cell.error or 'trains'}; ours {'trains' if trains else 'does not'}"
    return [Verdict(what, "so", found, killed and trains)]


def _over(result: Result, name: str) -> float | None:
    return result.ratio(name, result.of(OURS))


def _choice(result: Result) -> list[Verdict]:
    """Return whether the planner chose well among our own plans, where others than its choice ran."""
    own = [row for row in result.rows if row.ours and row.step_s is not None]
    if len(own) < 2:
        return []
    what = f"{result.setting.name}: the planner's choice over our best plan"
    return [_at_most(what, 1 + REGRET, result.ratio(OURS, min(own, key=lambda row: row.step_s or 0.0)))]


def _predictions(results: Sequence[Result]) -> list[Verdict]:
    rows = [row for r in results for row in r.rows]
    errors = [abs(row.error) for row in rows if row.error is not None]
    median, worst = (statistics.median(errors), max(errors)) if errors else (None, None)
    found = [
        _at_most("median error of our predictions", MEDIAN_ERROR, median, percent=True),
        _at_most("worst error of our predictions", WORST_ERROR, worst, percent=True),
    ]
    several = [r for r in results if len(_measured(r)) > 1]
    if several:
        wrong = [r.setting.name for r in several if not _ranked(_measured(r))]
        found.append(
            Verdict("our plans ranked as predicted", "in all settings", ", ".join(wrong) or "all", not wrong)
        )
    return found


def _measured(result: Result) -> list[Row]:
    return [row for row in result.rows if row.error is not None]


def _ranked(rows: Sequence[Row]) -> bool:
    """Whether rows, which are in the order of what they took, are also in that of their predictions."""
    predicted = [row.cell.entry.predicted_s or 0.0 for row in rows]
    return predicted == sorted(predicted)


def _at_most(what: str, limit: float, found: float | None, *, percent: bool = False) -> Verdict:
    return Verdict(
        what, f"at most {_told(limit, percent=percent)}", _told(found, percent=percent), _holds(found, limit)
    )


def _at_least(what: str, limit: float, found: float | None) -> Verdict:
    told = _told(found, percent=False)
    return Verdict(what, f"at least {limit:g}", told, None if found is None else found >= limit)


def _holds(found: float | None, limit: float) -> bool | None:
    return None if found is None else found <= limit


def _told(value: float | None, *, percent: bool) -> str:
    if value is None:
        return "not measured"
    return f"{value:.1%}" if percent else f"{value:.3g}"
