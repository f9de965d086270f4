"""From a configuration to a plan: builds or reads the chain, the profile and the cluster, and asks the search.

The command line and the training job share it. Torch is imported only where a model has to be traced or timed.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridpar.cluster.describe import from_config
from hybridpar.cluster.topology import Cluster
from hybridpar.config import Config
from hybridpar.errors import DataError, ProfileError
from hybridpar.host import keep_freed_memory, paused_collection
from hybridpar.model.chain import Chain
from hybridpar.planning.check import check
from hybridpar.planning.compile import compile as compile_program
from hybridpar.planning.pareto import Front, batches_between, front
from hybridpar.planning.plan import Plan, validate
from hybridpar.planning.search import Candidate, Planned, assess, search
from hybridpar.profiling.analytic import estimate
from hybridpar.profiling.record import Profile
from hybridpar.schema import from_data, to_data

if TYPE_CHECKING:
    import torch

    from hybridpar.model.deferred import Source
    from hybridpar.model.trace import Traced
    from hybridpar.runtime.process import Process

Report = Callable[[str], None]


@dataclass(frozen=True)
class Subject:
    """What is planned for what."""

    chain: Chain
    profile: Profile
    cluster: Cluster


def load_model(config: Config) -> tuple[Traced, Source]:
    """Build the configured model, whose weights are made or read later, and trace it. Raises ModelError."""
    from hybridpar.model.build import build  # noqa: PLC0415 - torch takes seconds to import
    from hybridpar.model.deferred import defer  # noqa: PLC0415
    from hybridpar.model.freeze import freeze  # noqa: PLC0415
    from hybridpar.model.shared_norm import synchronise  # noqa: PLC0415
    from hybridpar.model.trace import trace  # noqa: PLC0415

    model = config.model
    source = defer(build(model.builder, model.options, classes=model.classes, in_shape=model.in_shape))
    if model.weights is not None:
        from hybridpar.model.weights import Weights  # noqa: PLC0415 - as above

        source = Weights(source, Path(model.weights).expanduser(), model.fresh)
    freeze(source.module, model.frozen)
    if model.batch_norm == "synchronised":
        synchronise(source.module)
    traced = trace(
        source.module,
        model.in_shape,
        model.name,
        model.input_dtype,
        autocast=config.train.autocast,
        memory_format=config.train.memory_format,
    )
    return traced, source


@dataclass
class Shelf:
    """What the combinations of a sweep have in common: no model is traced or measured twice."""

    traced: dict[str, Traced] = field(default_factory=dict)
    profiles: dict[str, Profile] = field(default_factory=dict)

    def prepare(self, config: Config, report: Report = lambda _: None) -> Subject:
        """Gather chain, profile and cluster like :func:`prepare`."""
        if config.profile.kind == "from_file":
            return prepare(config, report=report)
        settings = config.train.autocast, config.train.memory_format
        model = json.dumps([to_data(config.model), *settings], sort_keys=True)
        if model not in self.traced:
            self.traced[model] = load_model(config)[0]
        if config.profile.kind == "analytic":
            return prepare(config, self.traced[model], report=report)
        local = config.cluster.get("kind") == "local"
        timed = (
            config.profile,
            config.train.precision,
            config.train.device,
            config.data,
            _optimizer_text(config),
        )
        key = repr((model, timed, local))
        subject = prepare(config, self.traced[model], report=report, profile=self.profiles.get(key))
        self.profiles[key] = subject.profile
        return subject


def prepare(
    config: Config,
    traced: Traced | None = None,
    world: int | None = None,
    report: Report = lambda _: None,
    profile: Profile | None = None,
) -> Subject:
    """Gather chain, profile and cluster.

    A profile from a file brings its chain along, so that neither model nor device is needed; ``traced`` is the
    model where it was traced already, ``profile`` what ``profile=measured`` gave before. ``world`` is the number
    of ranks of a local cluster that names none.
    Raises HybridparError for whatever does not fit together.
    """
    cluster = from_config(config.cluster, world=world, device=config.train.device)
    if config.profile.kind == "from_file":
        profile = Profile.load(Path(str(config.profile.path)))
        chain = traced.chain if traced is not None else _described(profile, config, report)
        profile.check(chain)
        _check_dtypes(profile, chain, config)
        _note_differences(profile, config, cluster, report)
        return Subject(chain, profile, cluster)
    traced = traced or load_model(config)[0]
    if config.profile.kind == "analytic":
        profile = estimate(traced.chain, cluster.device, config.train.precision)
    elif profile is None:
        on_cpu = cluster.device.kind == "cpu" and config.cluster.get("kind") == "local"
        profile = measured(config, traced, report, on_cpu=on_cpu)
    return Subject(traced.chain, profile, cluster)


def _described(profile: Profile, config: Config, report: Report) -> Chain:
    """Return the profile's own chain; it stands in for the configured model."""
    chain = profile.described
    if chain is None and importlib.util.find_spec("torch") is None:
        raise ProfileError(
            f"{config.profile.path} describes no chain, and tracing model {config.model.name} needs torch; give "
            "the file a field `described`, as `hybridpar profile` does, or install torch"
        )
    if chain is None:
        return load_model(config)[0].chain
    if (chain.model, chain.in_shapes) != (config.model.name, config.model.in_shapes):
        report(f"planning model {chain.model} of the profile (not {config.model.name} of the configuration)")
    return chain


def _check_dtypes(profile: Profile, chain: Chain, config: Config) -> None:
    """Raise ProfileError where a profile's layers computed otherwise than those of the training will."""
    for name in ("autocast", "memory_format"):
        taken, wanted = getattr(chain, name), getattr(config.train, name)
        if taken != wanted:
            taken, wanted = taken or "null", wanted or "null"
            raise ProfileError(
                f"the profile was taken with train.{name}={taken}, but here it is {wanted}; "
                f"set train.{name}={taken}, or profile again"
            )
    if profile.dtype != config.train.precision:
        raise ProfileError(
            f"the profile was taken in {profile.dtype}, but train.precision={config.train.precision}; "
            f"set train.precision={profile.dtype}, or profile again"
        )


def _note_differences(profile: Profile, config: Config, cluster: Cluster, report: Report) -> None:
    """Tell where a profile's figures are for something else than what is planned."""
    if profile.device_kind not in {None, cluster.device.kind}:
        report(
            f"the profile's times are those of {profile.device}; they stand for the {cluster.device.name} of "
            f"cluster {cluster.name}"
        )
    wanted = _optimizer_text(config)
    if profile.optimizer not in {None, wanted}:
        report(f"the profile's update time is that of {profile.optimizer}; it stands for {wanted}")


def _optimizer_text(config: Config) -> str:
    """Name an optimizer by what its step's time depends on: the options that are on."""
    on = [f"{k}={v}" for k, v in sorted(config.optimizer.options.items()) if v]
    return f"{config.optimizer.name}({', '.join(on)})"


def measured(
    config: Config,
    traced: Traced,
    report: Report,
    *,
    on_cpu: bool = False,
    process: Process | None = None,
    progress: Report = lambda _: None,
) -> Profile:
    """Time the model's layers on this machine's device as a run would, or take the cached times.

    All ranks of ``process`` measure at the same time and return the same profile; None: this process alone.
    """
    import torch  # noqa: PLC0415 - torch takes seconds to import

    from hybridpar.profiling.cache import cache_directory, cache_key, device_name, find, keep  # noqa: PLC0415

    settings, first = config.profile, process is None or process.rank == 0
    on_cpu = on_cpu or config.train.device == "cpu" or not torch.cuda.is_available()
    device = process.device if process else torch.device("cpu" if on_cpu else "cuda")
    meet = _meeting(process)
    key = cache_key(
        traced.chain,
        device_name(device),
        config.train.precision,
        settings,
        config.data,
        _optimizer_text(config),
        (process.world, process.place.local_world) if process else (1, 1),
    )
    if settings.cache:
        known = find(cache_directory(), key) if first else None
        kept = meet(known and to_data(known))[0]
        if kept is not None:
            report(f"profile {key} from {cache_directory()}; profile.cache=false measures again")
            return from_data(Profile, kept, "profile", ProfileError)
    profile = _measured_now(config, traced, device, meet, process, report if first else lambda _: None, progress)
    if settings.cache and first:
        keep(cache_directory(), key, profile)
    return profile


def _meeting(process: Process | None) -> Callable[[Any], list[Any]]:
    """Return how the ranks of a process tell each other a JSON value each."""
    if process is None or process.world == 1:
        return lambda value: [value]
    return lambda value: [process.share(lambda: value, rank) for rank in range(process.world)]


def _measured_now(
    config: Config,
    traced: Traced,
    device: torch.device,
    meet: Callable[[Any], list[Any]],
    process: Process | None,
    report: Report,
    progress: Report,
) -> Profile:
    from hybridpar.profiling.combine import combine  # noqa: PLC0415 - torch takes seconds to import
    from hybridpar.profiling.measure import measure  # noqa: PLC0415
    from hybridpar.runtime.optimizer import make_factory  # noqa: PLC0415
    from hybridpar.watcher import watch_on  # noqa: PLC0415

    keep_freed_memory()
    optimizer = make_factory(config.optimizer)
    loader_s = _loader_rate(config, traced.chain, report)
    own = measure(
        traced.modules,
        traced.chain,
        device,
        config.train.precision,
        config.profile.micro_batches,
        config.profile.fractions,
        config.profile.budget_s,
        report,
        progress=progress,
        optimizer=optimizer,
        meet=meet,
        sharing=process.place.local_world if process else 1,
        watch=watch_on(device) if config.profile.occupancy else None,
    )
    own = replace(
        own,
        optimizer=_optimizer_text(config),
        loader_samples_per_s=loader_s,
        data=config.data.name if loader_s else None,
    )
    ranks = [
        from_data(Profile, data, f"profile of rank {i}", ProfileError) for i, data in enumerate(meet(to_data(own)))
    ]
    combined = combine(ranks)
    for note in combined.notes[len(own.notes) :] if len(ranks) > 1 else ():
        report(note)
    return combined


def _loader_rate(config: Config, chain: Chain, report: Report) -> float | None:
    """Return the training samples that a core reads per second; None, and why, where they cannot be read."""
    from hybridpar.data.datasets import load  # noqa: PLC0415 - torch takes seconds to import
    from hybridpar.profiling.loading import samples_per_s  # noqa: PLC0415

    try:
        ignored = config.loss.ignore_index
        shape, labels = chain.in_shape, chain.label_shape
        return samples_per_s(load(config.data, shape, chain.classes, ignored, labels, chain.inputs).train)
    except DataError as e:
        report(f"the loader is not measured: {e}")
        return None


def make_plan(config: Config, subject: Subject, kept: Plan | None = None) -> Planned:
    """Return the plan: ``kept`` if there is one, searched for, or read from a file and assessed on this cluster.

    Its program has passed the deadlock check. Raises HybridparError.
    """
    if kept is not None:
        validate(kept, subject.chain)
        planned = Planned(kept, "from_file", (Candidate("from_file", kept),), 1)
    elif config.plan.shape != "from_file":
        with paused_collection():
            planned = search(subject.chain, subject.profile, subject.cluster, config.request())
    else:
        plan = Plan.load(Path(str(config.plan.path)), subject.chain)
        plan = assess(plan, subject.chain, subject.profile, subject.cluster)
        planned = Planned(plan, "from_file", (Candidate("from_file", plan),), 1)
    check(compile_program(planned.plan, subject.chain, planned.plan.global_batch, "train"))
    return planned


def make_front(config: Config, subject: Subject, report: Report = lambda _: None) -> Front:
    """Return the front of throughput against memory over ``plan.global_batch_range``.

    Every plan's program has passed the deadlock check. Raises HybridparError where no batch has a plan.
    """
    request = config.request()
    least, most = config.plan.global_batch_range or (request.global_batch,) * 2
    batches = batches_between(least, most, request.global_batch)
    found = front(subject.chain, subject.profile, subject.cluster, request, batches, report)
    for point in found.points:
        check(compile_program(point.plan, subject.chain, point.plan.global_batch, "train"))
    return found
