"""Tracing: where a model is cut, and that what the chain says is what really happens."""

import copy
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from hybridpar.errors import ModelError
from hybridpar.model.chain import Saved
from hybridpar.model.deferred import defer
from hybridpar.model.keyed import KeyedDropout, Keys, Window
from hybridpar.model.trace import trace
from hybridpar.models.alexnet import alexnet
from hybridpar.models.vgg import vgg

small_vgg11 = partial(vgg, depth=11, in_shape=(3, 32, 32), classes=10, classifier_width=32, pool=2)
small_alexnet = partial(alexnet, in_shape=(3, 64, 64), classes=10, classifier_width=32)


def mlp():
    return nn.Sequential(
        nn.Flatten(), nn.Linear(12, 16), nn.GELU(), nn.Dropout(0.3), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3)
    )


class Residual(nn.Module):
    """A block with an activation in place, dropout as a function, and a parameter of its own."""

    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inner = nn.Linear(width, width)
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x):
        y = F.dropout(F.silu(self.inner(self.norm(x))), 0.2, self.training)
        return F.relu(x + y * self.scale, inplace=True)


MODELS = {
    "vgg11": (small_vgg11, (3, 32, 32)),
    "vgg11_bn": (partial(small_vgg11, batch_norm=True), (3, 32, 32)),
    "resnet18": (partial(torchvision.models.resnet18, num_classes=10), (3, 32, 32)),
    "alexnet": (small_alexnet, (3, 64, 64)),
    "mlp": (mlp, (3, 4)),
    "residual": (lambda: nn.Sequential(nn.Linear(6, 6), Residual(6), Residual(6), nn.Linear(6, 2)), (6,)),
}


def set_keys(module, keys):
    for part in module.modules():
        if isinstance(part, KeyedDropout):
            part.keys = keys


def by_name(chain):
    return {layer.name: layer for layer in chain.layers}


def predicted_saved_bytes(chain, samples, itemsize):
    """Own storages of the layers, and each cut tensor that a neighbour keeps, once per storage."""
    storage = [0]
    for index, layer in enumerate(chain.layers):
        storage.append(storage[index] if layer.aliases_input else index + 1)
    elements = [chain.layers[0].in_elements, *(layer.out_elements for layer in chain.layers)]
    kept = {storage[i] for i, layer in enumerate(chain.layers) if layer.saves_input}
    kept |= {storage[i + 1] for i, layer in enumerate(chain.layers) if layer.saves_output}
    own = sum(layer.saved.total_bytes(samples, itemsize) for layer in chain.layers)
    return own + sum(elements[i] * samples * itemsize for i in kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", MODELS)
def test_saved_bytes_are_those_of_a_real_run(name, dtype):
    builder, in_shape = MODELS[name]
    model = builder().to(dtype)
    traced = trace(model, in_shape, name)
    samples, kept = 5, {}
    skip = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    x = torch.randn(samples, *in_shape, dtype=dtype)

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        for part in traced.modules:
            set_keys(part, Keys(0, 0, torch.arange(samples)))
            x = part(x)
    real = sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in skip)
    assert predicted_saved_bytes(traced.chain, samples, dtype.itemsize) == real


@pytest.mark.parametrize("name", MODELS)
def test_layers_in_a_row_are_the_model(name):
    builder, in_shape = MODELS[name]
    torch.manual_seed(0)
    model = builder().double()
    reference = copy.deepcopy(model)
    traced = trace(model, in_shape, name)
    for part in [*reference.modules(), *traced.modules]:
        part.train()
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    for part in traced.modules:
        for inner in part.modules():
            if isinstance(inner, KeyedDropout):
                inner.p = 0.0
    for part in reference.modules():
        if isinstance(part, Residual):
            part.eval()
            part.norm.train()
    x = torch.randn(4, *in_shape, dtype=torch.float64)
    y = x
    for part, layer in zip(traced.modules, traced.chain.layers, strict=True):
        y = part(y)
        assert y.shape == (4, *layer.out_shape)
    expected = reference(x)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    y.square().sum().backward()
    expected.square().sum().backward()
    own = dict(reference.named_parameters())
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, own[key].grad, rtol=1e-9, atol=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), reference.buffers(), strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_names_find_every_tensor(name):
    builder, in_shape = MODELS[name]
    model = builder()
    traced = trace(model, in_shape, name)
    full = model.state_dict(keep_vars=True)
    found = set()
    for part, names in zip(traced.modules, traced.names, strict=True):
        local = part.state_dict(keep_vars=True)
        assert set(names) == set(local)
        assert all(local[k] is full[v] for k, v in names.items())
        found |= set(names.values())
    assert found == set(full)
    chain_names = {p.name: p.shape for layer in traced.chain.layers for p in layer.parameters}
    assert chain_names == {k: tuple(p.shape) for k, p in model.named_parameters()}


@pytest.mark.parametrize("name", MODELS)
def test_channelwise_layers_work_on_slices(name):
    builder, in_shape = MODELS[name]
    traced = trace(builder(), in_shape, name)
    tested = 0
    for part, layer in zip(traced.modules, traced.chain.layers, strict=True):
        if not layer.channelwise:
            continue
        x = torch.randn(3, *layer.in_shape)
        set_keys(part, Keys(1, 2, torch.arange(3)))
        whole, channels = part(x), layer.in_shape[0]
        low, high = channels // 3, channels // 2
        for inner in part.modules():
            if isinstance(inner, KeyedDropout):
                inner.window = Window(0, low, channels)
        per = layer.out_shape[0] // channels
        torch.testing.assert_close(part(x[:, low:high]), whole[:, low * per : high * per], rtol=1e-6, atol=1e-7)
        tested += 1
    assert tested


def test_the_users_model_is_left_alone():
    model = small_vgg11().eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    trace(model, (3, 32, 32), "vgg11")
    assert all(m.inplace for m in model.modules() if isinstance(m, nn.ReLU))
    assert not any(isinstance(m, KeyedDropout) or m.training for m in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_vgg16():
    chain = trace(defer(torchvision.models.vgg16).module, (3, 224, 224), "vgg16").chain
    layers = by_name(chain)
    assert len(layers) == 40
    assert chain.parameter_count == 138_357_544
    assert chain.layers[chain.tail_start].name == "features.29"
    assert layers["features.0"].kind == "Conv2d"
    assert layers["features.0"].flops_per_sample == 2 * 27 * 64 * 224 * 224
    assert layers["features.0"].saves_input
    relu = layers["features.1"]
    assert (relu.saves_input, relu.saves_output, relu.channelwise) == (False, True, True)
    assert layers["features.4"].saved == Saved(bytes_per_sample=64 * 112 * 112 * 8)
    assert layers["flatten"].aliases_input
    assert layers["classifier.0"].linear.in_features == 25088
    dropout = layers["classifier.2"]
    assert (dropout.kind, dropout.random, dropout.saved) == ("Dropout", "keyed", Saved(bytes_per_sample=4096))


def test_resnet_blocks_are_layers():
    chain = trace(defer(torchvision.models.resnet50).module, (3, 224, 224), "resnet50").chain
    layers = by_name(chain)
    assert len(layers) == 39
    block = layers["layer1.0"]
    assert (block.kind, block.batch_norm, len(block.parameters)) == ("Block", True, 12)
    assert not block.channelwise
    assert layers["layer1.0.relu"].kind == "ReLU"
    assert 8.1e9 < sum(layer.flops_per_sample for layer in chain.layers) < 8.4e9
    assert layers["bn1"].saved == Saved(elements=128)
    assert layers["bn1"].buffer_bytes == 2 * 64 * 4 + 8


@pytest.mark.parametrize("name", ["densenet121", "vit_b_16", "mobilenet_v3_small"])
def test_torchvision_models_are_chains(name):
    source = defer(getattr(torchvision.models, name))
    chain = trace(source.module, (3, 224, 224), name).chain
    assert chain.out_shape == (1000,)
    assert chain.parameter_count == sum(p.numel() for p in source.module.parameters())
    assert len({layer.name for layer in chain.layers}) == len(chain.layers) > 10


def test_submodule_that_cannot_be_traced_is_one_layer():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.act = nn.ReLU(inplace=True)
            self.drop = nn.Dropout(0.5)

        def forward(self, x):
            return self.drop(self.act(self.linear(x))) if x.sum() > -1e9 else x

    model = nn.Sequential(nn.Linear(3, 4), nn.Sequential(Branching(), Branching()), nn.Linear(4, 2))
    traced = trace(model, (3,), "branching")
    layers = traced.chain.layers
    assert [layer.kind for layer in layers] == ["Linear", "Branching", "Branching", "Linear"]
    assert layers[1].random == "keyed"
    assert traced.names[1] == {"linear.weight": "1.0.linear.weight", "linear.bias": "1.0.linear.bias"}
    numbers = {m.layer for part in traced.modules for m in part.modules() if isinstance(m, KeyedDropout)}
    assert numbers == {0, 1}


def test_every_dropout_call_has_its_own_number():
    class Reused(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.drop = nn.Linear(4, 4), nn.Linear(4, 4), nn.Dropout(0.5)

        def forward(self, x):
            return F.dropout(self.drop(self.b(self.drop(self.a(x)))), 0.1, self.training)

    traced = trace(Reused(), (4,), "reused")
    found = [m for part in traced.modules for m in part.modules() if isinstance(m, KeyedDropout)]
    assert [(m.p, m.layer) for m in found] == [(0.5, 0), (0.5, 1), (0.1, 2)]


def test_random_operations_without_keys_are_named():
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.Dropout2d(0.5), nn.Conv2d(4, 1, 1), nn.AlphaDropout(0.1))
    assert [layer.random for layer in trace(model, (1, 4, 4), "m").chain.layers] == ["none", "unkeyed"] * 2


def test_in_place_operations_do_not_reach_over_a_cut():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.relu = nn.ReLU(inplace=True)

        def forward(self, x):
            x = self.a(x)
            F.leaky_relu_(x, 0.1)
            y = self.b(x).mul_(2)
            return self.relu(y) + y  # y is rectified by now

    model = InPlace()
    traced = trace(model, (4,), "in_place")
    x = torch.randn(5, 4)
    values = [x]
    for part in traced.modules:
        given = values[-1].detach().requires_grad_()
        before = given.detach().clone()
        values.append(part(given))
        assert torch.equal(given, before)
    torch.testing.assert_close(values[-1], model(x))


def test_view_by_size_is_a_flattening():
    class View(nn.Module):
        def __init__(self, fixed):
            super().__init__()
            self.conv, self.fc, self.fixed = nn.Conv2d(1, 3, 1), nn.Linear(12, 2), fixed

        def forward(self, x):
            x = self.conv(x)
            return self.fc(x.view(-1, 12) if self.fixed else x.view(x.size(0), -1))

    free, fixed = (trace(View(f), (1, 2, 2), "view").chain.layers[1] for f in (False, True))
    assert (free.channelwise, free.aliases_input, free.kind) == (True, True, "Block")
    assert (fixed.channelwise, fixed.aliases_input) == (False, True)


def test_what_is_computed_from_a_buffer_is_no_constant():
    class Indexed(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.randn(5))
            self.register_buffer("index", torch.tensor([[0, 1], [4, 2]]), persistent=False)

        def forward(self, x):
            return x + self.table[self.index.view(-1)]

    source = defer(Indexed)
    traced = trace(source.module, (4,), "indexed")
    assert sorted(traced.names[0].values()) == ["index", "table"]


def test_tokens_and_tied_weights():
    class Language(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(11, 6)
            self.positions = nn.Parameter(torch.zeros(4, 6))
            self.body = nn.Linear(6, 6)
            self.head = nn.Linear(6, 11, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, tokens):
            return self.head(self.body(self.embed(tokens) + self.positions))

    traced = trace(defer(Language).module, (4,), "language", input_dtype="int")
    chain = traced.chain
    assert chain.input_dtype == "int"
    assert [layer.name for layer in chain.layers] == ["embed", "add", "body", "head"]
    assert chain.tied == (("embed.weight", (0, 3)),)
    assert traced.names[3] == {"weight": "embed.weight"}
    assert traced.names[1] == {"positions": "positions"}
    assert chain.layers[2].linear is not None
    assert chain.axes[2:4] == (1, 1)  # over the last of two dims
    assert chain.layers[0].saves_input


def test_a_cut_needs_samples_in_dim_0():
    class Transposed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.b(self.a(x).transpose(0, 1)).transpose(0, 1)

    chain = trace(Transposed(), (3, 4), "transposed").chain
    assert [layer.name for layer in chain.layers] == ["a", "transpose..transpose_1"]


class Twice(nn.Module):
    def forward(self, x, y):
        return x + y


class Decides(nn.Module):
    def forward(self, x):
        return x * 2 if x.sum() > 0 else x


class Pair(nn.Module):
    def forward(self, x):
        return x + 1, x


class Mixes(nn.Module):
    def forward(self, x):
        return (x * 2).transpose(0, 1)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Twice(), "uses 2 inputs .x, y., but model.in_shape gives the shape of one"),
        (Decides(), "cannot trace m .Decides.forward.: .*control flow.*torch.fx.wrap"),
        (Pair(), "output of m is not one floating tensor"),
        (Mixes(), "output of m is not one floating tensor with the samples in dim 0"),
        (nn.Sequential(nn.Linear(7, 2)), r"fails at 0 for a sample of shape \(4,\): mat1 .*; set model.in_shape"),
    ],
)
def test_models_that_are_no_chain(model, message):
    with pytest.raises(ModelError, match=message):
        trace(model, (4,), "m")


def test_flops_of_a_linear_count_multiply_and_add():
    layers = trace(mlp(), (3, 4), "mlp").chain.layers
    assert layers[1].flops_per_sample == 2 * 12 * 16
    assert layers[2].flops_per_sample == math.prod(layers[2].out_shape)
