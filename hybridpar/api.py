"""The Python API: plan a model, wrap it, and step in a loop of one's own.

::

    import hybridpar
    plan = hybridpar.plan(model, in_shape=(3, 224, 224), global_batch=64)
    job = hybridpar.wrap(model, plan, lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9))
    for batch in job.loader(dataset):
        loss = job.step(batch)

Under torchrun every process runs these lines; without it they plan, and train in a single process.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Literal

from torch import nn

from hybridpar.cluster.describe import local
from hybridpar.cluster.topology import Cluster
from hybridpar.errors import PlanError
from hybridpar.model.chain import Autocast, MemoryFormat
from hybridpar.model.deferred import Source, ready
from hybridpar.model.inputs import Kinds, Shapes, all_shapes
from hybridpar.model.linear import CosineLinear
from hybridpar.model.named import Naming
from hybridpar.model.trace import Traced, trace
from hybridpar.monitor.sampler import Mode
from hybridpar.monitor.settings import DEFAULT_INTERVAL_S
from hybridpar.optimizer_section import ParameterGroup
from hybridpar.planning.plan import Kind, Plan, Precision, Recipe, validate_recipe
from hybridpar.planning.request import Effort, Pin, Request, Shape
from hybridpar.planning.search import search
from hybridpar.profiling.analytic import estimate
from hybridpar.profiling.measure import measure
from hybridpar.profiling.record import Profile
from hybridpar.report.basis import Basis
from hybridpar.runtime import zero
from hybridpar.runtime.cross_entropy import CrossEntropy
from hybridpar.runtime.job import Job
from hybridpar.runtime.loss import Loss
from hybridpar.runtime.margin import ArcFace, CosFace
from hybridpar.runtime.own_loop import OwnLoop
from hybridpar.runtime.own_loss import OwnLoss
from hybridpar.runtime.own_metric import Function, OwnMetric
from hybridpar.runtime.process import Process
from hybridpar.runtime.update import OptimizerFactory
from hybridpar.runtime.watching import Window
from hybridpar.sections import MonitorConfig, TraceConfig
from hybridpar.train_section import Compiling, LossScale, check_apart, check_window

__all__ = [
    "ArcFace",
    "CosFace",
    "CosineLinear",
    "CrossEntropy",
    "Job",
    "LossScale",
    "OwnLoss",
    "OwnMetric",
    "ParameterGroup",
    "plan",
    "process",
    "recording",
    "wrap",
]


@lru_cache(maxsize=1)
def process() -> Process:
    """Return what this process is in the job: rank, world, device."""
    made = Process()
    made.leave_at_exit()
    return made


def plan(
    model: nn.Module,
    in_shape: Shapes,
    global_batch: int,
    *,
    cluster: Cluster | None = None,
    profile: Literal["analytic", "measured"] | Profile = "analytic",
    shape: Shape = "auto",
    precision: Precision = "float32",
    recipe: Recipe | None = None,
    pins: Mapping[Kind, Pin] | None = None,
    replicas: int | None = None,
    effort: Effort = "normal",
    input_dtype: Kinds = "float",
    layers: Naming | None = None,
    autocast: Autocast | None = None,
    memory_format: MemoryFormat | None = None,
) -> Plan:
    """Plan the training of a model; under torchrun rank 0 plans and all ranks get its plan.

    Args:
        model: any module that ``torch.fx`` can trace, or an ``nn.Sequential``.
        in_shape: of one input sample; a sequence of shapes where the model takes several tensors.
        global_batch: samples per optimizer step, over all ranks.
        cluster: what to plan for; default: this machine, with the job's number of ranks.
        profile: layer times estimated from the device's data sheet, measured now on this device, or given.
        shape: auto, three_stage, data_parallel, pipeline or front_tail.
        precision: of parameters and computation.
        recipe: clipping, optimizer sharding and optimizer states per parameter.
        pins: fields of stages that are fixed, as ``{"tail": Pin(micro_batch=64)}``.
        replicas: number of plan replicas; default: the planner's choice.
        effort: of the search: quick, normal, long or exact.
        input_dtype: ``int`` for token ids; of several tensors one for all, or a sequence with one each (``bool``).
        layers: names the model's layers, where tracing cannot find them: a function of the model that gives a list
            of (name, module) that run one after the other. A method ``hybridpar_layers`` of the model does too.
        autocast: ``bfloat16`` or ``float16``, in which layers compute with parameters in float32. The latter needs
            ``Recipe(scaling=True)``, and ``scaling=LossScale()`` in :func:`wrap`, for gradients that are small.
        memory_format: ``channels_last``: images, and the weights that make them, lie so in memory.

    Raises:
        ModelError: the model cannot be traced.
        PlanError: no such plan is possible. MemoryLimitError: none fits into memory.
        LaunchError: the plan is for another number of ranks than the job has.

    """
    traced, place = _traced(model, in_shape, input_dtype, layers, autocast, memory_format), process()
    validate_recipe(recipe or Recipe(), precision)
    request = Request(
        global_batch,
        shape,
        precision,
        recipe or Recipe(),
        dict(pins or {}),
        replicas=replicas,
        effort=effort,
    )

    def make() -> Plan:
        where = cluster or local(place.world)
        layers = _profile(profile, traced, where, request, place)
        found = search(traced.chain, layers, where, request).plan
        _bases[found.fingerprint] = Basis(traced.chain, layers, where)
        return found

    alone = place.world == 1 and cluster is not None
    return make() if alone else place.agree(make)


def wrap(
    model: nn.Module,
    plan: Plan,
    optimizer: OptimizerFactory,
    *,
    source: Source | None = None,
    in_shape: Shapes | None = None,
    input_dtype: Kinds = "float",
    layers: Naming | None = None,
    autocast: Autocast | None = None,
    memory_format: MemoryFormat | None = None,
    seed: int = 0,
    max_norm: float | None = None,
    rate: Callable[[int], float] | None = None,
    loss: Loss | None = None,
    groups: Sequence[ParameterGroup] = (),
    metrics: Mapping[str, OwnMetric | Function] | None = None,
    ema: float | None = None,
    scaling: LossScale | None = None,
    compiling: Compiling | None = None,
) -> Job:
    """Take this rank's part of a model and connect the ranks; every rank calls it with the same arguments.

    Args:
        model: the model that was planned for, with its weights.
        plan: from :func:`plan`, or ``Plan.load``.
        optimizer: makes an optimizer for some parameters.
        source: where the initial weights come from; default: the model itself. ``deferred.defer(builder)`` makes
            them on their owners only, for models that no single rank could hold.
        in_shape: of one input sample, where the model was not planned in this process.
        input_dtype: as for :func:`plan`, where the model was not planned in this process.
        layers: likewise.
        autocast: likewise.
        memory_format: likewise.
        seed: of dropout.
        max_norm: clips the gradients by their global norm; the plan's recipe must say so.
        rate: learning rate by step; default: the optimizer's own.
        loss: ``CrossEntropy(label_smoothing=..., class_weights=..., ignore_index=..., margin=..., sampled=...)``,
            which works on sharded classes too, or ``OwnLoss(function)``; default: the former, without arguments.
            For ``sampled`` the plan's recipe must have the same share: ``Recipe(sampling=0.1)``.
        groups: ``[ParameterGroup("features.*", {"lr": 0.01, "weight_decay": 0})]``: parameters, by patterns of
            their names, for which the optimizer is to have other options. The first group that matches has them.
        metrics: ``{"name": function}`` of (logits, labels), or ``OwnMetric``: further figures of ``job.evaluate``.
        ema: decay of a moving average of the weights, which ``job.evaluate`` uses; ``Recipe(average=True)`` tells
            the planner of its memory.
        scaling: ``LossScale()`` scales the loss as ``torch.amp.GradScaler`` does; the plan's recipe must say so:
            ``Recipe(scaling=True)``.
        compiling: ``Compiling()`` has ``torch.compile`` compile the layers, ``Compiling(("front",))`` those of
            some stages.

    A rank's number in its plan replica is ``job.place``; ``job.program().reads(job.place)`` are its samples.
    Raises LaunchError where the plan is for another number of ranks, PlanError where it is for another model, or
    the model for another plan: with other parameters frozen than when it was planned.
    """
    place = process()
    traced = _traced(model, in_shape, input_dtype, layers, autocast, memory_format)
    return Job(
        plan,
        traced,
        source or ready(model),
        optimizer,
        place.connect(plan),
        rank=place.rank,
        seed=seed,
        device=place.device,
        max_norm=max_norm,
        rate=rate,
        engines=zero.make_engines(place, optimizer, plan.recipe),
        loss=loss,
        groups=groups,
        metrics=metrics,
        decay=ema,
        scaling=scaling,
        compiling=compiling,
    )


def recording(
    job: Job,
    folder: Path | str,
    *,
    timeline: Window | None = (10, 13),
    trace: Window | None = None,
    monitor: Mode = "auto",
    interval_s: float = DEFAULT_INTERVAL_S,
    profile: Profile | None = None,
    cluster: Cluster | None = None,
) -> OwnLoop:
    """Record the steps of a loop of one's own into a folder that ``hybridpar report`` reads.

    ::

        with hybridpar.recording(job, "runs/mine"):
            for batch in job.loader(dataset):
                loss = job.step(batch)

    Every rank enters it and does its steps within. A job that goes on (``job.go_on``) goes on in its folder.

    Args:
        job: from :func:`wrap`.
        folder: of the run, on a disk that all ranks share; it is made.
        timeline: steps, counted from the first, in which every action is timed; None: none.
        trace: steps that torch's profiler looks at, kernel by kernel; None: none.
        monitor: whether the nodes and their GPUs are sampled: auto, off or required.
        interval_s: seconds between two samples.
        profile: what the plan was made on; default: what :func:`plan` made it on in this process. A plan that was
            loaded has none, and without one nothing of it can be predicted.
        cluster: likewise.

    Raises ConfigError for windows that are none or overlap, and, as it is entered, for a folder that cannot be
    written or holds another run.
    """
    check_window("timeline", timeline)
    settings = MonitorConfig(mode=monitor, interval_s=interval_s, trace=TraceConfig(trace))
    check_apart(timeline, trace)
    basis = _bases.get(job.plan.fingerprint)
    if basis is not None:
        basis = Basis(job.chain, profile or basis.profile, cluster or basis.cluster)
    elif profile is not None and cluster is not None:
        basis = Basis(job.chain, profile, cluster)
    return OwnLoop(job, process(), Path(folder), timeline, settings, basis)


_bases: dict[str, Basis] = {}
"""What plans were made on, by their fingerprints."""
_known: dict[int, tuple[nn.Module, Traced]] = {}


def _traced(
    model: nn.Module,
    in_shape: Shapes | None,
    input_dtype: Kinds,
    layers: Naming | None,
    autocast: Autocast | None,
    memory_format: MemoryFormat | None,
) -> Traced:
    """Trace a model once; later calls for it may leave out the shape and what else they know of it."""
    if id(model) in _known:
        known = _known[id(model)][1]
        chain, wanted = known.chain, (autocast, memory_format, known.frozen)
        if in_shape is None:
            _check_unchanged(known, autocast, memory_format)
            return known
        if (all_shapes(in_shape), *wanted) == (
            chain.in_shapes,
            chain.autocast,
            chain.memory_format,
            chain.frozen,
        ):
            return known
    if in_shape is None:
        raise TypeError("wrap() needs in_shape for a model that was not planned in this process")
    traced = trace(model, in_shape, type(model).__name__, input_dtype, layers, autocast, memory_format)
    _known[id(model)] = model, traced
    return traced


def _check_unchanged(known: Traced, autocast: Autocast | None, memory_format: MemoryFormat | None) -> None:
    """Raise PlanError for a model that is no longer the one that was planned for."""
    chain = known.chain
    for name, given, planned in (
        ("autocast", autocast, chain.autocast),
        ("memory_format", memory_format, chain.memory_format),
    ):
        if given not in {None, planned}:
            raise PlanError(
                f"{name}: {given}, but the model was planned with {planned}; give it to hybridpar.plan, too"
            )
    changed = sorted(set(known.frozen) ^ set(chain.frozen))
    if changed:
        raise PlanError(
            f"requires_grad of {len(changed)} parameters, as {changed[0]}, has changed since the model was "
            "planned; plan again"
        )


def _profile(
    choice: Literal["analytic", "measured"] | Profile,
    traced: Traced,
    cluster: Cluster,
    request: Request,
    place: Process,
) -> Profile:
    if isinstance(choice, Profile):
        return choice
    if choice == "analytic":
        return estimate(traced.chain, cluster.device, request.precision)
    return measure(traced.modules, traced.chain, place.device.type, request.precision)
