"""Layers that are named by hand, where tracing fails."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hybridpar.api import plan
from hybridpar.errors import ModelError
from hybridpar.model.deferred import defer
from hybridpar.model.keyed import KeyedDropout, Keys
from hybridpar.model.trace import trace


class Block(nn.Module):
    """Looks at a value, so that torch.fx gives up on it."""

    def __init__(self):
        super().__init__()
        self.linear, self.drop = nn.Linear(6, 6), nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(self.linear(x)) if x.abs().sum() >= 0 else x


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x):
        return x + F.dropout(F.relu_(self.linear(x)), 0.5, self.training)


class Flow(nn.Module):
    """Its own forward cannot be traced."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(4, 6)
        self.blocks = nn.ModuleList([Block(), Plain()])
        self.register_buffer("seen", torch.zeros(1))
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            if x.mean() > 1e9:
                break
            x = block(x)
        return self.head(x)


class Named(Flow):
    def hybridpar_layers(self):
        return [("stem", self.stem), *self.blocks.named_children(), ("head", self.head)]


def run(traced, x, keys=None):
    for part in traced.modules:
        for inner in part.modules():
            if isinstance(inner, KeyedDropout):
                inner.keys = keys
        x = part(x)
    return x


def test_a_model_that_cannot_be_traced_says_what_helps():
    with pytest.raises(ModelError, match=r"cannot trace flow .*name its layers in a method hybridpar_layers"):
        trace(Flow(), (4,), "flow")


@pytest.mark.parametrize("deferred", [False, True])
def test_named_layers_are_the_chain(deferred):
    model = defer(Named).module if deferred else Named()
    traced = trace(model, (4,), "named")
    layers = traced.chain.layers
    assert [layer.name for layer in layers] == ["stem", "0", "1", "head"]
    assert [layer.random for layer in layers] == ["none", "keyed", "keyed", "none"]
    assert layers[3].linear is not None
    assert traced.names[1] == {"linear.weight": "blocks.0.linear.weight", "linear.bias": "blocks.0.linear.bias"}
    held = [name for names in traced.names for name in names.values()]
    assert sorted(held) == sorted(name for name, _ in model.named_parameters())
    numbers = [m.layer for part in traced.modules for m in part.modules() if isinstance(m, KeyedDropout)]
    assert numbers == [0, 1]


def test_named_layers_run_as_the_model_does():
    torch.manual_seed(0)
    model = Named().double()
    traced = trace(model, (4,), "named")
    x = torch.randn(5, 4, dtype=torch.float64)
    for part in traced.modules:
        part.eval()
    torch.testing.assert_close(run(traced, x), model.eval()(x), rtol=1e-12, atol=1e-12)
    for part in traced.modules:
        part.train()
    keys = Keys(0, 0, torch.arange(5))
    halves = [run(traced, x[part], Keys(0, 0, torch.arange(5)[part])) for part in (slice(0, 2), slice(2, 5))]
    torch.testing.assert_close(torch.cat(halves), run(traced, x, keys), rtol=1e-12, atol=1e-12)
    run(traced, x, keys).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_function_names_the_layers_of_somebody_elses_model():
    def layers(model):
        return [("stem", model.stem), ("blocks", nn.Sequential(*model.blocks)), ("head", model.head)]

    chain = trace(Flow(), (4,), "flow", layers=layers).chain
    assert [layer.name for layer in chain.layers] == ["stem", "blocks", "head"]
    made = plan(Flow(), (4,), 8, layers=layers)
    assert made.stages[-1].layers[1] == 3


def test_tokens():
    model = nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(12, 2))
    chain = trace(model, (3,), "tokens", "int", lambda m: [("embed", m[0]), ("rest", m[1:])]).chain
    assert [layer.out_shape for layer in chain.layers] == [(3, 4), (2,)]


def stranger(model):
    return [("stem", model.stem), ("head", nn.Linear(6, 3))]


def forgets(model):
    return [("stem", model.stem), ("head", model.head)]


def swaps(model):
    return [("stem", model.stem), ("b", model.blocks[1]), ("a", nn.Sequential(model.blocks[0], model.head))]


def scales(model):
    return [("stem", model.stem), ("blocks", nn.Sequential(*model.blocks, nn.Tanh())), ("head", model.head)]


def stops(model):
    return [("stem", nn.Sequential(model.stem, *model.blocks, model.head, nn.Flatten(0)))]


def crosses(model):
    return [("head", model.head), ("stem", nn.Sequential(model.stem, *model.blocks))]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (lambda m: m.stem, "gave a Linear; it must give a list of .name, module."),
        (lambda _: [], "gave a list; it must give"),
        (lambda m: [m.stem, m.head], "gave a Linear as a layer; each must be a pair"),
        (lambda m: [("a", m.stem), ("a", m.head)], "gave the name a to 2 layers"),
        (stranger, "weight of layer head is no parameter or buffer of the model"),
        (forgets, "no layer holds blocks.0.linear.weight, blocks.0.linear.bias, .*, ..., so that it would not be"),
        (swaps, "layers' output differs from the model's by"),
        (scales, "layers' output differs from the model's by"),
        (stops, r"layers give \(6,\) for two samples but the model \(2, 3\)"),
        (crosses, r"layer head fails for an input of shape \(2, 4\): RuntimeError"),
    ],
)
def test_layers_that_are_not_the_model(layers, message):
    with pytest.raises(ModelError, match=message):
        trace(Flow(), (4,), "flow", layers=layers)


def test_layers_that_mix_samples_are_refused():
    class Mixing(Named):
        def __init__(self):
            super().__init__()
            self.blocks[1] = nn.Softmax(0)

    with pytest.raises(ModelError, match="layer 1 mixes samples"):
        trace(Mixing(), (4,), "mixing")
