"""Verification: some steps of a training under its plan, compared layer by layer with a single process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from hybridpar.config import Config
from hybridpar.data import datasets
from hybridpar.data.loader import StepLoader
from hybridpar.data.mixing import Mixing
from hybridpar.data.sampler import Order
from hybridpar.data.samples import Samples, size_of
from hybridpar.data.stream import order_of
from hybridpar.errors import ConfigError, ModelError
from hybridpar.model.deferred import Source
from hybridpar.model.trace import Traced
from hybridpar.optimizer_section import OptimizerConfig
from hybridpar.planning.blocks import positions
from hybridpar.planning.plan import Plan
from hybridpar.planning.program import Program
from hybridpar.report.verification import Verification
from hybridpar.runtime.checks import check_fits, check_mixing
from hybridpar.runtime.configured import make_job
from hybridpar.runtime.cross_entropy import make_loss, torch_loss
from hybridpar.runtime.feed import Elsewhere, Feed
from hybridpar.runtime.groups import check_groups
from hybridpar.runtime.job import DTYPES, checked_program
from hybridpar.runtime.optimizer import make_factory, make_rate
from hybridpar.runtime.process import Process
from hybridpar.runtime.reference import Reference
from hybridpar.runtime.verifier import Verifier
from hybridpar.schema import from_data, to_data

TOLERANCES = {"float64": 1e-10, "float32": 1e-4}
"""Sums in another order differ by the unit roundoff (1e-16, 6e-8) times what layers add to it: up to some hundreds
after 20 layers, and more where positive and negative terms cancel. Faults are many orders above the first."""


def verify(config: Config, plan: Plan, traced: Traced, source: Source, process: Process) -> Verification:
    """Run ``verify.steps`` steps of the training under ``plan`` and in a single process on rank 0, and compare.

    Every rank calls this once and gets the result. Stops after the first step that diverges. Rank 0 needs the data
    and memory for the whole model. Errors end the process as in ``trainer.train``: ConfigError for settings that
    cannot be verified, ModelError for a model with randomness that no plan can repeat.
    """
    try:
        plan = _in_precision(config, plan, traced)
        return _verify(config, plan, traced, source, process)
    except Exception as e:  # noqa: BLE001 - whatever it is, the other ranks must not wait
        process.fail(e)


def check(config: Config, plan: Plan, traced: Traced) -> None:
    """Raise HybridparError for what makes a verification impossible, as far as a glance tells."""
    make_factory(config.optimizer)
    check_groups(config.optimizer.parameter_groups, traced.chain)
    if config.loss.sampled is not None:
        raise ConfigError(
            f"loss.sampled: {config.loss.sampled}, but the single process of a verification takes all classes; "
            "plan and verify with loss.sampled=null"
        )
    loss = make_loss(config.loss, traced.chain.classes)
    loss.check_plan(plan, traced.chain)
    check_mixing(config, traced.chain, loss)
    datasets.check(config.data, traced.chain.classes, traced.chain.label_shape, traced.chain.inputs)
    check_fits(config, plan)
    _in_precision(config, plan, traced)


def _in_precision(config: Config, plan: Plan, traced: Traced) -> Plan:
    """Return the plan in the precision of the verification, with the same blocks, whose gradients are whole."""
    wanted = config.verify.precision
    sharding = plan.recipe.sharding
    if sharding != "none" and wanted != "float32":
        raise ConfigError(
            f"verify.precision: {wanted}, but optimizer.sharding={sharding} keeps float32 state; "
            "set verify.precision=float32"
        )
    unkeyed = [layer.name for layer in traced.chain.layers if layer.random == "unkeyed"]
    if unkeyed:
        raise ModelError(
            f"layer {unkeyed[0]} draws random numbers of its own, which differ in every plan; nothing behind it "
            "can be compared: use nn.Dropout, or build the model without it for the verification"
        )
    changed = replace(plan, precision=wanted, recipe=replace(plan.recipe, compression=None))
    return replace(changed, bucket_bytes=plan.bucket_bytes * changed.itemsize // plan.itemsize)


def _verify(config: Config, plan: Plan, traced: Traced, source: Source, process: Process) -> Verification:
    train = _samples(config, plan, traced, process)
    order = order_of(train, plan.global_batch, config.train.seed, drop_last=config.train.drop_last)
    steps = min(config.verify.steps, order.steps)

    def programs(samples: int) -> tuple[Program, ...]:
        return tuple(checked_program(plan, traced.chain, samples, "train", k) for k in range(plan.replicas))

    for step in range(steps):
        programs(order.count(step))  # whatever is wrong with one is said before any process group exists
    verifier, notes = _verifier(config, plan, traced, source, process, programs, order)
    mixup, cutmix, drop = config.data.mixup, config.data.cutmix, config.train.drop_last
    mixing = Mixing(config.train.seed, traced.chain.in_shape, mixup, cutmix) if mixup or cutmix else None
    whole = StepLoader(train, order, lambda count: ((0, count),), mixing=mixing) if process.rank == 0 else None
    with verifier.job.loader(train, drop_last=drop, mixup=mixup, cutmix=cutmix) as feed:
        ran = _steps(verifier, feed, whole, steps)
    ledger = verifier.ledger
    counts, worst = tuple(ledger.counts.items()), tuple(ledger.worst.values())
    name, precision = config.model.name, plan.precision
    found = Verification(name, plan.world, precision, ran, counts, worst, ledger.first, notes)
    data = process.share(lambda: to_data(found))
    process.close()
    return from_data(Verification, data, "verification", ConfigError)


def _samples(config: Config, plan: Plan, traced: Traced, process: Process) -> Samples:
    """Return the training samples on rank 0 and where they are read, elsewhere what stands for them."""
    splits: list[Samples] = []

    def load() -> int | None:
        chain, ignored = traced.chain, config.loss.ignore_index
        loaded = datasets.load(
            config.data, chain.in_shape, chain.classes, ignored, chain.label_shape, chain.inputs
        )
        splits.append(loaded.train)
        return size_of(splits[0])

    size = process.share(load)
    if process.rank in plan.everywhere(positions(plan)[0].ranks) and not splits:
        load()
    return splits[0] if splits else Elsewhere(size)


def _verifier(
    config: Config,
    plan: Plan,
    traced: Traced,
    source: Source,
    process: Process,
    programs: Callable[[int], tuple[Program, ...]],
    order: Order,
) -> tuple[Verifier, tuple[str, ...]]:
    """Return the verifier of this rank, and what it does not compare."""
    settings = config.optimizer
    total = order.total(config.train.steps, config.train.epochs)
    rate = make_rate(settings.lr, settings.schedule, total)
    job = make_job(config, plan, traced, source, process, process.connect(plan), rate)
    reference = None
    if process.rank == 0:
        reference = Reference(
            traced,
            source,
            make_factory(settings),
            programs,
            seed=config.train.seed,
            dtype=DTYPES[plan.precision],
            device=process.device,
            max_norm=settings.clip,
            rate=rate,
            criterion=torch_loss(config.loss, traced.chain.classes),
            groups=settings.parameter_groups,
        )
    tolerance, rounds = config.verify.tolerance or TOLERANCES[plan.precision], plan.precision == "float32"
    notes: tuple[str, ...] = ()
    if settings.compression != "none":
        notes += (f"gradients are summed as they are, without optimizer.compression={settings.compression}",)
    slack = 0.0
    if rounds and (slack := slack_of(settings)):
        notes += (f"parameters may differ by two learning rates, {slack:.3g}: {settings.name} in float32",)
    return Verifier(job, process, reference, tolerance, slack, again=rounds), notes


def slack_of(settings: OptimizerConfig) -> float:
    """Return how far two updates may be apart only because gradients round differently, 0 for SGD.

    Adam and its like divide a gradient by its own size: one that is only rounding may move by a step, either way.
    """
    if settings.name == "SGD":
        return 0.0
    rates = (float(group.options.get("lr", settings.lr)) for group in settings.parameter_groups)
    return 2 * max(settings.lr, *rates, 0.0)


def _steps(verifier: Verifier, feed: Feed, whole: StepLoader | None, steps: int) -> tuple[int, ...]:
    """Run the steps, up to the first that diverges; returns the samples of each."""
    ran: list[int] = []
    everything = iter(whole) if whole is not None else None

    def read() -> tuple[torch.Tensor, torch.Tensor]:
        batch = next(everything) if everything is not None else None
        assert batch is not None
        return batch[0], batch[1]

    for batch in feed:
        ran.append(batch.samples)
        if not verifier.run(batch, read) or len(ran) == steps:
            break
    return tuple(ran)
