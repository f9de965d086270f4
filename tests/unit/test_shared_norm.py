"""Batch norms over several ranks: their arithmetic, what a chain says of them, and what is refused."""

from __future__ import annotations

import copy
import io
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from rich.console import Console
from torch import nn

from hybridpar.cluster.describe import local
from hybridpar.config import compose
from hybridpar.errors import ConfigError, ModelError, PlanError
from hybridpar.model.chain import Norm
from hybridpar.model.shared_norm import SharedNorm, combined, moments_of, synchronise
from hybridpar.model.trace import trace
from hybridpar.planner import load_model
from hybridpar.planning.plan import Recipe, validate
from hybridpar.planning.request import Pin, Request
from hybridpar.planning.search import search
from hybridpar.profiling.analytic import estimate
from hybridpar.report.dry_run import show
from tests.support.norms import case_of

SHAPES = {nn.BatchNorm1d: (6, 5), nn.BatchNorm2d: (6, 5, 3, 4), nn.BatchNorm3d: (4, 5, 2, 3, 2)}


def shared(norm: nn.Module) -> SharedNorm:
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(norm))
    assert isinstance(converted, nn.SyncBatchNorm)
    return SharedNorm.of(converted)


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize(
    "options", [{}, {"affine": False}, {"momentum": None}, {"track_running_stats": False}], ids=str
)
def test_without_peers_it_is_torch_s_own(kind: type[nn.BatchNorm2d], options: dict[str, object]) -> None:
    norm = kind(5, **options).double()  # type: ignore[arg-type]
    own, gradients = shared(norm), []
    inputs = [torch.randn(SHAPES[kind], dtype=torch.float64) * 3 + 7 for _ in range(3)]
    for module in (norm, own):
        x = inputs[0].clone().requires_grad_()
        y = module(x)
        for more in inputs[1:]:
            module(more)
        y.backward(inputs[1])
        gradients.append([y, x.grad, *(p.grad for p in module.parameters())])
    values = [*zip(*gradients, strict=True), *zip(norm.buffers(), own.buffers(), strict=True)]
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-12) for a, b in values)
    assert torch.equal(norm.eval()(inputs[2]), norm(inputs[2]))
    assert norm.state_dict().keys() == own.state_dict().keys()


def test_moments_of_parts_combine_without_cancellation() -> None:
    """Values far from zero, in float32; a part without samples is zeros."""
    x = torch.randn(30, 4, 5, generator=torch.Generator().manual_seed(1)) + 3000
    parts = [moments_of(part, torch.float32) for part in x.split((1, 20, 9))]
    mean, second = combined(torch.stack([*parts, torch.zeros(9)]))[:8].view(2, 4)
    exact = x.double()
    assert torch.allclose(mean.double(), exact.mean((0, 2)), rtol=1e-6)
    assert torch.allclose(second.double() / 150, exact.var((0, 2), correction=0), rtol=1e-3)


class Opaque(nn.Module):
    """Cannot be traced: it stays one node, with its norm inside."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x) if float(x.sum()) > -1e9 else x


def test_the_chain_names_norms_in_the_order_of_their_calls() -> None:
    chain = case_of("resnet", (1,)).traced.chain
    assert chain.synchronised
    block = chain.layers[5].norms
    assert [(n.module.split(".", 1)[1], n.channels, n.answers) for n in block] == [
        ("bn1", 6, True),
        ("bn2", 6, True),
        ("down.1", 6, True),
    ]
    plain = case_of("resnet", (1,), synchronised=False).traced.chain
    assert not plain.synchronised
    assert plain.fingerprint != chain.fingerprint
    assert [layer.saved for layer in plain.layers] == [layer.saved for layer in chain.layers]


def test_a_norm_inside_of_what_cannot_be_traced_is_found() -> None:
    model = nn.Sequential(nn.Linear(4, 6), Opaque(), nn.Linear(6, 3))
    synchronise(model)
    norms = [n for layer in trace(model, (4,), "opaque").chain.layers for n in layer.norms]
    assert norms == [Norm("norm", 6, answers=True)]


def test_a_layer_with_both_kinds_is_refused() -> None:
    block = nn.Sequential(*list(case_of("resnet", (1,), synchronised=False).source.module)[3:4])
    block = copy.deepcopy(block)
    block[0].bn1 = nn.SyncBatchNorm.convert_sync_batchnorm(block[0].bn1)
    with pytest.raises(ModelError, match=r"layer 0.* has batch norms of both kinds; make all"):
        trace(block, (4, 6, 6), "mixed")


def test_a_process_group_of_its_own_is_refused() -> None:
    group = dist.ProcessGroupGloo(dist.HashStore(), 0, 1)
    model = nn.Sequential(nn.Linear(4, 6), nn.SyncBatchNorm(6, process_group=group))
    with pytest.raises(ModelError, match="process group of its own"):
        SharedNorm.of(model[1])


def test_a_model_without_batch_norm_is_refused() -> None:
    with pytest.raises(ModelError, match=r"model\.batch_norm: synchronised, but the model has no batch norm"):
        load_model(compose(["model=small_vgg", "model.batch_norm=synchronised"]))


def test_the_configuration_names_two_ways() -> None:
    overrides = ["model=small_vgg", "model.options.batch_norm=true"]
    chains = [
        load_model(compose([*overrides, f"model.batch_norm={way}"]))[0].chain
        for way in ("replica", "synchronised")
    ]
    assert [c.synchronised for c in chains] == [False, True]
    with pytest.raises(ConfigError, match=r"model\.batch_norm"):
        compose([*overrides, "model.batch_norm=both"])


def test_the_planner_prices_what_norms_tell_each_other_and_the_dry_run_names_it() -> None:
    predicted = []
    for synchronised in (False, True):
        chain = case_of("resnet", (1,), synchronised=synchronised).traced.chain
        cluster = local(4)
        profile = estimate(chain, cluster.device, "float64")
        request = Request(32, "data_parallel", "float64", pins={"front": Pin(micro_batch=4)}, replicas=1)
        planned = search(chain, profile, cluster, request)
        assert planned.plan.recipe.synchronised == synchronised
        predicted.append(planned.chosen.prediction)
        text = io.StringIO()
        show(planned, chain, profile, cluster, Console(width=200, file=text))
        assert ("batch norms synchronised" in text.getvalue()) == synchronised
    figures = sum(2 * n.channels + 1 for layer in chain.layers for n in layer.norms)
    chunks = 2
    # Of n ranks each gives its figures to all others, and then sums as many in a ring.
    assert predicted[1].wire_bytes - predicted[0].wire_bytes == chunks * figures * 8 * (4 * 3 + 2 * 3)
    assert predicted[1].step_s > predicted[0].step_s


def test_a_plan_that_says_otherwise_than_its_chain_is_refused() -> None:
    chain = case_of("resnet", (1,)).traced.chain
    cluster = local(2)
    plan = search(chain, estimate(chain, cluster.device, "float64"), cluster, Request(8, precision="float64")).plan
    with pytest.raises(
        PlanError, match=r"recipe\.synchronised: False but the model's batch norms are synchronised"
    ):
        validate(replace(plan, recipe=Recipe()), chain)
