"""A loss that is not finite is traced to the stage, the layer and the micro-batch where it arose."""

import math

import pytest
import torch
from torch import nn

from hybridpar.model.deferred import defer
from hybridpar.model.trace import trace
from hybridpar.planning.plan import Segment, Stage
from hybridpar.runtime.origin import Watch
from tests.support.plans import make_plan
from tests.support.threads import run_ranks
from tests.support.training import Case, make_case
from tests.support.verifying import make_job, own_batch

LAYERS = 16


def plan_of(case, *, recompute=False):
    return make_plan(
        case.traced.chain,
        Stage("front", 2, (Segment((0, 4), (0, 1)),), recompute=recompute),
        Stage("middle", 3, (Segment((4, 9), (2,)),), recompute=recompute),
        Stage("tail", 5, (Segment((9, LAYERS), (1, 0)),), ("column", "row", "column"), recompute=recompute),
        world=3,
        global_batch=13,
        bucket_bytes=500,
    )


def origin_of(case, plan, spoil=lambda _: None, *, mode="train"):
    """Run a step on all ranks: the losses, and the first of the origins that the ranks saw."""

    def body(rank, communicators):
        job = make_job(case, plan, rank, communicators)
        spoil(job)
        x, y = case.data[0]
        if mode == "evaluate":
            return job.evaluate([(x, y)] * 2).loss, job.origin
        return job.step(own_batch(job, x, y, 0)), job.origin

    results = run_ranks(plan, body)
    losses = {str(loss) for loss, _ in results}
    assert len(losses) == 1, "all ranks have one loss"
    return losses.pop(), min((o for _, o in results if o is not None), default=None)


def spoil_weight(index, value=float("nan")):
    def spoil(job):
        for modules in job.blocks.values():
            first, last = modules.block.layers
            if first <= index < last:
                with torch.no_grad():
                    modules.layers[index - first].weight.view(-1)[0] = value

    return spoil


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    ("index", "stage"), [(3, "front"), (5, "middle.0"), (9, "tail"), (12, "tail"), (15, "tail")]
)
def test_weights_that_are_not_finite_are_named(index, stage, recompute):
    case = make_case(dropout=0.4, samples=(13,))
    loss, origin = origin_of(case, plan_of(case, recompute=recompute), spoil_weight(index))
    assert loss == "nan"
    assert (origin.layer, origin.stage, origin.name) == (index, stage, str(index))
    assert (origin.micro_batch, origin.samples[0], origin.weights) == (0, 0, True)
    assert f"layer {index} of {stage}, micro-batch 0 (samples 0.." in str(origin)


@pytest.mark.parametrize("sample", [0, 7, 12])
def test_input_data_that_is_not_finite_is_named(sample):
    case = make_case(samples=(13,))
    case.data[0][0][sample, 1, 2, 3] = math.inf
    _, origin = origin_of(case, plan_of(case))
    assert (origin.layer, origin.stage) == (-1, "front")
    assert origin.samples[0] <= sample < origin.samples[1]
    assert str(origin).startswith(f"the input data of front, micro-batch {origin.micro_batch} (samples")


@torch.fx.wrap
def burst(x):
    """Overflow on one sample only, the one with the largest first feature."""
    return torch.where((x[:, :1] > THRESHOLD), x * math.inf, x)


THRESHOLD = 1e3


class Bursting(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 5), nn.Linear(5, 7)

    def forward(self, x):
        return self.last(burst(self.first(x)))


@pytest.mark.parametrize("mode", ["train", "evaluate"])
@pytest.mark.parametrize("sample", [1, 6, 11])
def test_a_layer_without_weights_and_its_micro_batch_are_named(sample, mode):
    source = defer(Bursting)
    case = Case(source, trace(source.module, (6,), "bursting"), 1, (12,))
    case.data[0][0][sample] *= 1e6
    segments = Segment((0, 1), (0, 1)), Segment((1, 3), (1,))
    plan = make_plan(
        case.traced.chain,
        Stage("front", 2, segments[:1]),
        Stage("middle", 4, segments[1:]),
        world=2,
        global_batch=12,
    )
    with torch.no_grad():
        sign = make_first_feature(case, sample)
    case.data[0][0][sample] *= sign
    loss, origin = origin_of(case, plan, mode=mode)
    assert not math.isfinite(float(loss))
    assert (origin.stage, origin.rank, origin.micro_batch) == ("middle.0", 1, sample // 4)
    assert case.traced.chain.layers[origin.layer].name == "burst"
    assert not origin.weights


def make_first_feature(case, sample):
    """The sign that makes the first feature of a sample large and positive."""
    weight = case.source.materialize("first.weight", 7, case.dtype)
    return torch.sign(case.data[0][0][sample] @ weight[0])


def test_a_finite_step_has_no_origin():
    case = make_case(samples=(13,))
    assert origin_of(case, plan_of(case))[1] is None


def test_a_sum_that_overflows_is_no_origin():
    """Only values count: the sum is a first sign."""
    case = make_case(samples=(13,))
    plan = plan_of(case)

    def body(rank, communicators):
        job = make_job(case, plan, rank, communicators)
        modules = next(iter(job.blocks.values()))
        watch = Watch(rank)
        x = torch.zeros(2, *job.chain.layers[modules.block.layers[0]].in_shape, dtype=torch.float64)
        large = torch.full((2, 3), 1e308, dtype=torch.float64)
        watch.see(job.program(), modules, 0, (0, 2), (x, large), None)
        return watch.origin

    assert run_ranks(plan, body)[0] is None
