"""What happens to dim 0: each sample stays by itself, or one clear error says where it does not."""

import pytest
import torch
from torch import nn

from hybridpar.errors import ModelError
from hybridpar.model.deferred import defer
from hybridpar.model.trace import trace


class Apply(nn.Module):
    """A function between two linear layers."""

    def __init__(self, function):
        super().__init__()
        self.a, self.b, self.function = nn.Linear(4, 4), nn.Linear(4, 4), function

    def forward(self, x):
        return self.b(self.function(self.a(x)))


class Recurrent(nn.Module):
    def __init__(self, *, batch_first, turn=False):
        super().__init__()
        self.rnn, self.head, self.turn = nn.LSTM(4, 4, batch_first=batch_first), nn.Linear(4, 2), turn

    def forward(self, x):
        x = x.transpose(0, 1) if self.turn else x
        out, _ = self.rnn(x)
        return self.head(out.transpose(0, 1) if self.turn else out)


class Attention(nn.Module):
    def __init__(self, *, batch_first):
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x):
        return self.encoder(x)


KEPT = {
    "softmax": lambda x: x.softmax(-1),
    "centred": lambda x: x - x.mean((1, 2), keepdim=True),
    "turned there and back": lambda x: x.transpose(0, 1).relu().transpose(0, 1),
    "windows": lambda x: x.reshape(x.size(0) * 3, 4).relu().view(x.size(0), 3, 4),
}
MIXED = {
    "mean over the batch": lambda x: x - x.mean(0),
    "softmax over the batch": lambda x: x.softmax(0),
    "the wrong view": lambda x: x.reshape(3, x.size(0), 4).transpose(0, 1),
    "rolled": lambda x: x.roll(1, 0),
    "sums": lambda x: x.cumsum(0),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_keeps_samples_apart_is_a_chain(name):
    assert trace(Apply(KEPT[name]), (3, 4), "m").chain.out_shape == (3, 4)


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("name", MIXED)
def test_what_mixes_samples_is_refused(name, deferred):
    model = Apply(MIXED[name])
    model = defer(lambda: Apply(MIXED[name])).module if deferred else model
    with pytest.raises(ModelError, match=r"layer \S+ mixes samples: .*keep dim 0 for the samples"):
        trace(model, (3, 4), "m")


@pytest.mark.parametrize("model", [Recurrent(batch_first=False), Attention(batch_first=False)])
def test_layers_of_torch_with_the_samples_in_dim_1(model):
    with pytest.raises(
        ModelError, match=r"its (LSTM|MultiheadAttention).* takes samples in dim 1; .*batch_first=True"
    ):
        trace(model, (3, 4), "m")


@pytest.mark.parametrize(
    "model", [Recurrent(batch_first=True), Recurrent(batch_first=False, turn=True), Attention(batch_first=True)]
)
def test_layers_of_torch_that_get_their_samples_where_they_expect_them(model):
    trace(model, (3, 4), "m")


def test_batch_norm_may_look_at_all_samples():
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Flatten(), nn.LazyLinear(2))
    model(torch.zeros(2, 1, 3, 3))
    layers = trace(model, (1, 3, 3), "m").chain.layers
    assert [layer.batch_norm for layer in layers] == [False, True, False, False]


def test_squeeze_that_takes_a_batch_of_one_along():
    with pytest.raises(ModelError, match=r"turns a batch of one sample into \(4,\) instead of \(1, 4\)"):
        trace(Apply(lambda x: x.unsqueeze(1).squeeze()), (4,), "m")


def test_an_output_without_samples_says_what_it_is():
    class Pair(nn.Module):
        def forward(self, x):
            return x + 1, x.sum(0)

    with pytest.raises(
        ModelError, match=r"for 2 samples it gives a tensor of shape \(2, 4\) and .* \(4,\), for 3"
    ):
        trace(Pair(), (4,), "m")


def test_dropout_on_something_else_than_samples_is_unkeyed():
    class Windows(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.drop = nn.Linear(4, 4), nn.Linear(4, 4), nn.Dropout(0.5)

        def forward(self, x):
            return self.b(self.drop(self.a(x).reshape(-1, 4)).view(-1, 3, 4))

    layers = trace(Windows(), (3, 4), "m").chain.layers
    assert [layer.random for layer in layers] == ["none", "unkeyed", "none"]


def test_an_assertion_of_the_model_is_told_as_one_line():
    class Sized(nn.Module):
        def forward(self, x):
            torch._assert(x.shape[1] == 5, "wrong width")
            return x * 2

    with pytest.raises(ModelError, match=r"m fails at .*_assert.* \(4,\): wrong width; set model.in_shape"):
        trace(Sized(), (4,), "m")
