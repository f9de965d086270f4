"""Losses under a plan equal those of a single process: smoothing, class weights, ignored labels, own functions."""

import json
from dataclasses import replace
from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F

from hybridpar.errors import ConfigError, DataError, PlanError
from hybridpar.model.deferred import defer
from hybridpar.model.trace import trace
from hybridpar.planning.compile import compile as compile_program
from hybridpar.runtime.cross_entropy import CrossEntropy, make_loss
from hybridpar.runtime.loss import Logits
from hybridpar.runtime.own_loss import OwnLoss
from hybridpar.sections import LossConfig
from tests.support.parity import (
    BATCH,
    assert_same,
    overlapping_ranks,
    own_ranks,
    plan_of,
    shape,
    shared_ranks,
    train,
)
from tests.support.threads import run_ranks
from tests.support.training import Case, make_executor, run_step, small_vgg, train_single, whole_model

STEPS, CLASSES = 5, 7
WEIGHTS = (0.5, 2.0, 0.0, 1.25, 3.0, 0.7, 1.0)
PLANS = {
    "front": (3, 0, 0),
    "pipeline": (0, 2, 1),
    "pipeline, sharded tail": (0, 2, 2),
    "front and tail": (2, 0, 3),
    "three stages": (2, 1, 2),
    "three stages, whole tail": (2, 1, 1),
}


@cache
def small():
    source = defer(small_vgg)
    return source, trace(source.module, (2, 6, 6), "small")


def case_with(loss, criterion, ignored=None, samples=(BATCH,) * STEPS):
    """Labels of which some are ``ignored``, unevenly over the micro-batches; in the last step all but one."""
    case = Case(*small(), len(samples), samples, loss=loss, criterion=criterion)
    for step, (_, y) in enumerate(case.data):
        if ignored is not None:
            y[1:] = ignored if step == len(samples) - 1 else torch.where(torch.arange(len(y)) < 5, ignored, y)[1:]
    return case


@cache
def cross_entropy(smoothing, weights, ignored):
    """A case and what a single process makes of it."""
    weight = None if weights is None else torch.tensor(weights, dtype=torch.float64)
    index = -100 if ignored is None else ignored
    criterion = partial(F.cross_entropy, weight=weight, ignore_index=index, label_smoothing=smoothing)
    case = case_with(CrossEntropy(smoothing, weights, index), criterion, ignored)
    return case, train_single(case)


@pytest.mark.parametrize("ignored", [None, -100, 3, 255])
@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["plain", "weighted"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("degrees", PLANS.values(), ids=PLANS.keys())
def test_cross_entropy_is_torchs(degrees, smoothing, weights, ignored):
    number = sum(degrees) + 2 * (ignored is None)
    place = (own_ranks, shared_ranks, overlapping_ranks)[number % 3]
    ways = (("column", "row", "column"), ("row", "column", "row"))[number % 2]
    stages = shape(*degrees, place, uneven=number % 2 == 1, ways=ways)
    assert_same(plan_of(*stages, bucket_bytes=1), *cross_entropy(smoothing, weights, ignored))


@pytest.mark.parametrize("gloo", [False, True])
@pytest.mark.parametrize("degrees", [(2, 0, 2), (1, 1, 2), (2, 0, 0)], ids=str)
def test_cross_entropy_over_plan_replicas(degrees, gloo):
    """The weight of the step is that of all replicas, of which one may have ignored labels only."""
    plan = plan_of(*shape(*degrees, shared_ranks), replicas=2)
    assert_same(plan, *cross_entropy(0.2, WEIGHTS, 3), gloo=gloo)


@pytest.mark.parametrize("degrees", [(2, 0, 2), (2, 1, 2)], ids=str)
def test_last_partial_batches(degrees):
    criterion = partial(F.cross_entropy, weight=torch.tensor(WEIGHTS, dtype=torch.float64), label_smoothing=0.3)
    case = case_with(CrossEntropy(0.3, WEIGHTS), criterion, samples=(BATCH, 5, BATCH, 1))
    case.data[-1][1].fill_(1)  # a class that has a weight
    assert_same(plan_of(*shape(*degrees, overlapping_ranks)), case, train_single(case))


@pytest.mark.parametrize("degrees", PLANS.values(), ids=PLANS.keys())
def test_evaluation_weighs_and_ignores_as_torch_does(degrees):
    case, _ = cross_entropy(0.2, WEIGHTS, 3)
    plan = plan_of(*shape(*degrees, own_ranks))
    program = compile_program(plan, case.traced.chain, BATCH, "evaluate")
    x, y = case.data[0]
    with torch.no_grad():
        logits = whole_model(case).eval()(x)
    counted = y != 3
    best = (logits.argmax(1) == y)[counted].sum().item()
    five = (logits.topk(5).indices == y[:, None])[counted].any(1).sum().item()
    for m in run_ranks(plan, lambda r, c: run_step(case, program, r, make_executor(case, plan, r, c))):
        assert m.loss == pytest.approx(case.criterion(logits, y).item(), rel=1e-12)
        assert (m.samples, m.top1, m.top5) == (counted.sum(), best, five)
        assert m.weight == pytest.approx(torch.tensor(WEIGHTS, dtype=torch.float64)[y][counted].sum().item())


def test_no_label_that_counts_is_an_error_on_every_rank_and_no_gradient():
    case = case_with(CrossEntropy(0.1), F.cross_entropy, samples=(BATCH,))
    case.data[0][1].fill_(-100)
    plan = plan_of(*shape(2, 1, 2, own_ranks))
    for metrics, owned in train(case, plan, gloo=False):
        assert all(not o.tensor.grad.any() for o in owned if o.tensor.grad is not None)
        with pytest.raises(DataError, match=r"no sample of the step counts .*loss\.ignore_index"):
            _ = metrics[0].loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_gradients_of_large_logits_stay_finite(dtype, scale):
    logits = scale * torch.randn(6, CLASSES, dtype=dtype)
    labels = torch.tensor([0, 3, 1, -100, 6, 5])
    loss = CrossEntropy(0.1, WEIGHTS)
    parts = ((0, logits[:, :3]), (3, logits[:, 3:]))
    halves = [Logits(own.contiguous(), labels, first, CLASSES) for first, own in parts]
    figures = [loss.score(half, train=True) for half in halves]
    outcomes = [loss.combine(half, figures, loss.weight(labels), train=True) for half in halves]
    leaf = logits.double().requires_grad_()
    F.cross_entropy(leaf, labels, torch.tensor(WEIGHTS, dtype=torch.float64), label_smoothing=0.1).backward()
    assert torch.cat([o.gradient for o in outcomes], 1).double().allclose(leaf.grad, atol=1e-6)


# Own losses


def squared(logits, labels):
    """Additive: squared distance to the one-hot label."""
    return (logits - F.one_hot(labels, CLASSES)).square().sum()


def pairwise(logits, labels):
    """Not additive: pulls logits of equal labels together."""
    same = (labels[:, None] == labels[None]).to(logits)
    return ((logits[:, None] - logits[None]).square().sum(2) * same).sum() / same.sum() + logits.square().mean()


@pytest.mark.parametrize("degrees", [(3, 0, 0), (0, 2, 1), (2, 0, 1), (2, 1, 1)], ids=str)
def test_an_own_additive_loss(degrees):
    case = case_with(OwnLoss(squared), lambda x, y: squared(x, y) / len(y))
    assert_same(plan_of(*shape(*degrees, overlapping_ranks)), case, train_single(case))


def test_an_own_loss_with_its_own_weight_over_plan_replicas():
    """Focal loss of some classes, divided by how many samples have one of them."""

    def focal(logits, labels):
        each = F.cross_entropy(logits, labels, reduction="none")
        return ((1 - (-each).exp()).square() * each * (labels < 4)).sum()

    def weight(labels):
        return (labels < 4).sum()

    case = case_with(OwnLoss(focal, weight=weight), lambda x, y: focal(x, y) / weight(y))
    assert_same(plan_of(*shape(2, 0, 1, shared_ranks), replicas=2), case, train_single(case))


@pytest.mark.parametrize("degrees", [(0, 2, 1), (2, 0, 1), (2, 1, 1)], ids=str)
def test_a_loss_over_pairs_of_samples(degrees):
    case = case_with(OwnLoss(pairwise, additive=False), pairwise, samples=(BATCH, 6, BATCH))
    stages = shape(*degrees, own_ranks)
    stages[-1] = replace(stages[-1], micro_batch=BATCH)
    plan = plan_of(*stages)
    case.loss.check_plan(plan, case.traced.chain)
    assert_same(plan, case, train_single(case))


@pytest.mark.parametrize(
    ("loss", "degrees", "replicas", "message"),
    [
        (OwnLoss(squared), (2, 0, 2), 1, r"plan\.tail\.degree: 2, .* plan with plan\.tail\.degree=1"),
        (OwnLoss(pairwise, additive=False), (2, 0, 1), 1, r"tail\.micro_batch: 5 .* plan\.tail\.micro_batch=13"),
        (OwnLoss(pairwise, additive=False), (2, 0, 0), 1, r"front\.micro_batch: .* on 2 ranks"),
        (OwnLoss(pairwise, additive=False), (1, 0, 1), 2, r"on 2 ranks, .* plan\.replicas=1"),
        (CrossEntropy(class_weights=[1, 2]), (2, 0, 2), 1, r"class_weights: 2 numbers, .* 7 classes"),
    ],
)
def test_a_loss_that_a_plan_cannot_compute_is_refused(loss, degrees, replicas, message):
    plan = plan_of(*shape(*degrees, shared_ranks), replicas=replicas)
    with pytest.raises((PlanError, ConfigError), match=message):
        loss.check_plan(plan, small()[1].chain)


def test_an_own_loss_that_gives_no_scalar_is_told():
    case = case_with(OwnLoss(lambda logits, _: logits.sum(1)), F.cross_entropy)
    with pytest.raises(ConfigError, match=r"gave Tensor of shape \(\d,\); return a scalar"):
        train(case, plan_of(*shape(1, 0, 0, own_ranks)), gloo=False)


# Configuration


def test_class_weights_from_a_file(tmp_path):
    file = tmp_path / "weights.json"
    file.write_text(json.dumps(WEIGHTS))
    assert make_loss(LossConfig(class_weights=str(file)), CLASSES).class_weights.tolist() == list(WEIGHTS)
    for text, message in (("[1, 2]", "2 numbers"), ("{", "not JSON"), ('["a"]', r"\[0\]: expected float")):
        file.write_text(text)
        with pytest.raises(ConfigError, match=message):
            make_loss(LossConfig(class_weights=str(file)), CLASSES)
    with pytest.raises(ConfigError, match="cannot be read"):
        make_loss(LossConfig(class_weights=str(tmp_path / "none")), CLASSES)


@pytest.mark.parametrize(
    ("name", "value"), [("label_smoothing", 1.0), ("label_smoothing", -0.1), ("class_weights", (1.0, -1.0))]
)
def test_values_out_of_range_are_refused(name, value):
    with pytest.raises(ConfigError, match=rf"loss\.{name}"):
        LossConfig(**{name: value})
    with pytest.raises(ConfigError, match=rf"loss\.{name}"):
        CrossEntropy(**{name: value})
