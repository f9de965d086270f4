"""What is checked before a training starts, so that nothing is spawned or read in vain."""

from __future__ import annotations

import os
from dataclasses import fields
from typing import Any

import torch

from hybridpar.config import Config
from hybridpar.data import datasets
from hybridpar.data.mixing import Mixing
from hybridpar.data.sampler import Order
from hybridpar.errors import ConfigError
from hybridpar.model.chain import Chain
from hybridpar.model.freeze import check_trained
from hybridpar.monitor import sampler
from hybridpar.optimizer_section import PowerSgdConfig
from hybridpar.planning.blocks import positions
from hybridpar.planning.compression import Compression
from hybridpar.planning.plan import Plan
from hybridpar.runtime import compiled, zero
from hybridpar.runtime.boards import check_loggers
from hybridpar.runtime.callback import make_callbacks
from hybridpar.runtime.cross_entropy import make_loss
from hybridpar.runtime.early_stop import early_stop
from hybridpar.runtime.elementwise import check_elementwise, check_rowwise
from hybridpar.runtime.groups import check_groups
from hybridpar.runtime.journal import check_run_dir
from hybridpar.runtime.judge import Judge
from hybridpar.runtime.loss import Loss, check_mixes
from hybridpar.runtime.optimizer import make_factory
from hybridpar.runtime.own_metric import OwnMetrics, make_metrics
from hybridpar.runtime.process import Place
from hybridpar.train_section import check_apart


def check_config(config: Config, place: Place | None = None) -> None:
    """Raise HybridparError for what is wrong whatever the plan: optimizer, loss, on rank 0 run folder and loggers.

    ``place`` is that of this process, by default as the environment tells.
    """
    place = place or Place.read(os.environ)
    if place.rank == 0:
        check_run_dir(config, restarted=place.restarts > 0)
        check_loggers(config.train.loggers)
    if place.local_rank == 0 and config.monitor.mode != "off":
        sampler.check(config.monitor.options)
    check_apart(config.train.timeline, config.monitor.trace.steps)
    make_factory(config.optimizer)
    make_loss(config.loss, config.model.classes)
    if config.optimizer.sharding in {"zero1", "zero2"}:
        _check_sharded(config)
    if config.train.compiling is not None:
        on_gpu = config.train.device != "cpu" and torch.cuda.is_available()
        compiled.check(config.train.compiling, "cuda" if on_gpu else "cpu")


def check(config: Config, plan: Plan, chain: Chain, place: Place | None = None) -> None:
    """Raise HybridparError for what would make the training impossible, as far as a glance tells.

    Checks what ``check_config`` does, that every group has parameters, that a plan from a file fits the
    configuration, and the data set's paths and classes on the ranks that read it: only their nodes need to have
    it. Touches no process and decodes no data.
    """
    place = place or Place.read(os.environ)
    check_config(config, place)
    check_trained(chain)
    loss = make_loss(config.loss, chain.classes)
    loss.check_plan(plan, chain)
    check_mixing(config, chain, loss)
    check_groups(config.optimizer.parameter_groups, chain)
    metrics = OwnMetrics(make_metrics(config.metrics), chain)
    metrics.check_plan(plan)
    make_callbacks(config.train.callbacks)
    Judge.of(config.checkpoint.best, metrics.metrics)
    early_stop(config.train.early_stop, metrics.metrics)
    if place.rank in plan.everywhere(positions(plan)[0].ranks):
        datasets.check(config.data, chain.classes, chain.label_shape, chain.inputs)
    if config.train.compiling is not None:
        compiled.check_stages(config.train.compiling, plan)
    check_fits(config, plan)


def check_mixing(config: Config, chain: Chain, loss: Loss) -> None:
    """Raise HybridparError where inputs are to be mixed that cannot be, or for a loss that does not mix."""
    if config.data.mixup is None and config.data.cutmix is None:
        return
    if not chain.mixable:
        raise ConfigError("data.mixup and data.cutmix cannot mix the integers that the model takes; drop them")
    check_mixes(loss)
    Mixing(config.train.seed, chain.in_shape, config.data.mixup, config.data.cutmix)


def check_evaluations(config: Config, order: Order) -> None:
    """Raise ConfigError where something goes by evaluations, but none comes before the training's end."""
    if order.size is not None or config.train.eval_every_steps is not None:
        return
    early = ("train.early_stop.metric", config.train.early_stop.metric)
    for name, metric in (early, ("checkpoint.best", config.checkpoint.best)):
        if metric is not None:
            raise ConfigError(
                f"{name}: {metric}, but the training data has no length and so no epochs after which to evaluate; "
                "set train.eval_every_steps"
            )


def check_fits(config: Config, plan: Plan) -> None:
    """Raise ConfigError unless a plan, maybe from a file, fits the configuration."""
    if plan.recipe.sharding != "none":
        _check_sharded(config)
    if plan.recipe.sampling is not None:
        check_rowwise(make_factory(config.optimizer))
    ema, decay = config.train.ema, "a decay" if plan.recipe.average else "null"
    clip, wanted = config.optimizer.clip, "a largest norm" if plan.recipe.clipping else "null"
    scaling, sampled = plan.recipe.scaling, plan.recipe.sampling
    sharding = plan.recipe.sharding if config.optimizer.sharding == "auto" else config.optimizer.sharding
    for name, given, planned, remedy in (
        ("train.global_batch", config.train.global_batch, plan.global_batch, plan.global_batch),
        ("train.precision", config.train.precision, plan.precision, plan.precision),
        ("optimizer.sharding", sharding, plan.recipe.sharding, plan.recipe.sharding),
        ("optimizer.offload", config.optimizer.offload, plan.recipe.offload, str(plan.recipe.offload).lower()),
        ("optimizer.clip", clip is not None, plan.recipe.clipping, wanted),
        *_compressions(config.optimizer.compressed, plan.recipe.compression),
        ("loss.sampled", config.loss.sampled, sampled, "null" if sampled is None else sampled),
        ("train.ema", ema is not None, plan.recipe.average, decay),
        ("train.loss_scale.enabled", config.train.scaling is not None, scaling, str(scaling).lower()),
    ):
        if given != planned:
            raise ConfigError(
                f"{name}: {given}, but the plan is for {planned}; set {name} to {remedy}, or plan again"
            )


def _compressions(given: Compression | None, planned: Compression | None) -> list[tuple[str, Any, Any, str]]:
    """Return every setting of the compression: its name, its value, that of the plan, and as one writes that."""
    method, wanted = ("none" if c is None else c.method for c in (given, planned))
    rows: list[tuple[str, Any, Any, str]] = [("optimizer.compression", method, wanted, wanted)]
    if given is not None and planned is not None and method == wanted == "power_sgd":
        for name in (f.name for f in fields(PowerSgdConfig)):
            own, other = getattr(given, name), getattr(planned, name)
            rows.append((f"optimizer.power_sgd.{name}", own, other, str(other).lower()))
    return rows


def _check_sharded(config: Config) -> None:
    """Raise ConfigError where DeepSpeed is missing, and for an optimizer whose state cannot be sharded."""
    zero.require_deepspeed()
    factory = make_factory(config.optimizer)
    check_elementwise(factory)
    zero.check_grouped(factory, config.optimizer.parameter_groups)
    if config.optimizer.offload and not (config.train.device != "cpu" and torch.cuda.is_available()):
        zero.check_offload("cpu")
