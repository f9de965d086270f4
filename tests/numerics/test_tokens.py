"""A model with logits for every token trains as in a single process: embedding, blocks, head, in stages."""

import itertools
from dataclasses import replace
from functools import cache, partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hybridpar.data.datasets import load
from hybridpar.data.samples import MapSamples
from hybridpar.data.spec import DataSpec
from hybridpar.errors import DataError
from hybridpar.model.deferred import defer
from hybridpar.model.linear import CosineLinear
from hybridpar.model.trace import trace
from hybridpar.models.gpt import Block
from hybridpar.planning.compile import compile as compile_program
from hybridpar.planning.plan import Recipe, Segment, Stage
from hybridpar.runtime.cross_entropy import CrossEntropy
from hybridpar.runtime.margin import CosFace
from hybridpar.runtime.own_loss import OwnLoss
from hybridpar.runtime.own_metric import OwnMetric, OwnMetrics
from tests.support.counting import (
    assert_execution_is_the_program,
)
from tests.support.parity import assert_same
from tests.support.plans import make_plan
from tests.support.threads import run_ranks
from tests.support.training import (
    Case,
    make_executor,
    per_token,
    run_step,
    small_gpt,
    train_single,
    whole_model,
)

TOKENS, CLASSES, WIDTH, BATCH, STEPS = 5, 11, 8, 9, 4
WEIGHTS = tuple(0.5 + 0.25 * c for c in range(CLASSES))
IGNORED = -100


@cache
def small():
    source = defer(small_gpt)
    return source, trace(source.module, (TOKENS,), "gpt", "int")


def case_with(loss, criterion, samples=(BATCH,) * STEPS):
    """Labels of which some are ignored, unevenly over samples; the first sample of the last step has none else."""
    case = Case(*small(), len(samples), samples, loss=loss, criterion=partial(per_token, criterion))
    for _, y in case.data:
        y[::2, 3:] = IGNORED
    case.data[-1][1][0] = IGNORED
    return case


@cache
def cross_entropy(smoothing=0.0, weights=None):
    weight = None if weights is None else torch.tensor(weights, dtype=torch.float64)
    criterion = partial(F.cross_entropy, weight=weight, label_smoothing=smoothing)
    case = case_with(CrossEntropy(smoothing, weights), criterion)
    return case, train_single(case)


def plan_of(*stages, chain=None, **fields):
    chain = chain or small()[1].chain
    world = (1 + max(r for s in stages for r in s.ranks)) * fields.get("replicas", 1)
    return make_plan(chain, *stages, world=world, global_batch=BATCH, **fields)


LAYERS, HEAD = 5, 4


def front(stop, ranks, weights=None, size=2):
    return Stage("front", size, (Segment((0, stop), ranks, weights),))


def middle(start, *segments, size=3):
    made, at = [], start
    for stop, ranks in segments:
        made.append(Segment((at, stop), ranks))
        at = stop
    return Stage("middle", size, tuple(made))


def tail(ranks, weights=None, size=4, ways=("column",)):
    return Stage("tail", size, (Segment((HEAD, LAYERS), ranks, weights),), ways if len(ranks) > 1 else ())


WHOLE = {
    "one rank": (front(LAYERS, (0,)),),
    "front": (front(LAYERS, (0, 1, 2), (2.0, 1.0, 1.0)),),
    "pipeline": (middle(0, (2, (0,)), (LAYERS, (1,))),),
    "three stages": (front(2, (0, 1)), middle(2, (4, (2,))), tail((3,))),
}
"""Plans in which no layer is sharded."""
SHARDED = {
    "own ranks": (front(2, (0, 1)), middle(2, (3, (2,)), (4, (3,))), tail((4, 5))),
    "shared ranks": (front(3, (0, 1, 2), (2.0, 1.0, 1.0)), middle(3, (4, (1,))), tail((2, 0, 1), (1.0, 2.0, 1.5))),
    "overlapping ranks": (front(1, (0, 1)), middle(1, (4, (2, 1))), tail((1, 2, 3), (2.0, 1.0, 1.0), size=7)),
    "rows": (front(4, (0, 1, 2)), tail((0, 1, 2), (1.0, 1.0, 2.0), ways=("row",))),
    "rows behind a pipeline": (middle(0, (2, (0,)), (4, (1,))), tail((2, 0), size=5, ways=("row",))),
    "one sample at a time": (front(4, (0, 1), size=1), tail((0, 1), size=1, ways=("row",))),
}
"""Plans whose head is cut: no rank has all classes."""
PLANS = WHOLE | SHARDED


@pytest.mark.parametrize("stages", PLANS.values(), ids=PLANS.keys())
def test_loss_per_token_is_torchs(stages):
    assert_same(plan_of(*stages, bucket_bytes=1), *cross_entropy(0.2, WEIGHTS))


def assert_runs(stages, case):
    assert_execution_is_the_program(case, plan_of(*stages, chain=case.traced.chain, bucket_bytes=1), BATCH)


@pytest.mark.parametrize("stages", PLANS.values(), ids=PLANS.keys())
def test_execution_is_the_program(stages):
    assert_runs(stages, cross_entropy()[0])


@pytest.mark.parametrize("recompute", [False, True])
def test_plan_replicas_clipping_and_recomputation(recompute):
    case = replace(cross_entropy()[0], max_norm=0.1)
    stages = [replace(s, recompute=recompute) for s in SHARDED["rows"]]
    plan = plan_of(*stages, replicas=2, recipe=Recipe(clipping=True))
    assert_same(plan, case, train_single(case), gloo=recompute)


# Linears in a tail of their own, with the features last


HIDDEN = 14


def with_linears():
    """Block, then linears with what works on each element between them, over (tokens, features)."""
    return nn.Sequential(
        nn.Embedding(CLASSES, WIDTH),
        Block(WIDTH, 2, 0.2),
        nn.GELU(),
        nn.Linear(WIDTH, HIDDEN),
        nn.Dropout(0.4),
        nn.GELU(),
        nn.Linear(HIDDEN, WIDTH),
        nn.Dropout(0.4),
        nn.Linear(WIDTH, CLASSES),
    )


@cache
def linears():
    source = defer(with_linears)
    made = trace(source.module, (TOKENS,), "linears", "int")
    criterion = partial(per_token, F.cross_entropy)
    case = Case(source, made, 3, (BATCH,) * 3, criterion=criterion)
    return case, train_single(case)


def sharded_linears(start, ways, weights):
    ranks = tuple(range(len(weights)))
    segment = Segment((start, len(linears()[0].traced.chain.layers)), ranks, weights)
    return front(start, ranks[::-1]), Stage("tail", 4, (segment,), ways)


@pytest.mark.parametrize("ways", list(itertools.product(("column", "row"), repeat=3)), ids="-".join)
def test_every_sharding_of_linears_over_tokens(ways):
    case, single = linears()
    first = case.traced.chain.tail_start
    stages = sharded_linears(first + (ways[0] == ways[1]), ways, (1.0, 2.0, 1.0)[: 2 + (ways[2] == "row")])
    assert_same(plan_of(*stages, chain=case.traced.chain), case, single, gloo=ways[1] == "row")
    assert_runs(stages, case)


def test_a_model_that_is_all_tail_reads_features_of_tokens():
    """Where it begins with rows, every shard reads its features of each token."""
    source = defer(lambda: nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, CLASSES)))
    made = trace(source.module, (TOKENS, WIDTH), "all tail")
    case = Case(source, made, 3, (BATCH,) * 3, criterion=partial(per_token, F.cross_entropy))
    stage = Stage("tail", 4, (Segment((0, 3), (1, 0), (2.0, 1.0)),), ("row", "column"))
    assert_same(plan_of(stage, chain=made.chain), case, train_single(case))


def cosines():
    return nn.Sequential(nn.Embedding(CLASSES, WIDTH), Block(WIDTH, 2, 0.2), CosineLinear(WIDTH, CLASSES))


def cosface(logits, labels):
    return F.cross_entropy((logits - F.one_hot(labels, CLASSES).double() * 0.3) * 8, labels)


def test_a_margin_on_cosines_of_every_token():
    source = defer(cosines)
    made = trace(source.module, (TOKENS,), "cosines", "int")
    loss = CrossEntropy(margin=CosFace(8.0, 0.3))
    case = Case(source, made, 3, (BATCH,) * 3, loss=loss, criterion=partial(per_token, cosface))
    start = made.chain.tail_start
    assert start == len(made.chain.layers) - 1
    stages = front(start, (1, 0)), Stage("tail", 4, (Segment((start, start + 1), (0, 1, 2)),), ("column",))
    assert_same(plan_of(*stages, chain=made.chain), case, train_single(case))
    assert_runs(stages, case)


def test_features_lie_where_layers_have_them():
    chain = linears()[0].traced.chain
    assert [layer.linear is not None for layer in chain.layers] == [i in {4, 7, 9} for i in range(10)]
    assert chain.axes == (0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1)
    assert chain.tail_start == 3


def test_a_flatten_behind_a_linear_over_tokens_ends_the_tail():
    """It would mix up slices of the tokens' features."""
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Flatten(), nn.Linear(TOKENS * WIDTH, CLASSES))
    chain = trace(model, (TOKENS, WIDTH), "flat").chain
    assert (chain.tail_start, chain.label_shape, chain.classes) == (1, (), CLASSES)
    assert chain.axes == (1, 0, 0, 0, 0)


def evaluated(stages, loss=None, metrics=None):
    """Figures of every rank, and logits with counting labels of a single process."""
    case, _ = cross_entropy(0.2, WEIGHTS)
    case = case if loss is None else replace(case, loss=loss)
    plan = plan_of(*stages)
    program = compile_program(plan, case.traced.chain, BATCH, "evaluate")
    own = [OwnMetrics(metrics or {}, case.traced.chain) for _ in range(plan.world)]

    def body(rank, groups):
        executor = make_executor(case, plan, rank, groups)
        executor.own = own[rank]
        own[rank].begin(torch.device("cpu"))
        return run_step(case, program, rank, executor)

    results = run_ranks(plan, body)
    with torch.no_grad():
        logits, labels = whole_model(case).eval()(case.data[0][0]), case.data[0][1]
    return results, sum(m.total for m in own), logits, labels


def assert_evaluation_is_torchs(stages):
    results, total, logits, labels = evaluated(stages, metrics={"first": OwnMetric(found, of="best")})
    counted = labels != IGNORED
    hits = (logits.topk(5).indices == labels[..., None])[counted]
    weights = torch.tensor(WEIGHTS, dtype=torch.float64)
    expected = per_token(partial(F.cross_entropy, weight=weights, label_smoothing=0.2), logits, labels)
    for m in results:
        assert m.loss == pytest.approx(expected.item(), rel=1e-12)
        assert (m.samples, m.top1, m.top5) == (counted.sum(), hits[:, 0].sum(), hits.any(1).sum())
        assert m.weight == pytest.approx(weights[labels[counted]].sum().item())
    assert total == hits[:, 0].sum()


def found(best, labels):
    return (best[:, 0] == labels).sum()


@pytest.mark.parametrize("stages", PLANS.values(), ids=PLANS.keys())
def test_evaluation_counts_tokens(stages):
    assert_evaluation_is_torchs(stages)


def test_an_own_loss_sees_whole_sequences():
    """A loss over neighbouring tokens: it needs (samples, tokens, classes)."""

    def smooth(logits, labels):
        assert logits.shape == (*labels.shape, CLASSES)
        return (logits[:, 1:] - logits[:, :-1]).square().sum() + logits.square().sum()

    stages = WHOLE["three stages"]
    case = replace(case_with(None, None), loss=OwnLoss(smooth))
    case.criterion = lambda logits, labels: smooth(logits, labels) / (labels != IGNORED).sum()
    assert_same(plan_of(*stages), case, train_single(case))
    results, total, logits, labels = evaluated(stages, OwnLoss(smooth), {"spread": spread})
    counted = labels != IGNORED
    for m in results:
        assert m.loss == pytest.approx((smooth(logits, labels) / counted.sum()).item(), rel=1e-12)
        assert m.top1 == (logits.argmax(2) == labels)[counted].sum()
    assert total == pytest.approx(spread(logits[counted], labels[counted]).item())


def spread(logits, labels):
    assert logits.shape == (len(labels), CLASSES)
    return (logits.max(1).values - logits.min(1).values).sum()


class Sentences:
    """A data set whose samples are (tokens, labels)."""

    def __init__(self, labels):
        self.labels = labels

    def __len__(self):
        return 3

    def __getitem__(self, index):
        return torch.full((TOKENS,), index), self.labels


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (torch.zeros(TOKENS), r"labels of shape \(5,\) in torch.float32, .* \(5,\) labels"),
        (torch.zeros(TOKENS - 1, dtype=torch.int64), r"labels of shape \(4,\)"),
        (0, r"labels of shape \(\)"),
        (torch.full((TOKENS,), CLASSES), r"has label 11 \(5 of 5 labels"),
    ],
)
def test_labels_that_do_not_fit_the_tokens_are_refused(labels, said):
    samples = MapSamples(Sentences(labels), (TOKENS,), CLASSES, label_shape=(TOKENS,))
    with pytest.raises(DataError, match=said):
        samples.read(np.arange(1), np.arange(1, dtype=np.uint64))


def test_a_data_set_with_one_label_per_sample_is_refused():
    with pytest.raises(DataError, match=r"digits has one label per sample, .* \(5,\) labels; .* custom"):
        load(DataSpec("digits"), (TOKENS,), CLASSES, label_shape=(TOKENS,))


def test_labels_are_read_with_their_tokens():
    samples = MapSamples(Sentences(torch.arange(TOKENS)), (TOKENS,), CLASSES, label_shape=(TOKENS,))
    tokens, labels = samples.read(np.arange(2), np.arange(2, dtype=np.uint64))
    assert (tokens.shape, labels.tolist()) == ((2, TOKENS), [list(range(TOKENS))] * 2)
