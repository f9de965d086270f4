"""Keyed dropout: its mask belongs to samples and features, not to ranks."""

import math

import pytest
import torch

from hybridpar.errors import ModelError
from hybridpar.model.keyed import KeyedDropout, Keys, Window, keep_mask


def ids(*values):
    return torch.tensor(values, dtype=torch.int64)


def correlation(a, b):
    return torch.corrcoef(torch.stack((a.flatten().float(), b.flatten().float())))[0, 1].item()


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_keep_rate_over_all_samples_and_features(p):
    kept = keep_mask(Keys(7, 3, torch.arange(200)), 1, p, (4096,)).float()
    sigma = math.sqrt(p * (1 - p))
    assert abs(kept.mean().item() - (1 - p)) < 5 * sigma / math.sqrt(kept.numel())
    # Every row and every column keeps its share; 5.5 sigma over 4,296 of them.
    assert (kept.mean(1) - (1 - p)).abs().max() < 5.5 * sigma / math.sqrt(4096)
    assert (kept.mean(0) - (1 - p)).abs().max() < 5.5 * sigma / math.sqrt(200)
    # Their spread is that of independent draws, neither more even nor less.
    assert kept.mean(1).std().item() == pytest.approx(sigma / math.sqrt(4096), rel=0.25)


def test_masks_of_different_keys_are_uncorrelated():
    shape, samples = (8192,), torch.arange(32)
    base = keep_mask(Keys(7, 3, samples), 1, 0.5, shape)
    bound = 5 / math.sqrt(base.numel())
    others = {
        "seed": keep_mask(Keys(8, 3, samples), 1, 0.5, shape),
        "step": keep_mask(Keys(7, 4, samples), 1, 0.5, shape),
        "layer": keep_mask(Keys(7, 3, samples), 2, 0.5, shape),
        "samples": keep_mask(Keys(7, 3, samples + 32), 1, 0.5, shape),
        "features": keep_mask(Keys(7, 3, samples), 1, 0.5, shape, Window(0, 8192, 16384)),
        "shifted feature": base.roll(1, dims=1),
        "shifted sample": base.roll(1, dims=0),
        "step and layer swapped": keep_mask(Keys(7, 1, samples), 3, 0.5, shape),
    }
    assert {name: abs(correlation(base, m)) < bound for name, m in others.items()} == dict.fromkeys(others, True)


def test_bits_of_neighbouring_samples_are_pairwise_independent():
    kept = keep_mask(Keys(0, 0, torch.arange(64)), 0, 0.5, (16384,)).double()
    off_diagonal = torch.corrcoef(kept)[~torch.eye(64, dtype=torch.bool)]
    assert off_diagonal.abs().max() < 5.5 / math.sqrt(16384)


def test_mask_of_a_slice_is_the_slice_of_the_mask():
    keys = Keys(1, 2, ids(5, 9, 1_000_000, 2**40))
    full = keep_mask(keys, 3, 0.4, (6, 5, 7))
    assert torch.equal(keep_mask(keys, 3, 0.4, (3, 5, 7), Window(0, 2, 6)), full[:, 2:5])
    assert torch.equal(keep_mask(keys, 3, 0.4, (6, 5, 3), Window(2, 4, 7)), full[..., 4:])
    assert torch.equal(keep_mask(keys, 3, 0.4, (6, 2, 7), Window(1, 1, 5)), full[:, :, 1:3])
    rows = Keys(1, 2, keys.sample_ids[1:3])
    assert torch.equal(keep_mask(rows, 3, 0.4, (6, 5, 7)), full[1:3])


def test_module_on_shards_equals_module_on_all_features():
    keys = Keys(1, 2, ids(5, 9, 4))
    whole, shard = KeyedDropout(0.5, 3), KeyedDropout(0.5, 3)
    x = torch.randn(3, 10, 4)
    whole.keys = shard.keys = keys
    shard.window = Window(0, 6, 10)
    assert torch.equal(whole(x)[:, 6:], shard(x[:, 6:]))


def test_gradient_and_scale():
    drop = KeyedDropout(0.25)
    drop.keys = Keys(0, 0, torch.arange(4))
    x = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    kept = keep_mask(drop.keys, 0, 0.25, (9,))
    assert torch.equal(drop(x), x * kept / 0.75) or torch.allclose(drop(x), x * kept / 0.75, rtol=1e-15)
    assert torch.autograd.gradcheck(drop, x)


def test_saves_one_byte_per_element_and_nothing_else():
    drop = KeyedDropout(0.5)
    drop.keys = Keys(0, 0, torch.arange(4))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        drop(torch.randn(4, 6, 5, requires_grad=True))
    assert [(t.dtype, t.untyped_storage().nbytes()) for t in saved] == [(torch.bool, 4 * 6 * 5)]


def test_nothing_and_everything_dropped():
    x = torch.randn(3, 5, requires_grad=True)
    assert KeyedDropout(0.0)(x) is x
    assert KeyedDropout(0.7).eval()(x) is x
    drop = KeyedDropout(1.0)
    drop.keys = Keys(0, 0, torch.arange(3))
    out = drop(x)
    out.sum().backward()
    assert not out.any()
    assert not x.grad.any()


def test_misuse_says_what_to_do():
    x = torch.randn(3, 5)
    with pytest.raises(ModelError, match="has no keys; set its"):
        KeyedDropout(0.5, layer=4)(x)
    drop = KeyedDropout(0.5)
    drop.keys = Keys(0, 0, torch.arange(2))
    with pytest.raises(ModelError, match="got 3 samples but keys for"):
        drop(x)
    with pytest.raises(ModelError, match=r"1\.5 is not between 0 and 1"):
        KeyedDropout(1.5)


def test_known_values_stay():
    """A changed mask would make old checkpoints resume with other random numbers."""
    kept = keep_mask(Keys(1, 2, ids(3, 4)), 5, 0.5, (16,))
    assert ["".join("01"[int(k)] for k in row) for row in kept] == ["0001000101011110", "1001101000100010"]
