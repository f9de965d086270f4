"""Profiles that need no device: the roofline estimate, the cache, and the loader's rate."""

import itertools

import numpy as np
import pytest
import torch

from hybridpar.cluster.devices import DEVICES, device
from hybridpar.data.samples import Batch
from hybridpar.errors import ProfileError
from hybridpar.model.chain import Chain, Layer, Parameter
from hybridpar.profiling import cache as caching
from hybridpar.profiling.analytic import estimate
from hybridpar.profiling.cache import cache_directory, cache_key, device_name, find, keep
from hybridpar.profiling.loading import samples_per_s
from hybridpar.profiling.record import Profile
from tests.support.chains import convolutional, linear_chain, traced

# --- estimated


def test_an_estimate_fits_its_chain_and_says_so():
    chain = traced(convolutional()).chain
    profile = estimate(chain, DEVICES["P100"])
    profile.check(chain)
    assert profile.source == "estimated"
    assert profile.device == "P100"
    assert profile.micro_batches == tuple(2**i for i in range(11))
    for layer, times in zip(chain.layers, profile.layers, strict=True):
        assert layer.name == times.name
        assert len(times.forward_s) == len(times.backward_s) == (4 if layer.linear else 1)
        assert min(min(row) for row in times.forward_s + times.backward_s) > 0


def test_the_first_layer_has_no_input_gradient():
    chain = linear_chain((4096, 4096, 4096))
    profile = estimate(chain, device("H100", overhead_s=0.0))
    for b in profile.micro_batches:
        assert profile.forward_time(0, b) == profile.forward_time(1, b)
        assert profile.backward_time(0, b) < profile.backward_time(1, b)
    assert profile.backward_time(1, 1024) == pytest.approx(2 * profile.forward_time(1, 1024))
    assert profile.backward_time(0, 1024) == pytest.approx(profile.forward_time(0, 1024))


def test_large_batches_are_bound_by_operations_and_small_ones_by_bytes():
    chain = linear_chain()
    card = device("V100", overhead_s=0.0)
    profile = estimate(chain, card)
    flops = chain.layers[0].flops_per_sample
    assert profile.forward_time(0, 1024) == pytest.approx(1024 * flops / card.flops_per_s["float32"])
    weight_bytes = 4 * 4096 * 4096
    assert profile.forward_time(0, 1) == pytest.approx(weight_bytes / card.memory_bytes_per_s, rel=0.01)


@pytest.mark.parametrize(
    "better",
    [{"flops_per_s": {"float32": 1e15}}, {"memory_bytes_per_s": 1e13}, {"overhead_s": 0.0}],
    ids=lambda change: next(iter(change)),
)
def test_a_better_device_is_never_slower(better):
    chain = traced(convolutional()).chain
    slow, fast = estimate(chain, DEVICES["V100"]), estimate(chain, device("V100", **better))
    for i, b in itertools.product(range(len(chain.layers)), slow.micro_batches):
        assert fast.forward_time(i, b) <= slow.forward_time(i, b)
        assert fast.backward_time(i, b) <= slow.backward_time(i, b)
    assert fast.update_s_per_byte <= slow.update_s_per_byte


def test_more_samples_cost_more_and_smaller_shares_less():
    chain = traced(convolutional()).chain
    profile = estimate(chain, DEVICES["cpu_core"])
    for times in profile.layers:
        for row in (*times.forward_s, *times.backward_s):
            assert list(row) == sorted(row)
        for wide, narrow in itertools.pairwise(times.forward_s):
            assert all(a >= b for a, b in zip(wide, narrow, strict=True))


def test_half_precision_is_faster_and_missing_rates_are_named():
    chain = linear_chain()
    assert estimate(chain, DEVICES["A100"], "bfloat16").forward_time(0, 64) < estimate(
        chain, DEVICES["A100"]
    ).forward_time(0, 64)
    with pytest.raises(ProfileError, match="V100 has no rate for bfloat16, only for float32"):
        estimate(chain, DEVICES["V100"], "bfloat16")
    with pytest.raises(ProfileError, match="dtype 'float8' is unknown"):
        estimate(chain, DEVICES["V100"], "float8")


def test_a_table_of_rows_is_not_read_whole():
    table = Layer(
        name="embedding",
        kind="Embedding",
        in_shape=(16,),
        out_shape=(16, 64),
        flops_per_sample=16 * 64,
        parameters=(Parameter("embedding.weight", (1_000_000, 64)),),
    )
    profile = estimate(Chain("lookup", (table,), input_dtype="int"), DEVICES["V100"])
    assert profile.forward_time(0, 1) < 2 * DEVICES["V100"].overhead_s


# --- cached


def test_a_profile_is_kept_under_its_key(tmp_path):
    directory, profile = tmp_path / "deep" / "cache", estimate(linear_chain(), DEVICES["V100"])
    assert find(directory, "a") is None
    keep(directory, "a", profile)
    assert find(directory, "a") == profile
    assert find(directory, "b") is None
    assert len(list(directory.iterdir())) == 1


def test_a_broken_cache_is_replaced_and_a_read_only_one_does_without(tmp_path):
    profile = estimate(linear_chain(), DEVICES["V100"])
    path = tmp_path / "profile-a.json"
    path.write_text("{")
    assert find(tmp_path, "a") is None
    keep(tmp_path, "a", profile)
    assert Profile.load(path) == profile
    (tmp_path / "file").write_text("")
    keep(tmp_path / "file", "a", profile)


def test_keys_tell_apart_what_a_profile_depends_on(monkeypatch):
    chain = linear_chain()
    keys = {
        cache_key(chain, "cpu", "float32"),
        cache_key(linear_chain((8, 8)), "cpu", "float32"),
        cache_key(chain, "gpu", "float32"),
        cache_key(chain, "cpu", "float64"),
        cache_key(chain, "cpu", "float32", (1, 2)),
    }
    assert len(keys) == 5
    assert cache_key(chain, "cpu", "float32", (1, 2)) in keys
    for name, value in (("core_quota", lambda: 0.45), ("_METHOD", 0), ("SCHEMA_VERSION", 0)):
        with monkeypatch.context() as changed:
            changed.setattr(caching, name, value)
            assert cache_key(chain, "cpu", "float32", (1, 2)) not in keys
    monkeypatch.setattr(torch, "__version__", "0.1")
    assert cache_key(chain, "cpu", "float32", (1, 2)) not in keys


def test_the_cache_lies_where_xdg_says(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory() == tmp_path / "hybridpar"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_directory() == tmp_path / ".cache" / "hybridpar"


def test_a_cpu_with_a_quota_below_one_core_says_so(monkeypatch):
    assert device_name("cpu").startswith("cpu (")
    monkeypatch.setattr(caching, "core_quota", lambda: 0.45)
    assert "0.45 of a core" in device_name("cpu")


# --- the loader's rate


class Reading:
    """Samples of which each takes 10 ms of a clock to read."""

    labels = None

    def __init__(self, size):
        self.size, self.now, self.seen = size, 0.0, []

    def __len__(self):
        return self.size

    def read(self, indices, keys):
        assert len(indices) == len(keys)
        assert 0 <= indices.min() <= indices.max() < self.size
        self.now += 0.01 * len(indices)
        self.seen.append(indices)
        return Batch(torch.zeros(len(indices)), torch.zeros(len(indices), dtype=torch.int64))


@pytest.mark.parametrize("size", [3, 1000])
def test_the_rate_of_a_loader_is_that_of_its_reads(size):
    samples = Reading(size)
    assert samples_per_s(samples, lambda: samples.now) == pytest.approx(100)
    assert len({tuple(i) for i in samples.seen}) > 1 or np.size(samples.seen) < 100
