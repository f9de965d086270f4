"""A verification passes where a plan equals a single process, and names the layer where it does not."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from hybridpar.errors import DivergenceError
from hybridpar.model.deferred import defer
from hybridpar.model.trace import trace
from hybridpar.optimizer_section import OptimizerConfig
from hybridpar.planning.plan import Recipe, Segment, Stage
from hybridpar.runtime.ledger import Ledger
from hybridpar.runtime.verify import slack_of
from tests.support.plans import make_plan
from tests.support.training import Case, make_case
from tests.support.verifying import TOLERANCE, verified

LAYERS = 16
THREE_STAGES = (
    Stage("front", 2, (Segment((0, 4), (0, 1), (2.0, 1.0)),)),
    Stage("middle", 3, (Segment((4, 9), (2,)),)),
    Stage("tail", 5, (Segment((9, LAYERS), (1, 0)),), ("column", "row", "column")),
)


def three_stages(case, **fields):
    stages = [replace(s, recompute=fields.pop(f"recompute_{s.kind}", False)) for s in THREE_STAGES]
    world = 3 * fields.get("replicas", 1)
    return make_plan(case.traced.chain, *stages, world=world, global_batch=13, bucket_bytes=500, **fields)


@pytest.mark.parametrize("clipping", [False, True])
@pytest.mark.parametrize("replicas", [1, 2])
def test_a_plan_that_is_right_agrees(clipping, replicas):
    """Dropout, uneven shares, sharded linears, recomputation, a partial second step."""
    case = make_case(dropout=0.4, samples=(13, 7), max_norm=0.3)
    fields = {"recompute_front": True, "recompute_tail": True}
    ledger = verified(case, three_stages(case, replicas=replicas, recipe=Recipe(clipping=clipping), **fields))
    assert ledger.first is None
    assert set(ledger.counts) == {"output", "loss", "gradient", "parameter"}
    assert ledger.counts["loss"] == 2
    assert ledger.counts["parameter"] == ledger.counts["gradient"] > 2 * 12
    assert all(worst.error < TOLERANCE for worst in ledger.worst.values())


@pytest.mark.parametrize("sharding", ["zero1", "zero2"])
@pytest.mark.parametrize("replicas", [1, 2])
def test_sharded_gradients_are_compared_run_by_run(replicas, sharding):
    """They once were not, so that with Adam, whose updates are all of one size, nothing was left to compare."""
    case = make_case(dropout=0.4, samples=(13, 7), max_norm=0.3)
    plan = three_stages(case, replicas=replicas, recipe=Recipe(clipping=True))
    plan = replace(plan, recipe=replace(plan.recipe, sharding=sharding))
    ledger = verified(case, plan)
    assert ledger.first is None
    assert ledger.worst["gradient"].error < TOLERANCE
    assert ledger.counts["gradient"] > 2 * len(list(case.source.module.parameters()))

    def spoil(job):
        engine = job._updater.engines[0]
        engine.step = lambda step=engine.step: (engine.parts[0].mul_(1.001), step())

    assert verified(case, plan, {0: spoil}).first.what == "gradient"


def test_what_two_updates_may_be_apart_follows_the_largest_rate():
    """A group's own rate was once left out."""
    groups = ({"match": "*.bias", "lr": 0.5}, {"match": "0.*", "lr": 0.001})
    assert slack_of(OptimizerConfig("AdamW", 0.01, groups=groups)) == 1.0
    assert slack_of(OptimizerConfig("AdamW", 0.01, groups=groups[1:])) == 0.02
    assert slack_of(OptimizerConfig("SGD", 0.01)) == 0.0


def layer(case, index):
    return case.traced.chain.layers[index].name


def module(job, index):
    for modules in job.blocks.values():
        first, last = modules.block.layers
        if first <= index < last:
            return modules.layers[index - first]
    raise AssertionError(f"layer {index} is not on rank {job.rank}")


def perturb_weight(index):
    def spoil(job):
        with torch.no_grad():
            next(iter(module(job, index).parameters())).view(-1)[0] += 1e-6

    return spoil


@pytest.mark.parametrize(("rank", "index"), [(0, 3), (1, 0), (2, 5), (0, 9), (1, 12), (0, 15)])
def test_a_perturbed_weight_on_one_rank_names_the_layer(rank, index):
    """On a replica of the front, in the middle, and in column- and row-sharded layers."""
    case = make_case(samples=(13, 13))
    found = verified(case, three_stages(case), {rank: perturb_weight(index)}).first
    assert (found.step, found.what, found.layer) == (0, "output", layer(case, index))
    summed = case.traced.chain.layers[index].linear and index == 12
    assert ("all shards together" if summed else f"rank {rank},") in found.place
    assert found.actual != found.expected
    assert 1e-9 < found.error < 1e-4
    assert f"output of {found.layer}" in str(found)


def test_a_gradient_that_one_rank_gets_wrong_names_the_last_such_layer():
    case = make_case(samples=(13, 13))

    def spoil(job):
        for index in (0, 3):
            module(job, index).weight.register_hook(lambda g: g * 1.001)

    found = verified(case, three_stages(case), {1: spoil}).first
    assert (found.step, found.what, found.layer) == (0, "gradient", layer(case, 3))
    assert "rank 0, 3.weight" in found.place


def test_an_update_that_is_not_the_optimizer_s_is_found():
    case = make_case(samples=(13, 13))
    found = verified(case, three_stages(case), {2: lambda job: set_rate(job, 0.06)}).first
    assert (found.step, found.what, found.layer) == (0, "parameter", layer(case, 5))
    assert found.place == "rank 2, 5.weight"


def set_rate(job, rate):
    job.rate = lambda _: rate


@torch.fx.wrap
def mix(x):
    """Give each sample a share of the one behind it: an influence that tracing does not see."""
    return x + 0.1 * torch.cat([x[1:], x[-1:]])


class Mixer(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 5), nn.Linear(5, 7)

    def forward(self, x):
        return self.last(mix(self.first(x)))


def case_with(builder, samples=(12, 12)):
    source = defer(builder)
    return Case(source, trace(source.module, (6,), builder.__name__), len(samples), samples)


def test_a_layer_that_mixes_samples_is_named():
    case = case_with(Mixer)
    segment = Segment((0, len(case.traced.chain.layers)), (0, 1))
    plan = make_plan(case.traced.chain, Stage("front", 3, (segment,)), world=2, global_batch=12)
    found = verified(case, plan).first
    assert (found.what, found.layer) == ("output", "mix")


def normalised():
    return nn.Sequential(
        nn.Linear(6, 11),
        nn.BatchNorm1d(11),
        nn.ReLU(),
        nn.Linear(11, 9),
        nn.BatchNorm1d(9, momentum=None),
        nn.Linear(9, 7),
    )


def normalised_plan(case, replicas=1):
    segments = Segment((0, 2), (0, 1)), Segment((2, 6), (1,))
    front, middle = Stage("front", 3, segments[:1], recompute=True), Stage("middle", 4, segments[1:])
    chain = case.traced.chain
    return make_plan(chain, front, middle, world=2 * replicas, global_batch=12 * replicas, replicas=replicas)


@pytest.mark.parametrize("replicas", [1, 2])
def test_batch_norm_agrees_micro_batch_by_micro_batch(replicas):
    case = case_with(normalised, (12 * replicas,) * 2)
    ledger = verified(case, normalised_plan(case, replicas))
    assert ledger.first is None
    assert ledger.counts["statistics"] == 2 * 3 * 3 * replicas


def test_wrong_running_statistics_are_found():
    case = case_with(normalised)

    def spoil(job):
        module(job, 1).running_var += 1e-6

    found = verified(case, normalised_plan(case), {1: spoil}).first
    assert (found.what, found.layer, found.place) == ("statistics", "1", "rank 1, running_var")


def test_what_no_rank_computes_diverges():
    ledger = Ledger(1.0)
    ledger.missing(0, "output", "fc", "sample 3")
    assert ledger.first.diverges


def test_numbers_that_are_not_finite_diverge():
    for actual in (float("nan"), float("inf")):
        ledger = Ledger(1.0)
        ledger.compare(0, "output", "fc", "rank 0", (torch.tensor([0.0, actual]), torch.ones(2)), 1.0)
        assert ledger.first.diverges
    with pytest.raises(DivergenceError, match="output of fc is not finite in a single process at step 0"):
        ledger.compare(0, "output", "fc", "rank 0", (torch.ones(1), torch.tensor([torch.nan])), 1.0)
