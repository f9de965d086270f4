"""Profiles: the record, the roofline estimate, and measuring on a CPU. No test looks at absolute times."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn

from hybridpar.cluster.devices import DEVICES, device
from hybridpar.errors import ProfileError
from hybridpar.model.chain import Chain, Layer, Linear, Parameter
from hybridpar.model.trace import trace
from hybridpar.profiling import measure as measuring
from hybridpar.profiling.analytic import estimate
from hybridpar.profiling.cache import cache_directory, cache_key, cached
from hybridpar.profiling.measure import device_name, measure
from hybridpar.profiling.record import Profile

SIZES = (1, 2, 4)


def traced(module, in_shape=(1, 8, 8), input_dtype="float"):
    return trace(module, in_shape, "small", input_dtype)


def convolutional():
    with torch.device("meta"):
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(4, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(inplace=True),
            nn.Conv2d(4, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64, 32),
            nn.Dropout(),
            nn.Linear(32, 10),
        )


def linear_chain(features=(4096, 4096, 1000), dtype="float"):
    layers = tuple(
        Layer(
            name=f"fc{i}",
            kind="Linear",
            in_shape=(a,),
            out_shape=(b,),
            flops_per_sample=2 * a * b,
            parameters=(Parameter(f"fc{i}.weight", (b, a)),),
            saves_input=True,
            linear=Linear(a, b, False),
        )
        for i, (a, b) in enumerate(itertools.pairwise(features))
    )
    return Chain("mlp", layers, input_dtype=dtype)


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


# --- measured


def test_measuring_a_model_on_meta_gives_a_whole_profile():
    model = traced(convolutional())
    notes: list[str] = []
    profile = measure(
        model.modules, model.chain, micro_batches=SIZES, fractions=(1.0, 0.5), budget_s=30, report=notes.append
    )
    profile.check(model.chain)
    assert (profile.source, profile.dtype, profile.micro_batches) == ("measured", "float32", SIZES)
    assert notes == []
    for layer, times in zip(model.chain.layers, profile.layers, strict=True):
        assert layer.name == times.name
        assert len(times.forward_s) == len(times.backward_s) == (2 if layer.linear else 1)
        assert min(min(row) for row in times.forward_s) > 0
        assert min(min(row) for row in times.backward_s) >= 0
    assert profile.update_s_per_byte > 0
    assert profile.loss_s_per_element > 0


def test_measuring_changes_nothing():
    model = traced(convolutional())
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    measure(model.modules, model.chain, micro_batches=(1,), fractions=(1.0,), budget_s=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    assert all(p.is_meta and p.grad is None for module in model.modules for p in module.parameters())


def test_equal_layers_are_timed_once(monkeypatch):
    model = traced(convolutional())
    timed = []
    time_job = measuring._time_job

    def count(bench, job, *rest):
        timed.append(job)
        return time_job(bench, job, *rest)

    monkeypatch.setattr(measuring, "_time_job", count)
    profile = measure(model.modules, model.chain, micro_batches=(1, 2), fractions=(1.0, 0.5), budget_s=5)
    times = {layer.name: replace(layer, name="") for layer in profile.layers}
    kinds = [layer.kind for layer in model.chain.layers]
    convolutions = [i for i, kind in enumerate(kinds) if kind == "Conv2d"]
    assert len(convolutions) == 3
    first, second, third = (times[profile.layers[i].name] for i in convolutions)
    assert second == third != first
    # Distinct: 2 convolutions, 1 batch norm, 1 relu, pool, flatten, 2 linear layers x 2 shares, dropout.
    assert len(timed) == len(set(timed)) == 11


def test_integer_inputs_and_float64_are_measured():
    with torch.device("meta"):
        module = nn.Sequential(nn.Embedding(5, 8), nn.Flatten(), nn.Linear(32, 3))
    model = traced(module, (4,), "int")
    profile = measure(model.modules, model.chain, dtype="float64", micro_batches=(1, 2), budget_s=2)
    assert profile.dtype == "float64"
    assert len(profile.layers) == len(model.chain.layers)


def test_one_sample_has_no_batch_statistics_and_is_timed_as_two():
    with torch.device("meta"):
        module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    model = traced(module, (4,))
    assert measure(model.modules, model.chain, micro_batches=(1, 2), budget_s=2).micro_batches == (1, 2)


def test_a_spent_budget_ends_the_profile_and_is_reported():
    model = traced(convolutional())
    notes: list[str] = []
    profile = measure(model.modules, model.chain, micro_batches=SIZES, budget_s=0.0, report=notes.append)
    assert profile.micro_batches == (1,)
    assert "profile ends before micro-batch 2" in notes[0]


def test_memory_ends_the_profile_and_is_reported(monkeypatch):
    model = traced(nn.Sequential(nn.Linear(10, 10)), (10,))
    monkeypatch.setattr(measuring, "usable_memory_bytes", lambda: 2200)
    notes: list[str] = []
    profile = measure(model.modules, model.chain, micro_batches=(1, 2, 100), budget_s=5, report=notes.append)
    assert profile.micro_batches == (1, 2)
    assert "profile ends before micro-batch 100: layer Linear needs about" in notes[0]
    monkeypatch.setattr(measuring, "usable_memory_bytes", lambda: 100)
    with pytest.raises(ProfileError, match="layer Linear does not fit into memory at micro-batch 1"):
        measure(model.modules, model.chain, micro_batches=SIZES, budget_s=5)


def test_running_out_of_memory_ends_the_profile(monkeypatch):
    model = traced(nn.Sequential(nn.Linear(10, 10)), (10,))
    time_point = measuring._time_point

    def limited(bench, job, module, size, left_s):
        if size > 2:
            raise torch.OutOfMemoryError
        return time_point(bench, job, module, size, left_s)

    monkeypatch.setattr(measuring, "_time_point", limited)
    notes: list[str] = []
    profile = measure(model.modules, model.chain, micro_batches=SIZES, budget_s=5, report=notes.append)
    assert profile.micro_batches == (1, 2)
    assert "profile ends before micro-batch 4: out of memory in layer Linear" in notes[0]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_measuring_on_a_gpu(dtype):
    model = traced(convolutional())
    profile = measure(model.modules, model.chain, "cuda", dtype, micro_batches=SIZES, budget_s=20)
    assert profile.device == torch.cuda.get_device_name(0)
    assert profile.micro_batches == SIZES
    assert all(min(min(row) for row in layer.forward_s) > 0 for layer in profile.layers)


def test_what_does_not_fit_is_named():
    model = traced(convolutional())
    with pytest.raises(ProfileError, match="modules do not fit the"):
        measure(model.modules[1:], model.chain)
    with pytest.raises(ProfileError, match="dtype 'float8' is unknown"):
        measure(model.modules, model.chain, dtype="float8")


# --- cached


def test_a_profile_is_made_once_per_key(tmp_path):
    chain = linear_chain()
    made = []

    def make():
        made.append(1)
        return estimate(chain, DEVICES["V100"])

    first = cached(tmp_path / "deep" / "cache", "a", make)
    assert cached(tmp_path / "deep" / "cache", "a", make) == first
    assert len(made) == 1
    cached(tmp_path / "deep" / "cache", "b", make)
    assert len(made) == 2
    assert len(list((tmp_path / "deep" / "cache").iterdir())) == 2


def test_a_broken_cache_is_replaced_and_a_read_only_one_does_without(tmp_path):
    profile = estimate(linear_chain(), DEVICES["V100"])
    path = tmp_path / "profile-a.json"
    path.write_text("{")
    assert cached(tmp_path, "a", lambda: profile) == profile
    assert Profile.load(path) == profile
    (tmp_path / "file").write_text("")
    assert cached(tmp_path / "file", "a", lambda: profile) == profile


def test_keys_tell_apart_what_a_profile_depends_on():
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


def test_the_cache_lies_where_xdg_says(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory() == tmp_path / "hybridpar"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_directory() == tmp_path / ".cache" / "hybridpar"


def test_a_cpu_with_a_quota_below_one_core_says_so(monkeypatch):
    assert device_name("cpu").startswith("cpu (")
    monkeypatch.setattr(measuring, "core_quota", lambda: 0.45)
    assert "0.45 of a core" in device_name("cpu")
