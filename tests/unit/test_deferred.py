"""Deferred weights: each one alone, the same everywhere, from the right distribution."""

import math

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torch.nn.init import orthogonal_, trunc_normal_

from hybridpar.errors import ModelError
from hybridpar.model.chain import DRAWN_ELEMENTS
from hybridpar.model.deferred import Deferred, Part, Rebuilt, defer, ready
from hybridpar.model.stretch import Entry
from hybridpar.model.tape import Tape


class Zoo(nn.Module):
    """One of each way to fill a tensor."""

    def __init__(self):
        super().__init__()
        self.square = nn.Parameter(torch.empty(64, 32))
        orthogonal_(self.square)
        self.doubled = nn.Parameter(self.square.detach().clone() * 2)
        self.tied = self.square
        self.truncated = nn.Parameter(torch.empty(20000))
        trunc_normal_(self.truncated, std=0.02, a=-0.03, b=0.03)
        self.embedding = nn.Embedding(50, 8, padding_idx=3)
        self.random = nn.Parameter(torch.randn(5000, dtype=torch.float64))
        self.register_buffer("literal", torch.tensor([1.5, 2.5]))
        self.register_buffer("positions", torch.arange(4), persistent=False)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(3, 4))
        self.explicit = nn.Parameter(torch.ones(3, device="cpu"))
        self.view = nn.Parameter(torch.zeros(4, 6)[1:3].fill_(7.0))


@pytest.fixture(scope="module")
def zoo():
    source = defer(Zoo)
    assert isinstance(source, Deferred)
    return source


def test_nothing_is_allocated(zoo):
    tensors = [*zoo.module.parameters(), *zoo.module.buffers()]
    assert all(t.is_meta for t in tensors)
    assert zoo.module.tied is zoo.module.square


def test_vgg_starts_as_torchvision_says():
    source = defer(torchvision.models.vgg11_bn)
    weight = source.materialize("features.8.weight", 0)
    assert weight.shape == (256, 128, 3, 3)
    assert weight.std().item() == pytest.approx(math.sqrt(2 / (256 * 9)), rel=0.01)
    assert weight.mean().abs() < 1e-3
    assert source.materialize("classifier.6.weight", 0).std().item() == pytest.approx(0.01, rel=0.01)
    assert not source.materialize("features.8.bias", 0).any()
    assert source.materialize("features.1.running_var", 0).eq(1).all()
    assert source.materialize("features.1.weight", 0).eq(1).all()
    tracked = source.materialize("features.1.num_batches_tracked", 0, torch.float64)
    assert tracked.dtype == torch.int64
    assert tracked.item() == 0


def test_default_uniform_initialisation():
    source = defer(lambda: nn.Linear(400, 300))
    bound = 1 / math.sqrt(400)
    weight = source.materialize("weight", 0)
    assert weight.abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.01)
    assert source.materialize("bias", 0).abs().max() <= bound


def test_values_depend_on_name_and_seed_only(zoo):
    names = [n for n, _ in zoo.module.named_parameters()]
    forwards = {n: zoo.materialize(n, 5) for n in names}
    other = defer(Zoo)
    for name in reversed(names):
        torch.rand(3)
        assert torch.equal(other.materialize(name, 5), forwards[name]), name
    assert not torch.equal(zoo.materialize("random", 6), forwards["random"])


def test_layers_of_one_shape_differ():
    source = defer(lambda: nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
    assert not torch.equal(source.materialize("0.weight", 0), source.materialize("1.weight", 0))


def test_a_value_survives_changes_elsewhere_in_the_model():
    small = defer(lambda: nn.Sequential(nn.Linear(8, 8)))
    large = defer(lambda: nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3)))
    assert torch.equal(small.materialize("0.weight", 0), large.materialize("0.weight", 0))


def test_initialisers_that_depend_on_what_they_draw(zoo):
    square = zoo.materialize("square", 1, torch.float64)
    torch.testing.assert_close(square.T @ square, torch.eye(32, dtype=torch.float64), atol=1e-5, rtol=0)
    truncated = zoo.materialize("truncated", 1)
    assert truncated.abs().max() <= 0.03
    assert truncated.std().item() == pytest.approx(0.02 * 0.7410, rel=0.03)  # of a normal cut at 1.5 sigma


def test_ties_copies_views_and_literals(zoo):
    square = zoo.materialize("square", 1)
    assert torch.equal(zoo.materialize("tied", 1), square)
    assert torch.equal(zoo.materialize("doubled", 1), 2 * square)
    embedding = zoo.materialize("embedding.weight", 1)
    assert not embedding[3].any()
    assert embedding[4].any()
    assert zoo.materialize("literal", 1).tolist() == [1.5, 2.5]
    assert zoo.materialize("positions", 1).tolist() == [0, 1, 2, 3]
    assert zoo.materialize("explicit", 1).tolist() == [1, 1, 1]
    view = zoo.materialize("view", 1)
    assert view.eq(7).all()
    assert view.untyped_storage().nbytes() == 12 * 4
    magnitude = zoo.materialize("normed.parametrizations.weight.original0", 1)
    direction = zoo.materialize("normed.parametrizations.weight.original1", 1)
    torch.testing.assert_close(magnitude, direction.norm(dim=1, keepdim=True))


def test_materialized_tensors_are_independent(zoo):
    zoo.materialize("literal", 1).fill_(0)
    assert zoo.materialize("literal", 1).tolist() == [1.5, 2.5]


def test_dtype_and_generator(zoo):
    before = torch.get_rng_state()
    value = zoo.materialize("truncated", 1, torch.bfloat16)
    assert value.dtype == torch.bfloat16
    assert torch.equal(value, zoo.materialize("truncated", 1).bfloat16())
    assert torch.equal(torch.get_rng_state(), before)
    assert zoo.materialize("random", 1).std().item() == pytest.approx(1, rel=0.05)


def test_values_from_outside_are_refused():
    class Loaded(nn.Module):
        def __init__(self):
            super().__init__()
            self.inside = nn.Parameter(torch.zeros(3))
            self.outside = nn.Parameter(torch.empty(3))
            with torch.no_grad():
                self.outside.copy_(torch.from_numpy(np.arange(3.0)))

    source = defer(Loaded)
    assert not source.materialize("inside", 0).any()
    with pytest.raises(ModelError, match=r"initial value of outside comes from outside.*pass the built model"):
        source.materialize("outside", 0)


def test_unknown_name(zoo):
    with pytest.raises(ModelError, match="no parameter or buffer sqare; did you mean square"):
        zoo.materialize("sqare", 0)


def test_builder_reads_values_that_no_seed_changes():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            rates = torch.linspace(0, 0.5, 3) * 2
            widths = (rates[1:] * 4).int().tolist()
            self.linear = nn.Linear(*widths) if rates[0] < 0.1 else nn.Identity()
            self.drop = nn.Dropout(rates[1].item())

    source = defer(Reader)
    assert isinstance(source, Deferred)
    assert (source.module.linear.in_features, source.module.linear.out_features) == (2, 4)
    assert source.module.drop.p == 0.5
    assert source.materialize("linear.weight", 0).abs().max() > 0


def test_builder_that_reads_random_values_runs_on_the_cpu():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            width = 4 + int(torch.rand(()).item())
            self.linear = nn.Linear(width, width)

    source = defer(Reader)
    assert isinstance(source, Rebuilt)
    assert source.module.linear.weight.is_meta
    first = source.materialize("linear.weight", 3)
    source.materialize("linear.weight", 4)
    assert torch.equal(first, defer(Reader).materialize("linear.weight", 3))
    assert not torch.equal(first, source.materialize("linear.weight", 4))


def test_builder_that_fails():
    def broken():
        raise ValueError("width must be positive")

    with pytest.raises(ModelError, match="builder failed: ValueError: width must be positive"):
        defer(broken)


def test_ready_model():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    source = ready(model)
    value = source.materialize("0.weight", 9, torch.float64)
    assert torch.equal(value, model[0].weight.detach().double())
    assert not value.requires_grad
    source.materialize("0.weight", 9).fill_(0)
    assert model[0].weight.any()
    assert source.module is model
    with pytest.raises(ModelError, match="is on the meta device"):
        ready(defer(lambda: nn.Linear(2, 2)).module)


class Large(nn.Module):
    """Parameters above the size from which on a slice is made without the rest, and one that cannot be cut."""

    def __init__(self):
        super().__init__()
        rows, columns = 2500, 1000
        self.uniform = nn.Linear(columns, rows, bias=False)
        self.normal = nn.Parameter(torch.empty(rows, columns, dtype=torch.float64).normal_(1.0, 0.02))
        self.drawn = nn.Parameter(torch.randn(rows, columns) * 0.01 + 3)
        self.given = nn.Parameter(torch.normal(2.0, 0.1, (rows, columns)))
        self.truncated = nn.Parameter(torch.empty(rows, columns))
        trunc_normal_(self.truncated, std=0.02)
        self.ones = nn.Parameter(torch.ones(rows, columns).mul_(7))
        self.copied = nn.Parameter(self.normal.detach().clone())
        self.padded = nn.Embedding(rows, columns, padding_idx=3)


@pytest.fixture(scope="module")
def large():
    source = defer(Large)
    assert isinstance(source, Deferred)
    return source


LARGE = ["uniform.weight", "normal", "drawn", "given", "truncated", "ones", "copied", "padded.weight"]


@pytest.mark.parametrize("name", LARGE)
def test_a_slice_is_that_of_the_whole(large, name):
    whole = large.materialize(name, 4)
    for part in (Part(0, 0, 833), Part(0, 833, 2500), Part(1, 0, 1), Part(1, 499, 1000), Part(0, 5, 5)):
        cut = large.materialize(name, 4, part=part)
        assert torch.equal(cut, part.of(whole)), part
        assert cut.untyped_storage().nbytes() == cut.numel() * cut.element_size()
    cast = large.materialize(name, 4, torch.float64, Part(0, 2000, 2500))
    assert torch.equal(cast, whole[2000:].double())


def test_large_parameters_are_drawn_from_the_right_distribution(large):
    uniform, normal = large.materialize("uniform.weight", 0), large.materialize("normal", 0)
    assert uniform.abs().max() <= 1 / math.sqrt(1000)
    assert uniform.std().item() == pytest.approx(1 / math.sqrt(3000), rel=0.01)
    assert normal.mean().item() == pytest.approx(1, abs=1e-3)
    assert normal.std().item() == pytest.approx(0.02, rel=0.01)
    assert large.materialize("given", 0).mean().item() == pytest.approx(2, abs=1e-3)
    assert large.materialize("drawn", 0).std().item() == pytest.approx(0.01, rel=0.01)
    assert large.materialize("truncated", 0).std().item() == pytest.approx(0.02, rel=0.01)
    assert large.materialize("ones", 0).eq(7).all()
    blocks = normal.view(-1)[: 2 * DRAWN_ELEMENTS].view(2, -1)
    assert not torch.equal(*blocks), "each block has a key of its own"
    assert torch.equal(large.materialize("copied", 0), normal)
    assert not torch.equal(large.materialize("normal", 1), normal)


def test_a_slice_is_made_without_the_whole(monkeypatch):
    source = defer(lambda: nn.Linear(64, 400_000, bias=False))
    drawn = []
    fill = Entry._fill
    monkeypatch.setattr(Entry, "_fill", lambda self, out: (drawn.append(out.numel()), fill(self, out))[1])
    monkeypatch.setattr(Tape, "replay", lambda *_: pytest.fail("the whole parameter was made"))
    part = source.materialize("weight", 0, part=Part(0, 100_000, 110_000))
    assert part.shape == (10_000, 64)
    assert sum(drawn) <= part.numel() + 2 * DRAWN_ELEMENTS
    assert max(drawn) <= DRAWN_ELEMENTS
