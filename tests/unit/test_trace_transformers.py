"""Transformers: torch's encoder is cut between its blocks, tokens come in, and ties are found."""

import pytest
import torch
from torch import nn

from hybridpar.errors import ModelError
from hybridpar.model.deferred import defer
from hybridpar.model.trace import trace
from hybridpar.models.gpt import gpt

WIDTH, LENGTH, VOCABULARY = 8, 5, 11


class Encoder(nn.Module):
    """Tokens, torch's own encoder, and a head on the mean."""

    def __init__(self, *, norm_first=False, mask=False, dropout=0.0, tie=False):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Parameter(torch.randn(LENGTH, WIDTH))
        block = nn.TransformerEncoderLayer(
            WIDTH, 2, 16, dropout=dropout, activation="gelu", batch_first=True, norm_first=norm_first
        )
        self.encoder = nn.TransformerEncoder(block, 3, nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=not tie)
        if tie:
            self.head.weight = self.embed.weight
        blocked = nn.Transformer.generate_square_subsequent_mask(LENGTH, device="cpu") if mask else None
        self.register_buffer("mask", blocked, persistent=False)

    def forward(self, tokens):
        x = self.embed(tokens) + self.positions
        return self.head(self.encoder(x, mask=self.mask, is_causal=self.mask is not None).mean(1))


class Block(nn.Module):
    """A block as people write it by hand, with the attention spelled out."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, WIDTH))

    def forward(self, x):
        n, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, length, 3, 2, width // 2).permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q @ k.transpose(-2, -1) / (width // 2) ** 0.5).softmax(-1)
        x = x + self.out((weights @ v).transpose(1, 2).reshape(n, length, width))
        return x + self.mlp(self.norm2(x))


def run(traced, x):
    for part in traced.modules:
        x = part(x)
    return x


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("mask", [False, True])
def test_torch_encoder_is_cut_in_every_layer(norm_first, mask):
    torch.manual_seed(0)
    model = Encoder(norm_first=norm_first, mask=mask).double()
    traced = trace(model, (LENGTH,), "encoder", "int")
    chain = traced.chain
    assert chain.parameter_count == sum(p.numel() for p in model.parameters())
    assert sum(layer.name.startswith("encoder.layers.1") for layer in chain.layers) >= 2
    assert chain.layers[-1].linear is not None
    tokens = torch.randint(VOCABULARY, (4, LENGTH))
    torch.testing.assert_close(run(traced, tokens), model.train()(tokens), rtol=1e-12, atol=1e-12)


def test_dropout_outside_the_attention_is_keyed():
    layers = trace(defer(lambda: Encoder(dropout=0.1)).module, (LENGTH,), "encoder", "int").chain.layers
    first = {layer.name: layer.random for layer in layers if layer.name.startswith("encoder.layers.0")}
    assert "keyed" in first.values()
    assert "unkeyed" in first.values()  # the attention's own dropout, inside torch's kernel


def test_hand_written_blocks():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, WIDTH), Block(), Block(), nn.LayerNorm(WIDTH)).double()
    traced = trace(model, (LENGTH, 3), "blocks")
    assert len(traced.chain.layers) >= 6
    x = torch.randn(4, LENGTH, 3, dtype=torch.float64)
    torch.testing.assert_close(run(traced, x), model(x), rtol=1e-12, atol=1e-12)


def test_ties_between_first_and_last_layer_are_in_the_chain():
    chain = trace(defer(lambda: Encoder(tie=True)).module, (LENGTH,), "encoder", "int").chain
    assert chain.tied == (("embed.weight", (0, len(chain.layers) - 1)),)


def test_tied_autoencoder():
    class Autoencoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.encode = nn.Linear(6, 3)
            self.bias = nn.Parameter(torch.zeros(6))

        def forward(self, x):
            return nn.functional.linear(torch.tanh(self.encode(x)), self.encode.weight.t(), self.bias)

    traced = trace(Autoencoder(), (6,), "autoencoder")
    assert [layer.name for layer in traced.chain.layers][:2] == ["encode", "tanh"]
    assert traced.chain.tied == (("encode.weight", (0, 2)),)
    assert traced.names[2] == {"encode.weight": "encode.weight", "bias": "bias"}


def test_rnn_with_the_samples_first_is_a_layer():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2)

        def forward(self, x):
            out, _ = self.rnn(x)
            return self.head(out[:, -1])

    model = Reader().double()
    traced = trace(model, (LENGTH, 3), "reader")
    x = torch.randn(4, LENGTH, 3, dtype=torch.float64)
    torch.testing.assert_close(run(traced, x), model(x))


def small_gpt(**options):
    return gpt(classes=VOCABULARY, in_shape=(LENGTH,), width=WIDTH, heads=2, blocks=3, **options)


def test_gpt_has_one_layer_per_block_and_keyed_dropout_only():
    chain = trace(defer(small_gpt).module, (LENGTH,), "gpt", "int").chain
    assert [layer.name for layer in chain.layers] == [
        "embedding",
        "blocks.0",
        "blocks.1",
        "blocks.2",
        "norm",
        "head",
    ]
    assert [layer.random for layer in chain.layers] == ["keyed"] * 4 + ["none"] * 2
    assert (chain.out_shape, chain.label_shape, chain.classes) == ((LENGTH, VOCABULARY), (LENGTH,), VOCABULARY)


def test_gpt_counts_its_attention():
    """The products of queries with keys and of weights with values: 2 x 2 x length^2 x width."""
    block = trace(defer(small_gpt).module, (LENGTH,), "gpt", "int").chain.layers[1]
    products = 2 * LENGTH * WIDTH * WIDTH * (3 + 1 + 4 + 4) + 4 * LENGTH**2 * WIDTH
    assert products <= block.flops_per_sample < 1.3 * products


def test_gpt_sees_no_later_token():
    torch.manual_seed(0)
    model = small_gpt().eval()
    tokens = torch.randint(VOCABULARY, (2, LENGTH))
    changed = tokens.clone()
    changed[:, 3] = (changed[:, 3] + 1) % VOCABULARY
    same = model(tokens).isclose(model(changed)).all(2)
    assert same[:, :3].all()
    assert not same[:, 3:].any()


def test_gpt_with_a_tied_head():
    chain = trace(defer(lambda: small_gpt(tied=True)).module, (LENGTH,), "gpt", "int").chain
    assert chain.tied == (("embedding.tokens.weight", (0, 5)),)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"heads": 3}, "width=128 to heads=3"),
        ({"blocks": 0}, "blocks=0"),
        ({"in_shape": (3, 8, 8)}, "rows of tokens"),
    ],
)
def test_impossible_gpts_are_refused(options, said):
    with pytest.raises(ModelError, match=said):
        gpt(**options)
