"""A profile of the device at hand: every layer's forward and backward, timed at several micro-batch sizes."""

from __future__ import annotations

import itertools
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from hybridpar.cluster.describe import core_quota, usable_memory_bytes
from hybridpar.cluster.devices import device as preset
from hybridpar.errors import ProfileError
from hybridpar.model.chain import Chain, Layer, Parameter
from hybridpar.model.copies import blank
from hybridpar.model.footprint import set_keys
from hybridpar.model.keyed import Keys
from hybridpar.profiling.analytic import ITEM_BYTES, estimate
from hybridpar.profiling.record import LayerProfile, Profile

MICRO_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
FRACTIONS = (1.0, 0.5, 0.25)

_MIN_REPEATS, _MAX_REPEATS = 3, 20
# Seconds after which more repeats of one point no longer sharpen its median enough to pay.
_POINT_S = 0.2
# Runs of a layer per point at least: the repeats, and two to warm up.
_LEAST_RUNS = _MIN_REPEATS + 2
# Share of the free memory that a layer under measurement may fill.
_MEMORY_SHARE = 0.8
# Parameters of the timed optimizer step and elements of the timed loss: larger than caches of a few cores, small
# enough to take milliseconds.
_UPDATE_BYTES = 8 << 20
_LOSS_ELEMENTS = 1 << 19


@dataclass(frozen=True)
class _Job:
    """One distinct layer at one share of its features, to be timed once for all layers like it."""

    layer: Layer
    share: float
    first: bool
    """The model's first layer: its input needs no gradient."""
    integers: bool
    """The input is token ids."""


@dataclass(frozen=True)
class _Bench:
    """Where and how to time."""

    device: torch.device
    dtype: torch.dtype

    def seconds(self, passes: Sequence[Callable[[], None]], repeats: int) -> tuple[float, ...]:
        """Median seconds of each of ``passes``, run in turn ``repeats`` times.

        On a GPU between events on its stream, so that what the host does while the GPU is busy costs nothing, as
        in training; on a CPU by the clock.
        """
        if self.device.type == "cuda":
            return self._seconds_cuda(passes, repeats)
        rounds = []
        for _ in range(repeats):
            marks = [time.perf_counter()]
            for run in passes:
                run()
                marks.append(time.perf_counter())
            rounds.append([b - a for a, b in itertools.pairwise(marks)])
        return tuple(statistics.median(column) for column in zip(*rounds, strict=True))

    def _seconds_cuda(self, passes: Sequence[Callable[[], None]], repeats: int) -> tuple[float, ...]:
        rounds = []
        for _ in range(repeats):
            events = [
                torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
                for _ in range(len(passes) + 1)
            ]
            events[0].record()
            for run, event in zip(passes, events[1:], strict=True):
                run()
                event.record()
            rounds.append(events)
        torch.cuda.synchronize(self.device)
        table = [[a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(row)] for row in rounds]
        return tuple(statistics.median(column) for column in zip(*table, strict=True))

    def free_bytes(self) -> int:
        """Memory that is free on the device."""
        if self.device.type == "cuda":
            return int(torch.cuda.mem_get_info(self.device)[0])
        return usable_memory_bytes()


def measure(
    modules: Sequence[nn.Module],
    chain: Chain,
    device: str | torch.device = "cpu",
    dtype: str = "float32",
    micro_batches: Sequence[int] = MICRO_BATCHES,
    fractions: Sequence[float] = FRACTIONS,
    budget_s: float = 60.0,
    report: Callable[[str], None] = lambda _: None,
) -> Profile:
    """Time every layer of ``chain`` on ``device``: seconds of its forward and backward per micro-batch size.

    ``modules`` has one module per layer, which maps one tensor (samples, *in_shape) to one tensor; parameters may
    be on the meta device. Each distinct layer is copied to ``device`` with small random values, timed, and freed;
    equal layers share one timing. Backwards add onto existing gradients, as all micro-batches but a step's first
    do; the time to enter autograd is taken off, as a stage enters it once for all its layers. A CPU is timed on
    one thread. Linear layers are also timed with ``fractions`` of their output features.

    ``budget_s`` is spread over the layers by an estimate of their cost. The profile ends before the first
    micro-batch size that exceeds a layer's share or the free memory; ``report`` is told so. The first size is
    always timed. Raises ProfileError where ``modules`` do not fit ``chain``, ``dtype`` is unknown, or even the
    first size does not fit into memory.
    """
    if len(modules) != len(chain.layers):
        raise ProfileError(f"{len(modules)} modules do not fit the {len(chain.layers)} layers of {chain.model}")
    if dtype not in ITEM_BYTES:
        raise ProfileError(f"dtype {dtype!r} is unknown; use {', '.join(ITEM_BYTES)}")
    sizes = tuple(micro_batches)
    bench = _Bench(torch.device(device), getattr(torch, dtype))
    jobs = _jobs(modules, chain, tuple(fractions))
    weights = _weights(jobs, chain, sizes)
    remaining_s, remaining_weight = budget_s, sum(weights.values())
    times: dict[_Job, list[tuple[float, float]]] = {}
    with _undisturbed(bench.device):
        entry_s = _time_entry(bench)
        for job in sorted(jobs, key=weights.__getitem__, reverse=True):
            share_s = remaining_s * weights[job] / remaining_weight
            began = time.perf_counter()
            times[job] = _time_job(bench, job, jobs[job], sizes, share_s, entry_s, report)
            sizes = sizes[: len(times[job])]
            remaining_s = max(0.0, remaining_s - (time.perf_counter() - began))
            remaining_weight -= weights[job]
        update_s_per_byte = _time_update(bench)
        loss_s_per_element = _time_loss(bench, chain.out_shape[0] if chain.out_shape else 1)
    return Profile(
        chain=chain.fingerprint,
        source="measured",
        device=device_name(bench.device),
        dtype=dtype,
        micro_batches=sizes,
        fractions=tuple(fractions),
        layers=tuple(
            _layer_profile(layer, [times[job] for job in _jobs_of(chain, i, tuple(fractions))], len(sizes))
            for i, layer in enumerate(chain.layers)
        ),
        update_s_per_byte=update_s_per_byte,
        loss_s_per_element=loss_s_per_element,
    )


def device_name(device: str | torch.device) -> str:
    """Name of the device's hardware, for the profile and its cache key."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    facts = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")][:1] or [
        platform.machine()
    ]
    if core_quota() < 1:
        facts.append(f"{core_quota():g} of a core")
    return f"cpu ({', '.join(facts)})"


def _jobs_of(chain: Chain, index: int, fractions: tuple[float, ...]) -> list[_Job]:
    """Jobs of one layer, one per share; names are left out, so that equal layers have equal jobs."""
    layer = chain.layers[index]
    nameless = replace(
        layer, name="", parameters=tuple(Parameter(str(i), p.shape) for i, p in enumerate(layer.parameters))
    )
    integers = index == 0 and chain.input_dtype == "int"
    return [_Job(nameless, share, index == 0, integers) for share in (fractions if layer.linear else (1.0,))]


def _jobs(modules: Sequence[nn.Module], chain: Chain, fractions: tuple[float, ...]) -> dict[_Job, nn.Module]:
    """Distinct jobs, each with a module to copy."""
    return {job: module for i, module in enumerate(modules) for job in _jobs_of(chain, i, fractions)}


def _weights(jobs: dict[_Job, nn.Module], chain: Chain, sizes: tuple[int, ...]) -> dict[_Job, float]:
    """Relative cost of timing each job, from the roofline of a CPU core; any device orders layers about alike."""
    core = preset("cpu_core")
    weights = {}
    for job in jobs:
        alone = replace(chain, layers=(job.layer,), tied=())
        costs = estimate(alone, core, "float32", sizes, (1.0,)).layers[0]
        weights[job] = job.share * (sum(costs.forward_s[0]) + sum(costs.backward_s[0]))
    return weights


def _layer_profile(layer: Layer, rows: list[list[tuple[float, float]]], count: int) -> LayerProfile:
    forward, backward = (tuple(tuple(point[k] for point in row[:count]) for row in rows) for k in (0, 1))
    return LayerProfile(layer.name, forward, backward)


@contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """Run on one CPU thread, as a rank on a CPU does, and leave thread count and random state as they were."""
    before = torch.get_num_threads()
    try:
        if device.type == "cpu":
            torch.set_num_threads(1)
        on_gpu = device.type == "cuda"
        current = torch.cuda.device(device) if on_gpu else nullcontext()
        with current, torch.random.fork_rng(devices=[device] if on_gpu else []):
            yield
    finally:
        torch.set_num_threads(before)


def _time_job(
    bench: _Bench,
    job: _Job,
    module: nn.Module,
    sizes: tuple[int, ...],
    share_s: float,
    entry_s: float,
    report: Callable[[str], None],
) -> list[tuple[float, float]]:
    """(forward, backward) seconds for as many of ``sizes`` as time and memory allow, at least one."""
    began, points = time.perf_counter(), list[tuple[float, float]]()
    kind = job.layer.kind
    copied: nn.Module | None = None
    try:
        for size in sizes:
            need = _need_bytes(job, size, bench.dtype.itemsize)
            if need > _MEMORY_SHARE * bench.free_bytes():
                report(f"profile ends before micro-batch {size}: layer {kind} needs about {need / 1e9:.1f} GB")
                break
            if copied is None:
                copied = _real_copy(job, module, bench)
            left_s = share_s - (time.perf_counter() - began)
            if points and _LEAST_RUNS * _expected_s(sizes, points) > left_s:
                report(f"profile ends before micro-batch {size}: it takes layer {kind} over its {share_s:.2f} s")
                break
            part_s = left_s * size / sum(sizes[len(points) :])
            forward_s, backward_s = _time_point(bench, job, copied, size, part_s)
            points.append((forward_s, max(0.0, backward_s - entry_s)))
    except torch.OutOfMemoryError:
        report(f"profile ends before micro-batch {sizes[len(points)]}: out of memory in layer {kind}")
    finally:
        if copied is not None:
            copied.to_empty(device="meta")
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
    if not points:
        raise ProfileError(
            f"layer {kind} does not fit into memory at micro-batch {sizes[0]}; profile smaller ones"
        )
    return points


def _expected_s(sizes: tuple[int, ...], points: list[tuple[float, float]]) -> float:
    """Seconds of a forward and backward at the next size: on the line through the last two points."""
    totals = [sum(point) for point in points]
    if len(totals) == 1:
        return totals[0]
    before, last, following = sizes[len(totals) - 2 : len(totals) + 1]
    return max(totals[-1], totals[-1] + (totals[-1] - totals[-2]) * (following - last) / (last - before))


def _need_bytes(job: _Job, samples: int, item_bytes: int) -> float:
    """Bytes to time a layer: parameters with two gradients, input and output with gradients, saved values."""
    layer = job.layer
    elements = 3 * layer.parameter_count + 2 * samples * (layer.in_elements + layer.out_elements)
    return elements * item_bytes + layer.saved.total_bytes(samples, item_bytes)


def _real_copy(job: _Job, module: nn.Module, bench: _Bench) -> nn.Module:
    """Copy a layer to the device in training mode with small random parameters; a linear one with its share.

    Buffers are zeros: indices that every table has, and statistics that training mode does not read.
    """
    linear = job.layer.linear
    if linear is not None and job.share < 1.0:
        columns = max(1, round(linear.out_features * job.share))
        copied: nn.Module = nn.Linear(linear.in_features, columns, bias=linear.bias, device=bench.device)
    else:
        copied = blank(module, str(bench.device))
    copied = copied.to(dtype=bench.dtype).train()
    with torch.no_grad():
        for parameter in copied.parameters():
            bound = 1.0 / math.sqrt(max(1, parameter[0].numel() if parameter.ndim else 1))
            parameter.uniform_(-bound, bound)
            parameter.grad = torch.zeros_like(parameter)
    return copied


def _time_entry(bench: _Bench) -> float:
    """Seconds to enter autograd for a backward through next to nothing."""
    x = torch.ones(1, device=bench.device, dtype=bench.dtype, requires_grad=True)
    ones, held = torch.ones_like(x), [x]

    def prepare() -> None:
        x.grad = None
        held[0] = x.clone()

    def backward() -> None:
        torch.autograd.backward([held[0]], [ones])

    bench.seconds((prepare, backward), 2)
    return bench.seconds((prepare, backward), _MAX_REPEATS)[1]


def _time_point(bench: _Bench, job: _Job, module: nn.Module, size: int, left_s: float) -> tuple[float, float]:
    """(forward, backward) seconds of ``module`` for ``size`` samples, in about ``left_s`` seconds.

    Each repeat works on a fresh copy of the input: a layer may work in place, which autograd forbids on a leaf.
    """
    x = _input(bench, job, size)
    set_keys(module, _keys(size, bench.device))
    try:
        out = module(x.clone())
    except ValueError:
        if not job.layer.batch_norm or size > 1:
            raise
        # One sample of one position has no batch statistics; two take about as long.
        x = _input(bench, job, 2)
        set_keys(module, _keys(2, bench.device))
        out = module(x.clone())
    gradient = torch.rand_like(out)
    held = [x, out]
    del out

    def prepare() -> None:
        x.grad = None
        held[:] = [x.clone(), x]

    def forward() -> None:
        held[1] = module(held[0])

    def backward() -> None:
        if held[1].requires_grad:
            torch.autograd.backward([held[1]], [gradient])

    passes = (prepare, forward, backward)
    began = time.perf_counter()
    bench.seconds(passes, 1)
    warm_s = max(time.perf_counter() - began, 1e-6)
    repeats = min(_MAX_REPEATS, max(_MIN_REPEATS, int(min(left_s, _POINT_S) / warm_s)))
    _, forward_s, backward_s = bench.seconds(passes, repeats)
    return forward_s, backward_s


def _input(bench: _Bench, job: _Job, size: int) -> torch.Tensor:
    """Random input (size, *in_shape); token ids lie below 2, which every vocabulary has."""
    shape = (size, *job.layer.in_shape)
    if job.integers:
        return torch.randint(0, 2, shape, device=bench.device)
    x = torch.rand(shape, device=bench.device, dtype=bench.dtype)
    return x.requires_grad_(not job.first)


def _keys(samples: int, device: torch.device) -> Keys:
    return Keys(seed=0, step=0, sample_ids=torch.arange(samples, device=device))


def _time_update(bench: _Bench) -> float:
    """Seconds per byte of parameters of an SGD step with momentum."""
    count = 8
    shape = (_UPDATE_BYTES // bench.dtype.itemsize // count,)
    parameters = [nn.Parameter(torch.rand(shape, device=bench.device, dtype=bench.dtype)) for _ in range(count)]
    for parameter in parameters:
        parameter.grad = torch.rand_like(parameter)
    optimizer = torch.optim.SGD(parameters, lr=1e-3, momentum=0.9)

    def step() -> None:
        optimizer.step()

    bench.seconds((step,), 2)
    return bench.seconds((step,), _MAX_REPEATS)[0] / _UPDATE_BYTES


def _time_loss(bench: _Bench, classes: int) -> float:
    """Seconds per logit of a summed softmax cross-entropy with its gradient."""
    samples = max(1, _LOSS_ELEMENTS // classes)
    logits = torch.rand(samples, classes, device=bench.device, dtype=bench.dtype, requires_grad=True)
    labels = torch.randint(0, classes, (samples,), device=bench.device)

    def loss() -> None:
        logits.grad = None
        torch.autograd.backward([F.cross_entropy(logits, labels, reduction="sum")])

    bench.seconds((loss,), 2)
    return bench.seconds((loss,), _MAX_REPEATS)[0] / logits.numel()
