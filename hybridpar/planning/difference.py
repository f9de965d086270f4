"""Two plans side by side: what differs, in a user's words, and where the difference in time comes from."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from hybridpar.errors import PlanError
from hybridpar.model.chain import Chain
from hybridpar.planning.plan import KINDS, Kind, Plan, Recipe, Segment, Stage
from hybridpar.planning.search import assess
from hybridpar.planning.timesplit import StageTime, TimeSplit, split_time
from hybridpar.planning.trial import Trials

WORDS = {
    "world": "ranks",
    "global_batch": "global batch",
    "bucket_bytes": "gradient buckets, bytes",
    "order": "order",
    "replicas": "plan replicas",
    "replica_shares": "shares of the plan replicas",
    "micro_batch": "micro-batch",
    "in_flight": "in-flight cap, samples",
    "sharding": "sharding",
    "recompute": "recomputation",
    "clipping": "gradient clipping",
    "optimizer_states": "optimizer states",
    "average": "average of the weights",
    "scaling": "loss scaling",
    "compression": "gradient compression",
}
"""What a user calls a field; one that is missing here goes by its own name."""
COUNTED_AS: dict[Kind, str] = {"front": "replicas", "middle": "segments", "tail": "shards"}
PARTS = (
    ("compute", "compute_s"),
    ("update", "update_s"),
    ("exposed communication", "exposed_s"),
    ("bubble", "bubble_s"),
)


@dataclass(frozen=True)
class Difference:
    """One field in which two plans differ."""

    field: str
    this: str
    other: str


@dataclass(frozen=True)
class Contrast:
    """One part of a step's time in both plans: seconds per rank, as the mean over all ranks."""

    stage: Kind
    part: str
    this_s: float
    other_s: float

    @property
    def change_s(self) -> float:
        """What this plan takes longer."""
        return self.this_s - self.other_s


@dataclass(frozen=True)
class Comparison:
    """Two plans of one model on one cluster."""

    differences: tuple[Difference, ...]
    this: Plan
    """With its prediction."""
    other: Plan | None
    """With its prediction on this cluster; None where it is impossible there."""
    reason: str | None
    """Why it is impossible."""
    contrasts: tuple[Contrast, ...]
    """Largest change first; the other plan's times are scaled to this plan's global batch. All changes together
    are the change of the step time."""


def compare(plan: Plan, other: Plan, trials: Trials) -> Comparison:
    """Compare a predicted plan with another of the same model, both on the trials' cluster and profile."""
    found = differences(plan, other, trials.chain)
    try:
        assessed = assess(other, trials.chain, trials.profile, trials.cluster)
    except PlanError as e:
        return Comparison(found, plan, None, str(e), ())
    scale = plan.global_batch / assessed.global_batch
    contrasts = _contrasts(plan, _split(plan, trials), assessed, _split(assessed, trials), scale)
    return Comparison(found, plan, assessed, None, contrasts)


def _split(plan: Plan, trials: Trials) -> TimeSplit:
    program = trials.program(plan)
    return split_time(program, trials.timeline(program))


def _contrasts(plan: Plan, this: TimeSplit, other: Plan, that: TimeSplit, scale: float) -> tuple[Contrast, ...]:
    def times(of: Plan, split: TimeSplit, kind: Kind) -> StageTime:
        index = next((i for i, stage in enumerate(of.stages) if stage.kind == kind), None)
        return StageTime() if index is None else split.stage(index)

    found = []
    for kind in KINDS:
        own, theirs = times(plan, this, kind), times(other, that, kind)
        found += [Contrast(kind, name, getattr(own, f), getattr(theirs, f) * scale) for name, f in PARTS]
    changed = (c for c in found if c.this_s or c.other_s)
    return tuple(sorted(changed, key=lambda c: -abs(c.change_s)))


def differences(plan: Plan, other: Plan, chain: Chain) -> tuple[Difference, ...]:
    """Return the fields in which two plans of one chain differ, the stages first."""
    found: list[Difference] = []
    names = [" + ".join(s.kind for s in p.stages) for p in (plan, other)]
    _note(found, "stages", *names)
    for kind in KINDS:
        stages = plan.stage(kind), other.stage(kind)
        if stages[0] is not None and stages[1] is not None:
            _compare_stages(found, stages[0], stages[1], chain)
        elif stages[0] is not None or stages[1] is not None:
            _note(found, kind, *("none" if s is None else _described(s, chain) for s in stages))
    left_out = {"model", "chain", "stages", "recipe", "prediction", "schema"}
    for field in dataclasses.fields(Plan):
        if field.name not in left_out:
            _note(found, _word(field.name), *(_text(getattr(p, field.name)) for p in (plan, other)))
    for field in dataclasses.fields(Recipe):
        name = "optimizer sharding" if field.name == "sharding" else _word(field.name)
        _note(found, name, *(_text(getattr(p.recipe, field.name)) for p in (plan, other)))
    return tuple(found)


def _compare_stages(found: list[Difference], stage: Stage, other: Stage, chain: Chain) -> None:
    both = stage, other
    _note(found, f"{stage.kind}: layers", *(_layers(s, chain) for s in both))
    _note(found, f"{stage.kind}: {COUNTED_AS[stage.kind]}", *(str(s.degree) for s in both))
    if stage.kind == "middle":
        _note(found, "middle: cuts", *(_cuts(s, chain) for s in both))
    _note(found, f"{stage.kind}: ranks", *(_ranks(s) for s in both))
    _note(found, f"{stage.kind}: shares", *(_shares(s) for s in both))
    for field in dataclasses.fields(Stage):
        if field.name not in {"kind", "segments"}:
            _note(found, f"{stage.kind}: {_word(field.name)}", *(_text(getattr(s, field.name)) for s in both))


def _note(found: list[Difference], field: str, this: str, other: str) -> None:
    if this != other:
        found.append(Difference(field, this, other))


def _word(name: str) -> str:
    return WORDS.get(name, name)


def _text(value: object) -> str:
    if value is None or value == ():
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    return str(value)


def _layers(stage: Stage, chain: Chain) -> str:
    first, last = stage.layers
    return f"{chain.layers[first].name} .. {chain.layers[last - 1].name} ({last - first})"


def _described(stage: Stage, chain: Chain) -> str:
    degree = f"{stage.degree} {COUNTED_AS[stage.kind]}"
    return f"{_layers(stage, chain)}, {degree} on ranks {_ranks(stage)}, micro-batch {stage.micro_batch}"


def _cuts(stage: Stage, chain: Chain) -> str:
    """Name the layers before which the later segments start."""
    return ", ".join(f"before {chain.layers[s.layers[0]].name}" for s in stage.segments[1:]) or "none"


def _ranks(stage: Stage) -> str:
    return " | ".join(",".join(map(str, s.ranks)) for s in stage.segments)


def _shares(stage: Stage) -> str:
    def one(segment: Segment) -> str:
        return "equal" if segment.shares is None else ":".join(f"{s:g}" for s in segment.shares)

    return " | ".join(dict.fromkeys(one(s) for s in stage.segments))
