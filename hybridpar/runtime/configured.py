"""The job that a configuration asks for."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from hybridpar.config import Config
from hybridpar.model.deferred import Source
from hybridpar.model.trace import Traced
from hybridpar.planning.plan import Plan
from hybridpar.runtime import zero
from hybridpar.runtime.communicators import ProcessGroups
from hybridpar.runtime.cross_entropy import make_loss
from hybridpar.runtime.job import Job
from hybridpar.runtime.optimizer import make_factory
from hybridpar.runtime.own_metric import Function, OwnMetric
from hybridpar.runtime.process import Process
from hybridpar.train_section import Compiling


def make_job(
    config: Config,
    plan: Plan,
    traced: Traced,
    source: Source,
    process: Process,
    communicators: ProcessGroups,
    rate: Callable[[int], float],
    *,
    metrics: Mapping[str, OwnMetric | Function] | None = None,
    decay: float | None = None,
    compiling: Compiling | None = None,
) -> Job:
    """Return this rank's job with the optimizer, the loss and the seed of a configuration.

    ``rate``, ``metrics``, ``decay`` and ``compiling`` are those of ``Job``. Raises as ``Job`` does.
    """
    settings, factory = config.optimizer, make_factory(config.optimizer)
    return Job(
        plan,
        traced,
        source,
        factory,
        communicators,
        rank=process.rank,
        seed=config.train.seed,
        device=process.device,
        max_norm=settings.clip,
        rate=rate,
        engines=zero.make_engines(process, factory, plan.recipe),
        loss=make_loss(config.loss, traced.chain.classes),
        groups=settings.parameter_groups,
        metrics=metrics,
        decay=decay,
        scaling=config.train.scaling,
        compiling=compiling,
    )
