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
from hybridpar.profiling import cache as caching
from hybridpar.profiling import measure as measuring
from hybridpar.profiling.analytic import estimate
from hybridpar.profiling.cache import cache_directory, cache_key, cached, device_name
from hybridpar.profiling.measure import measure
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


class Clock:
    """A bench whose time passes only where a layer says so."""

    now = 0.0

    def mark(self):
        return self.now


class Slow(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, clock, forward_s, backward_s):
        ctx.clock, ctx.backward_s = clock, backward_s
        clock.now += forward_s
        return x + weight

    @staticmethod
    def backward(ctx, gradient):
        ctx.clock.now += ctx.backward_s
        return gradient, gradient.sum(), None, None, None


def test_a_pass_gives_each_layer_its_own_time():
    clock, weight = Clock(), nn.Parameter(torch.ones(()))
    times = [(1.0, 4.0), (2.0, 8.0), (16.0, 32.0)]

    def twice(x):
        clock.now += 64.0
        return Slow.apply(x, weight, clock, 0.0, 128.0) + Slow.apply(x, weight, clock, 0.0, 256.0)

    layers = [lambda x, t=t: Slow.apply(x, weight, clock, *t) for t in times] + [nn.Identity(), twice]
    spans = measuring._pass(clock, layers, torch.rand(2, 3))
    seconds = [measuring._seconds(*span) for span in spans]
    assert seconds == [1.0, 4.0, 2.0, 8.0, 16.0, 32.0, 0.0, 0.0, 64.0, 384.0]


def test_a_layer_without_gradient_has_no_backward():
    clock, weight = Clock(), nn.Parameter(torch.ones(()))
    layers = [torch.neg, lambda x: Slow.apply(x, weight, clock, 1.0, 2.0)]
    assert [measuring._seconds(*span) for span in measuring._pass(clock, layers, torch.rand(2))] == [0, 0, 1, 2]
    assert [measuring._seconds(*span) for span in measuring._pass(clock, [torch.neg], torch.rand(2))] == [0, 0]


def test_a_view_changed_in_place_moves_time_to_a_neighbour_and_loses_none():
    clock, weight = Clock(), nn.Parameter(torch.ones(()))

    def slow(x):
        return Slow.apply(x, weight, clock, 1.0, 2.0)

    layers = [slow, slow, nn.Flatten(), nn.Dropout(inplace=True), slow]
    spans = measuring._pass(clock, layers, torch.rand(2, 2, 2))
    assert sum(measuring._seconds(*span) for span in spans) == 9.0


def test_a_share_is_scaled_by_what_the_whole_layer_takes_longer_in_the_model():
    whole = [[9.0, 9.0, 4.0, 3.0], [9.0, 9.0, 8.0, 5.0], [0.0, 0.0, 0.0, 0.0]]
    alone = [[[2.0, 3.0], [2.0, 0.0]], [[1.0, 2.0], [1.5, 1.0]]]
    entry = measuring._layer_profile("fc", 1, whole, alone, 2)
    assert entry.forward_s == ((4.0, 8.0), (2.0, 6.0))
    assert entry.backward_s == ((3.0, 5.0), (2.0, 1.0))
    assert measuring._layer_profile("relu", 1, whole, [], 2).forward_s == ((4.0, 8.0),)
    assert measuring._layer_profile("fc", 1, None, alone, 2).backward_s == ((3.0, 0.0), (2.0, 1.0))


def spied(monkeypatch, name):
    """Calls of a function of the module: its arguments and what it returned."""
    calls, function = [], getattr(measuring, name)

    def spy(*args):
        result = function(*args)
        calls.append((args, result))
        return result

    monkeypatch.setattr(measuring, name, spy)
    return calls


def test_layers_are_timed_in_the_model_and_shares_next_to_it_in_rounds(monkeypatch):
    model = traced(convolutional())
    visits, copied = spied(monkeypatch, "_visit"), spied(monkeypatch, "_real_copies")
    measure(model.modules, model.chain, micro_batches=SIZES, fractions=(1.0, 0.5), budget_s=30)
    sizes = [args[2] for args, _ in visits]
    assert sizes == list(SIZES) * (len(sizes) // len(SIZES))
    assert len(sizes) >= 3 * len(SIZES)
    ((_, strands),) = copied
    assert [len(strand.layers) for strand, _ in strands] == [len(model.chain.layers), 1, 1, 1, 1]
    assert [strand.share for strand, _ in strands] == [1.0, 1.0, 0.5, 1.0, 0.5]
    whole, wide, narrow = (modules for _, modules in strands[:3])
    assert wide[0] in whole
    assert narrow[0].out_features == wide[0].out_features // 2
    assert all(p.is_meta for _, modules in strands for module in modules for p in module.parameters())


def test_a_model_beyond_the_memory_is_timed_layer_by_layer(monkeypatch):
    model = traced(convolutional())
    jobs = spied(monkeypatch, "_time_job")
    whole = measuring._Strand(model.chain.layers, False)
    need = measuring._need_bytes({whole: list(model.modules)}, 1, 4)
    monkeypatch.setattr(measuring, "usable_memory_bytes", lambda: need / 0.8)
    notes: list[str] = []
    profile = measure(
        model.modules, model.chain, micro_batches=(1,), fractions=(1.0, 0.5), budget_s=5, report=notes.append
    )
    assert "chain of 12 layers needs about" in notes[0]
    assert "one by one" in notes[0]
    strands = [strand for (_, job, *_), _ in jobs for strand in job]
    # Distinct: 2 convolutions, 1 batch norm, 1 relu, pool, flatten, 2 linear layers x 2 shares, dropout.
    assert len(strands) == len(set(strands)) == 11
    first, second, third = (
        replace(times, name="")
        for times, layer in zip(profile.layers, model.chain.layers, strict=True)
        if layer.kind == "Conv2d"
    )
    assert second == third != first


def test_a_module_that_two_layers_share_is_measured():
    relu = nn.ReLU()
    model = traced(nn.Sequential(nn.Linear(4, 4), relu, nn.Linear(4, 4), relu), (4,))
    profile = measure(model.modules, model.chain, micro_batches=(1,), budget_s=1)
    assert len(profile.layers) == 4


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
    limit = measuring._need_bytes({measuring._Strand(model.chain.layers, False): []}, 2, 4) / 0.8 + 1
    monkeypatch.setattr(measuring, "usable_memory_bytes", lambda: limit)
    notes: list[str] = []
    profile = measure(
        model.modules, model.chain, micro_batches=(1, 2, 100), fractions=(1.0,), budget_s=5, report=notes.append
    )
    assert profile.micro_batches == (1, 2)
    assert "profile ends before micro-batch 100: layer Linear needs about" in notes[0]
    monkeypatch.setattr(measuring, "usable_memory_bytes", lambda: 100)
    with pytest.raises(ProfileError, match="micro-batch 1 does not fit into memory: layer Linear needs about"):
        measure(model.modules, model.chain, micro_batches=SIZES, budget_s=5)


def test_running_out_of_memory_ends_the_profile(monkeypatch):
    model = traced(nn.Sequential(nn.Linear(10, 10)), (10,))
    visit = measuring._visit

    def limited(bench, strands, size, pass_s):
        if size > 2:
            raise torch.OutOfMemoryError
        return visit(bench, strands, size, pass_s)

    monkeypatch.setattr(measuring, "_visit", limited)
    notes: list[str] = []
    profile = measure(model.modules, model.chain, micro_batches=SIZES, budget_s=5, report=notes.append)
    assert profile.micro_batches == (1, 2)
    assert notes == ["profile ends before micro-batch 4: layer Linear runs out of memory"]


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
    monkeypatch.setattr(caching, "_METHOD", 0)
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
