"""From a configuration to a plan: builds or reads the chain, the profile and the cluster, and asks the search.

The command line and the training job share it. Torch is imported only where a model has to be traced or timed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from hybridpar.cluster.describe import from_config
from hybridpar.cluster.topology import Cluster
from hybridpar.config import Config
from hybridpar.errors import ProfileError
from hybridpar.host import keep_freed_memory
from hybridpar.model.chain import Chain
from hybridpar.planning.check import check
from hybridpar.planning.compile import compile as compile_program
from hybridpar.planning.plan import Plan
from hybridpar.planning.search import Candidate, Planned, assess, search
from hybridpar.profiling.analytic import estimate
from hybridpar.profiling.record import Profile
from hybridpar.schema import to_data

if TYPE_CHECKING:
    from hybridpar.model.deferred import Source
    from hybridpar.model.trace import Traced

Report = Callable[[str], None]


@dataclass(frozen=True)
class Subject:
    """What is planned for what."""

    chain: Chain
    profile: Profile
    cluster: Cluster


def load_model(config: Config) -> tuple[Traced, Source]:
    """Build the configured model without its weights, and trace it. Raises ModelError."""
    from hybridpar.model.build import build  # noqa: PLC0415 - torch takes seconds to import
    from hybridpar.model.deferred import defer  # noqa: PLC0415
    from hybridpar.model.trace import trace  # noqa: PLC0415

    model = config.model
    source = defer(build(model.builder, model.options, classes=model.classes, in_shape=model.in_shape))
    return trace(source.module, model.in_shape, model.name), source


@dataclass
class Shelf:
    """What the combinations of a sweep have in common: no model is traced or measured twice."""

    traced: dict[str, Traced] = field(default_factory=dict)
    profiles: dict[str, Profile] = field(default_factory=dict)

    def prepare(self, config: Config, report: Report = lambda _: None) -> Subject:
        """Gather chain, profile and cluster like :func:`prepare`."""
        if config.profile.kind == "from_file":
            return prepare(config, report=report)
        model = json.dumps(to_data(config.model), sort_keys=True)
        if model not in self.traced:
            self.traced[model] = load_model(config)[0]
        if config.profile.kind == "analytic":
            return prepare(config, self.traced[model], report=report)
        local = config.cluster.get("kind") == "local"
        key = repr((model, config.profile, config.train.precision, config.train.device, local))
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
        _check_precision(profile, config)
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
    if chain is None:
        return load_model(config)[0].chain
    if (chain.model, chain.in_shape) != (config.model.name, config.model.in_shape):
        report(f"planning model {chain.model} of the profile (not {config.model.name} of the configuration)")
    return chain


def _check_precision(profile: Profile, config: Config) -> None:
    if profile.dtype != config.train.precision:
        raise ProfileError(
            f"the profile was taken in {profile.dtype}, but train.precision={config.train.precision}; "
            f"set train.precision={profile.dtype}, or profile again"
        )


def measured(config: Config, traced: Traced, report: Report, *, on_cpu: bool = False) -> Profile:
    """Time the model's layers on this machine's device as a run would, or take the cached times."""
    import torch  # noqa: PLC0415 - torch takes seconds to import

    from hybridpar.profiling.cache import cache_directory, cache_key, cached  # noqa: PLC0415
    from hybridpar.profiling.measure import device_name, measure  # noqa: PLC0415

    settings = config.profile
    on_cpu = on_cpu or config.train.device == "cpu" or not torch.cuda.is_available()
    device = "cpu" if on_cpu else "cuda"
    precision = config.train.precision

    def make() -> Profile:
        keep_freed_memory()
        return measure(
            traced.modules,
            traced.chain,
            device,
            precision,
            settings.micro_batches,
            budget_s=settings.budget_s,
            report=report,
        )

    if not settings.cache:
        return make()
    key = cache_key(traced.chain, device_name(device), precision, settings.micro_batches, settings.budget_s)
    return cached(cache_directory(), key, make)


def make_plan(config: Config, subject: Subject) -> Planned:
    """Return the plan: searched for, or read from a file and assessed on this cluster.

    Its program has passed the deadlock check. Raises HybridparError.
    """
    if config.plan.shape != "from_file":
        planned = search(subject.chain, subject.profile, subject.cluster, config.request())
    else:
        plan = Plan.load(Path(str(config.plan.path)), subject.chain)
        plan = assess(plan, subject.chain, subject.profile, subject.cluster)
        planned = Planned(plan, "from_file", (Candidate("from_file", plan),), 1)
    check(compile_program(planned.plan, subject.chain, planned.plan.global_batch, "train"))
    return planned
