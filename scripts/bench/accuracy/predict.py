"""The predictions of an experiment, made and written down before anything is measured."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass

from hybridpar.cluster import describe
from hybridpar.config import compose
from hybridpar.errors import PlanError
from hybridpar.model.chain import Chain
from hybridpar.planning.check import check
from hybridpar.planning.compile import compile as compile_program
from hybridpar.planning.costs import Costs
from hybridpar.planning.memory import memory
from hybridpar.planning.plan import Plan
from hybridpar.planning.program import Action, Program
from hybridpar.planning.request import Shape
from hybridpar.planning.search import assess, search
from hybridpar.profiling.record import Profile
from hybridpar.schema import to_data
from scripts.bench.accuracy.draw import Drawing, Drawn, Kinds
from scripts.bench.accuracy.experiment import Experiment, Folder
from scripts.bench.files import digest, write_json

COMMUNICATING = ("start", "wait")


@dataclass(frozen=True)
class Predicted:
    """What is predicted for one plan; all lists have one entry per rank."""

    name: str
    shape: Shape
    kind: Kinds
    plan_sha256: str
    step_s: float
    resident_bytes: tuple[int, ...]
    """Peak above the baseline: what the product predicts as a rank's memory."""
    live_bytes: tuple[int, ...]
    """Peak of the tensors alive between two actions."""
    actions_s: tuple[dict[str, float], ...]
    """Busy seconds of a step by kind of action and place in the pipeline (``forward front``)."""


@dataclass(frozen=True)
class Predictions:
    """Everything predicted, and what it rests on."""

    date: str
    """UTC."""
    best_s: float
    """Least predicted step time among the plans."""
    profile_sha256: str
    cluster_sha256: str
    plans: tuple[Predicted, ...]


def draw_and_predict(experiment: Experiment, folder: Folder) -> None:
    """Draw the plans and write them, the log of the draws and the predictions. Raises PlanError."""
    profile = Profile.load(folder.profile)
    chain = profile.described
    if chain is None:
        raise PlanError(f"{folder.profile} holds no chain; profile again")
    cluster = describe.load(folder.cluster)
    config = compose([*experiment.overrides, "profile=from_file", f"profile.path={folder.profile}"])
    planned = search(chain, profile, cluster, config.request())

    def assessed(plan: Plan) -> Plan:
        plan = assess(plan, chain, profile, cluster)
        check(compile_program(plan, chain, plan.global_batch, "train"))
        return plan

    best = {c.shape: c.plan for c in planned.candidates if c.plan is not None and c.shape != "from_file"}
    assert planned.shape != "from_file"
    drawing = Drawing(chain, (planned.shape, planned.plan), best, assessed, experiment.seed)
    drawn = drawing.run(experiment.plans, experiment.close)
    write_json(folder.draws, {"seed": experiment.seed, "draws": to_data(drawing.log)})
    costs = Costs(profile, cluster)
    records = []
    for d in drawn:
        d.plan.save(folder.plan(d.name))
        records.append(_predicted(d, chain, costs, digest(folder.plan(d.name))))
    predictions = Predictions(
        date=time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()),
        best_s=min(r.step_s for r in records),
        profile_sha256=digest(folder.profile),
        cluster_sha256=digest(folder.cluster),
        plans=tuple(records),
    )
    write_json(folder.predictions, to_data(predictions))


def _predicted(drawn: Drawn, chain: Chain, costs: Costs, sha256: str) -> Predicted:
    plan, prediction = drawn.plan, drawn.plan.prediction
    assert prediction is not None
    programs = [
        (compile_program(plan, chain, plan.global_batch, "train", replica), rank)
        for replica, rank in map(plan.locate, range(plan.world))
    ]
    return Predicted(
        name=drawn.name,
        shape=drawn.shape,
        kind=drawn.kind,
        plan_sha256=sha256,
        step_s=prediction.step_s,
        resident_bytes=prediction.memory_bytes * plan.replicas,
        live_bytes=tuple(live_peak(program, rank) for program, rank in programs),
        actions_s=tuple(_actions(program, rank, costs) for program, rank in programs),
    )


def live_peak(program: Program, rank: int) -> int:
    """Return the most bytes of tensors alive between two actions of a rank of the program's plan replica."""
    counted = memory(program, rank)
    return max(counted.alive, default=counted.persistent)


def _actions(program: Program, rank: int, costs: Costs) -> dict[str, float]:
    total: dict[str, float] = defaultdict(float)
    for action, seconds in zip(program.actions[rank], costs.actions(program, rank), strict=True):
        total[label(program, action)] += seconds
    return dict(total)


def label(program: Program, action: Action) -> str:
    """Return the kind of an action, and where in the pipeline or of which content it is: ``wait bucket``."""
    if action.operation is not None and action.kind in COMMUNICATING:
        return f"{action.kind} {program.operations[action.operation].content}"
    if action.kind == "update":
        return f"update {program.positions[action.block or 0].name}"
    if action.block is None or action.kind == "copy":
        return action.kind
    return f"{action.kind} {program.positions[program.blocks[action.block].position].name}"
