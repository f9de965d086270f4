"""Parameter groups under a plan equal those of torch in a single process, with schedules and clipping."""

from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hybridpar.errors import ConfigError
from hybridpar.optimizer_section import OptimizerConfig, ParameterGroup, ScheduleConfig
from hybridpar.planning.plan import Recipe
from hybridpar.runtime.job import Job
from hybridpar.runtime.optimizer import make_factory, make_rate
from tests.support.parity import near, overlapping_ranks, own_ranks, plan_of, shape, shared_ranks
from tests.support.threads import run_ranks
from tests.support.training import SEED, assemble, make_case, whole_model

STEPS, MAX_NORM = 6, 0.3
GROUPS = (
    {"match": "*.bias", "weight_decay": 0.0},
    {"match": "[0-5].*", "lr": 0.01, "weight_decay": 0.3},
    {"match": "15.weight", "lr": 0.2},
)
"""Biases first; then the first convolutions; then the last linear. The rest has the optimizer's own options."""
KINDS = {
    "SGD": (0.05, {"momentum": 0.9, "weight_decay": 0.1}),
    "AdamW": (0.02, {"weight_decay": 0.1}),
}
SCHEDULE = ScheduleConfig("cosine", warmup_steps=2, minimum=0.1)


@cache
def case():
    return make_case(steps=STEPS)


def config_of(name):
    lr, options = KINDS[name]
    return OptimizerConfig(name, lr, options, schedule=SCHEDULE, groups=GROUPS)


@cache
def reference(name, clipping):
    """Losses and parameters of torch's own optimizer with groups made by hand, and LambdaLR."""
    model, (lr, options) = whole_model(case()), KINDS[name]
    parts = {"rest": [], "bias": [], "first": [], "last": []}
    for (own, parameter), full in zip(model.named_parameters(), names(), strict=True):
        layer = int(own.split(".")[0])
        part = "bias" if own.endswith("bias") else "first" if layer < 6 else "last" if layer == 15 else "rest"
        assert full.split(".")[1] == own.split(".")[1]
        parts[part].append(parameter)
    optimizer = getattr(torch.optim, name)(
        [
            {"params": parts["rest"]},
            {"params": parts["bias"], "weight_decay": 0.0},
            {"params": parts["first"], "lr": 0.01, "weight_decay": 0.3},
            {"params": parts["last"], "lr": 0.2},
        ],
        lr=lr,
        **options,
    )
    rate = make_rate(1.0, SCHEDULE, STEPS)
    schedule, losses = torch.optim.lr_scheduler.LambdaLR(optimizer, rate), []
    for x, y in case().data:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        if clipping:
            nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses, dict(zip(names(), (p.detach() for p in model.parameters()), strict=True))


def names():
    return list(dict.fromkeys(n for per_layer in case().traced.names for n in per_layer.values()))


@pytest.mark.parametrize("clipping", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("degrees", "place", "replicas"),
    [
        ((3, 0, 0), own_ranks, 1),
        ((0, 2, 1), own_ranks, 1),
        ((2, 0, 2), shared_ranks, 1),
        ((2, 1, 3), overlapping_ranks, 1),
        ((2, 0, 2), shared_ranks, 2),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_groups_with_schedule_and_clipping(degrees, place, replicas, kind, clipping):
    config, (losses, parameters) = config_of(kind), reference(kind, clipping)
    plan = plan_of(*shape(*degrees, place), replicas=replicas, recipe=Recipe(clipping=clipping), bucket_bytes=1)

    def body(rank, communicators):
        max_norm, rate = MAX_NORM if clipping else None, make_rate(config.lr, config.schedule, STEPS)
        job = job_of(config, plan, rank, communicators, max_norm=max_norm, rate=rate)
        return [job.step(batch) for batch in case().data], list(job.parameters.values())

    results = run_ranks(plan, body)
    for own, _ in results:
        assert own == pytest.approx(losses, rel=1e-10)
    trained = assemble([owned for _, owned in results[: plan.replica_world]])
    assert trained.keys() == parameters.keys()
    for name, expected in parameters.items():
        assert near(trained[name], expected), name


def test_groups_matter():
    """The options that the tests compare under leave traces."""
    lr, options = KINDS["SGD"]
    groups = OptimizerConfig("SGD", lr, options, groups=GROUPS)
    assert alone(groups) != pytest.approx(alone(OptimizerConfig("SGD", lr, options)), rel=1e-5)


def job_of(config, plan, rank, communicators, **options):
    parts, factory = case(), make_factory(config)
    groups = config.parameter_groups
    return Job(
        plan, parts.traced, parts.source, factory, communicators, rank=rank, seed=SEED, groups=groups, **options
    )


def alone(config):
    """The last loss of a plan of one rank."""
    plan = plan_of(*shape(1, 0, 0, own_ranks))

    def body(rank, communicators):
        job = job_of(config, plan, rank, communicators)
        return [job.step(batch) for batch in case().data][-1]

    return run_ranks(plan, body)[0]


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (
            ({"match": "feature.*", "lr": 1},),
            r"feature\.\* matches no parameter of small, whose first ones are 0\.",
        ),
        (
            ({"match": "*", "lr": 1}, {"match": "0.*", "lr": 1}),
            r"all that 0\.\* matches belongs to earlier groups",
        ),
    ],
)
def test_groups_without_parameters_are_refused(groups, message):
    with pytest.raises(ConfigError, match=message):
        alone(OptimizerConfig("SGD", 0.1, groups=groups))


def test_an_option_that_the_users_optimizer_lacks_is_refused():
    plan = plan_of(*shape(1, 0, 0, own_ranks))
    groups = [ParameterGroup("*.bias", {"weight_decays": 0})]

    def body(rank, communicators):
        Job(
            plan,
            case().traced,
            case().source,
            lambda p: torch.optim.SGD(p, lr=0.1),
            communicators,
            rank=rank,
            groups=groups,
        )

    with pytest.raises(ConfigError, match=r"weight_decays, which SGD lacks; did you mean weight_decay"):
        run_ranks(plan, body)
