"""The planner asked again: what a run would become under other overrides, on the basis that it was planned on."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from hybridpar.config import Config
from hybridpar.errors import PlanError
from hybridpar.planning.compression import Compression
from hybridpar.planning.plan import Kind, Plan, Prediction
from hybridpar.planning.request import STAGES_OF, Effort, Pin, Request, Shape
from hybridpar.planning.search import search
from hybridpar.planning.trial import Trials
from hybridpar.report.advice import Forecast
from hybridpar.report.basis import Basis

LEAST_GAIN = 0.02
"""Of the throughput; what gains less is not advised."""
MOST_EFFORT: Effort = "normal"
"""A plan that was searched for long is compared with one of this effort, as several are searched for."""


@dataclass(frozen=True)
class Change:
    """A request, and the overrides that turn the run's own into it."""

    request: Request
    overrides: tuple[str, ...]

    def pinned(self, kind: Kind, micro_batch: int | None) -> Change:
        """Return the change with a stage's micro-batch pinned besides, or with None left to the planner."""
        pin = replace(self.request.pin(kind), micro_batch=micro_batch)
        value = "null" if micro_batch is None else micro_batch
        return Change(
            replace(self.request, pins={**self.request.pins, kind: pin}),
            (*self.overrides, f"plan.{kind}.micro_batch={value}"),
        )

    def free(self) -> Change | None:
        """Return the change to a plan of any shape with nothing pinned; None where it is none."""
        dropped = [
            f"plan.{kind}.{name}=null"
            for kind, pin in self.request.pins.items()
            for name in (field.name for field in fields(Pin))
            if getattr(pin, name) is not None
        ]
        rules = [f"plan.{n}=null" for n in ("order", "bucket_bytes", "replicas") if getattr(self.request, n)]
        request = replace(self.request, shape="auto", pins={}, order=None, bucket_bytes=None, replicas=None)
        return None if request == self.request else Change(request, ("plan=auto", *dropped, *rules))

    def lowered(self) -> Change:
        """Return the change to gradients that are sent as bfloat16."""
        recipe = replace(self.request.recipe, compression=Compression("bfloat16"))
        overrides = (*self.overrides, "optimizer.compression=bfloat16")
        return Change(replace(self.request, recipe=recipe), overrides)

    def batch(self, samples: int) -> Change:
        """Return the change with another global batch."""
        return Change(
            replace(self.request, global_batch=samples), (*self.overrides, f"train.global_batch={samples}")
        )


@dataclass(frozen=True)
class Outcome:
    """What the planner makes of a change."""

    change: Change
    plan: Plan
    forecast: Forecast


class Replanner:
    """Plans a run again under changes, as ``hybridpar plan`` with their overrides would."""

    def __init__(self, plan: Plan, basis: Basis, config: Config | None) -> None:
        """Simulate the run's own plan. Raises HybridparError where plan, basis and configuration do not fit.

        Without a configuration the request is for a plan of the same shape and recipe, with nothing pinned.
        """
        self.plan, self.config = plan, config
        self.trials = Trials(basis.chain, basis.profile, basis.cluster)
        self.program = self.trials.program(plan)
        self.now: Prediction = self.trials.prediction(self.program)
        self.asked = _asked(config, plan)
        """What the run was planned for."""

    def outcome(self, change: Change) -> Outcome | None:
        """Plan under a change; None where no plan is possible, or none that gains ``LEAST_GAIN``."""
        trials = self.trials
        try:
            plan = search(trials.chain, trials.profile, trials.cluster, change.request).plan
        except PlanError:
            return None
        assert plan.prediction is not None
        forecast = self.forecast(plan.prediction, plan.global_batch)
        return Outcome(change, plan, forecast) if forecast.gain >= LEAST_GAIN else None

    def forecast(self, then: Prediction, batch: int, late_s: float = 0.0) -> Forecast:
        """Lay a prediction beside that of the run's own plan, which takes ``late_s`` longer than it says."""
        return Forecast(
            self.now.step_s + late_s,
            then.step_s,
            self.plan.global_batch,
            batch,
            max(self.now.memory_bytes),
            max(then.memory_bytes),
            then.source,
        )


def _asked(config: Config | None, plan: Plan) -> Change:
    """Return the request behind a plan; where it is unknown, or a file, the request for a plan of its shape."""
    if config is not None and config.plan.shape != "from_file":
        request = config.request()
        effort = MOST_EFFORT if request.effort in {"long", "exact"} else request.effort
        return Change(replace(request, global_batch=plan.global_batch, effort=effort), ())
    kinds = tuple(stage.kind for stage in plan.stages)
    shape: Shape = next((s for s, own in STAGES_OF.items() if own == kinds), "auto")
    if config is None:
        request = Request(plan.global_batch, shape, plan.precision, plan.recipe)
    else:
        asked = replace(config.plan, shape=shape, path=None, front=Pin(), middle=Pin(), tail=Pin())
        request = replace(config, plan=asked).request()
    return Change(request, (f"plan={shape}",))
