"""A profile of the device at hand: every layer's passes, timed at several micro-batch sizes as in training.

Layers run one after the other: one that runs alone finds its values in the caches again and again.
"""

from __future__ import annotations

import itertools
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from hybridpar.errors import ProfileError
from hybridpar.host import library_bytes
from hybridpar.model.chain import Chain
from hybridpar.profiling.analytic import ITEM_BYTES
from hybridpar.profiling.bench import Bench, Meeting, Report, alone, own_quota, silent, undisturbed
from hybridpar.profiling.cache import device_name
from hybridpar.profiling.record import LayerProfile, Profile
from hybridpar.profiling.rounds import Timed, run_job
from hybridpar.profiling.rows import Row, entry, rounded
from hybridpar.profiling.strands import Job, Strand, single, whole
from hybridpar.profiling.study import Study
from hybridpar.profiling.watch import SHARE, Watch, Watched, study_of, watch_strand
from hybridpar.profiling.workspace import Gauge, find_gauge

__all__ = ["FRACTIONS", "MICRO_BATCHES", "device_name", "measure"]

MICRO_BATCHES = (1, 2, 4, 8, 15, 16, 32, 64, 128)
"""15 beside 16: on one thread of a CPU torch 2.14 takes ``aten::_slow_conv2d_forward`` for small images of fewer
than 16 samples, which takes up to twice as long as oneDNN, so that a line from 8 to 16 misleads."""
FRACTIONS = (1.0, 0.5, 0.25)

# The timed optimizer step and loss: parameters where there are none of the model's, and logits.
_UPDATE_BYTES, _LOSS_ELEMENTS = 8 << 20, 1 << 19
# Timed optimizer steps, and the share of the memory that the stepped parameters may fill, states apart.
_STEPS, _UPDATE_SHARE = 5, 0.2
# A figure to doubt: its spread is above the first, and above the second as a share of its size's whole pass.
_DOUBTFUL_SPREAD, _DOUBTFUL_SHARE, _DOUBTS = 0.25, 0.02, 5
# A rank that got less than this share of what it may use was not alone.
_BUSY_SHARE = 0.9

MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


def _sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1e-3, momentum=0.9, fused=True)


def measure(
    modules: Sequence[nn.Module],
    chain: Chain,
    device: str | torch.device = "cpu",
    dtype: str = "float32",
    micro_batches: Sequence[int] = MICRO_BATCHES,
    fractions: Sequence[float] = FRACTIONS,
    budget_s: float = 60.0,
    report: Report = silent,
    *,
    progress: Report = silent,
    optimizer: MakeOptimizer = _sgd,
    meet: Meeting = alone,
    sharing: int = 1,
    watch: Watch | None = None,
) -> Profile:
    """Time every layer of ``chain`` on ``device``: seconds of its forward and backward per micro-batch size.

    ``modules`` has one module per layer, which maps one tensor (samples, *in_shape) to one tensor; parameters may
    be on the meta device. The model is copied to ``device`` with small random values, run as in training, and
    freed; on a CPU, on one thread, and with the C library keeping freed memory from then on, as in a run. Their
    backwards add to gradients, as all micro-batches but a step's first do. Where the whole model exceeds the
    memory, ``report`` is told, and each distinct layer is timed alone.

    Linear layers also run with ``fractions`` of their output features, and of their input features. As such layers
    stand in no model, they are timed alone, next to the whole layer alone. For each pass and size, the time at a
    share f is scaled by how much longer the whole layer takes in the model:
    T(f) = in_model(1) * alone(f) / alone(1). That also continues a linear layer to sizes at which the model is too
    slow to be timed.

    The profile ends before the first micro-batch size that exceeds ``budget_s`` or the free memory; ``report`` is
    told so. The first size is always timed. ``optimizer`` makes the one whose step is timed. Several ranks may
    measure at once, ``sharing`` of them on one machine's memory: they begin each size together and agree on when
    to stop through ``meet``. ``watch`` looks on while further passes run, at every size that was timed, for a
    share of the budget: the profile then holds a study.

    Raises ProfileError where ``modules`` do not fit ``chain``, ``dtype`` is unknown, or a layer does not fit into
    memory even at the first size.
    """
    if len(modules) != len(chain.layers):
        raise ProfileError(f"{len(modules)} modules do not fit the {len(chain.layers)} layers of {chain.model}")
    if dtype not in ITEM_BYTES:
        raise ProfileError(f"dtype {dtype!r} is unknown; use {', '.join(ITEM_BYTES)}")
    place = torch.device(device)
    bench = Bench(place, getattr(torch, dtype), report, progress, meet, sharing, own_quota(place))
    sizes, shares = tuple(micro_batches), tuple(fractions)
    with undisturbed(place):
        bench.channels_last = chain.memory_format is not None
        if chain.autocast is not None:
            bench.autocast = getattr(torch, chain.autocast)
        found = _Measurement(bench, modules, chain, shares, optimizer, watch).run(sizes, budget_s)
    return found.profile(sizes)


class _Measurement:
    """All strands of a chain, and what was measured of them."""

    def __init__(
        self,
        bench: Bench,
        modules: Sequence[nn.Module],
        chain: Chain,
        fractions: tuple[float, ...],
        optimizer: MakeOptimizer,
        watch: Watch | None,
    ) -> None:
        self.bench, self.chain, self.fractions, self.optimizer = bench, chain, fractions, optimizer
        self.watch, self.watched = watch, Watched()
        self.timing_share = 1.0 if watch is None else 1.0 - SHARE
        self.gauge: Gauge | None = find_gauge(bench)
        self.main = whole(chain)
        self.alone = [single(chain, i, fractions) for i in range(len(chain.layers))]
        self.jobs: dict[Strand, Job] = {
            strands[0]: {s: [m] for s in strands} for strands, m in zip(self.alone, modules, strict=True)
        }
        # Shares of one layer lie in the same memory: others run in between, so that none finds it in the caches.
        shared = zip(*(job.items() for job in self.jobs.values() if len(job) > 1), strict=True)
        self.together: Job = {self.main: list(modules)} | dict(itertools.chain.from_iterable(shared))
        self.timed: dict[Strand, Timed] = {}
        """By strand: the job that it was timed in."""
        self.update_s = self.copy_s = self.loss_s = 0.0
        self.library_bytes = 0

    def run(self, sizes: tuple[int, ...], budget_s: float) -> _Measurement:
        """Time all strands in about ``budget_s``."""
        began, before_bytes = time.perf_counter(), library_bytes()
        try:
            timing_s = self.timing_share * budget_s
            with run_job(self.bench, self.together, sizes, timing_s, self.gauge) as (timed, made):
                self.timed = dict.fromkeys(self.together, timed)
                self._look(self.main, timed, began + budget_s)
                self.copy_s = timed.copy_s_per_byte
                self.update_s = _time_update(self.bench, self.optimizer, made[0][1])
        except ProfileError as e:
            self.bench.note(f"{e}; layers are timed one by one, which makes them look faster than in the model")
            self._run_apart(sizes, began + budget_s)
            self.update_s = _time_update(self.bench, self.optimizer, [])
        self.loss_s = _time_loss(self.bench, self.chain.classes)
        self.library_bytes = max(0, library_bytes() - before_bytes)
        return self

    def _run_apart(self, sizes: tuple[int, ...], end_s: float) -> None:
        """Time jobs one by one until about ``end_s`` on the clock, cheap ones first: they leave time to others."""
        jobs = sorted(self.jobs.values(), key=lambda job: sum(s.layers[0].flops_per_sample * s.share for s in job))
        copy_s = []
        for number, job in enumerate(jobs):
            began = time.perf_counter()
            share_s = max(0.0, end_s - began) / (len(jobs) - number)
            with run_job(self.bench, job, sizes, self.timing_share * share_s, self.gauge) as (timed, _):
                self._look(next(iter(job)), timed, began + share_s)
                sizes = sizes[: len(timed.entries)]
                self.timed |= dict.fromkeys(job, timed)
                copy_s.append(timed.copy_s_per_byte)
        self.copy_s = max(copy_s)

    def _look(self, strand: Strand, timed: Timed, end_s: float) -> None:
        """Watch a strand until about ``end_s`` on the clock, if anybody watches."""
        if self.watch is not None:
            watch_strand(self.bench, self.watch, strand, timed.entries, end_s, self.watched)

    def study(self, layers: Sequence[LayerProfile], count: int) -> Study | None:
        """Return what was seen at the first ``count`` sizes, and note what stays unknown; None: nobody watched."""
        if self.watch is None:
            return None
        for gap in self.watch.gaps:
            self.bench.note(gap)
        whole_timed = self.main in self.timed
        places = [(self.main, i) if whole_timed else (self.alone[i][0], 0) for i in range(len(layers))]
        return study_of(self.watch, self.watched, places, layers, count)

    def profile(self, sizes: tuple[int, ...]) -> Profile:
        """Write down what was measured of ``sizes``, and name what is to be doubted."""
        bench, layers = self.bench, self.layers()
        count = max(len(row) for layer in layers for row in layer.forward_s)
        _doubt(bench, layers, sizes[:count])
        study = self.study(layers, count)
        return Profile(
            chain=self.chain.fingerprint,
            source="measured",
            device=device_name(bench.device),
            dtype=str(bench.dtype).removeprefix("torch."),
            micro_batches=sizes[:count],
            fractions=self.fractions,
            layers=layers,
            update_s_per_byte=rounded(self.update_s),
            loss_s_per_element=rounded(self.loss_s),
            copy_s_per_byte=rounded(self.copy_s),
            memory_source=self.gauge.source if self.gauge else None,
            device_kind="cuda" if bench.on_gpu else "cpu",
            library_bytes=0 if bench.on_gpu else self.library_bytes,
            heap_bytes=self.heap_bytes(),
            quota=bench.quota,
            core_share=None if bench.on_gpu else rounded(bench.busy_s / bench.passed_s),
            made_with=f"torch {torch.__version__}, Python {platform.python_version()}"
            + (f", CUDA {torch.version.cuda}" if bench.on_gpu else ", 1 thread"),
            notes=tuple(bench.notes),
            study=study,
        )

    def heap_bytes(self) -> tuple[float, ...]:
        """Return what the heap keeps for passes of the whole chain, as far as that was watched."""
        entries = self.timed[self.main].entries if self.main in self.timed else []
        known = itertools.takewhile(lambda found: found is not None, (entry.heap_bytes for entry in entries))
        return tuple(float(found) for found in known if found is not None)

    def layers(self) -> tuple[LayerProfile, ...]:
        """Put every layer's entry together, as :func:`measure` says."""
        return tuple(self._layer(i) for i in range(len(self.chain.layers)))

    def _layer(self, index: int) -> LayerProfile:
        name, (full, *narrow) = self.chain.layers[index].name, self.alone[index]
        if self.main not in self.timed:
            timed = self.timed[full]
            row, accumulate_s = Row.of(timed, full, 0), timed.accumulate_s[0]
        else:
            timed = self.timed[self.main]
            row, accumulate_s = Row.of(timed, self.main, index), timed.accumulate_s[index]
        if not narrow:
            return entry(name, [row], accumulate_s)
        single = Row.of(timed, full, 0)
        row = row.continued(single)
        by_cut = {
            cut: entry(
                name,
                [row, *(row.share(single, Row.of(timed, s, 0)) for s in narrow if s.cut == cut)],
                accumulate_s,
            )
            for cut in ("columns", "rows")
        }
        return replace(by_cut["columns"], by_rows=by_cut["rows"])


def _doubt(bench: Bench, layers: Sequence[LayerProfile], sizes: tuple[int, ...]) -> None:
    """Name the figures that vary, and a machine that was busy."""
    found = []
    for j, size in enumerate(sizes):
        figures = [
            (row[j], spreads[j], f"{kind} of layer {layer.name} at {size} samples")
            for layer in layers
            for kind, row, spreads in (
                ("forward", layer.forward_s[0], layer.forward_spread[0]),
                ("backward", layer.backward_s[0], layer.backward_spread[0]),
            )
            if j < len(row)
        ]
        least_s = _DOUBTFUL_SHARE * sum(seconds for seconds, _, _ in figures)
        found += [(wide, what) for s, wide, what in figures if wide > _DOUBTFUL_SPREAD and s * wide > least_s]
    for wide, what in sorted(found, reverse=True)[:_DOUBTS]:
        bench.note(f"{what}: its times spread by {wide:.0%}; is the machine busy?")
    if len(found) > _DOUBTS:
        bench.note(f"{len(found) - _DOUBTS} more figures spread like that")
    share = bench.busy_s / bench.passed_s if bench.passed_s else bench.quota
    if not bench.on_gpu and share < _BUSY_SHARE * bench.quota:
        bench.note(
            f"a rank got {share:.2g} of a core, of the {bench.quota:.2g} it may use: other processes ran, or "
            "the ranks outnumber the cores; times are those of a core of its own"
        )


def _time_update(bench: Bench, optimizer: MakeOptimizer, modules: Sequence[nn.Module]) -> float:
    """Seconds per byte of parameters of an optimizer step over the model's parameters, as far as memory goes."""
    distinct = {id(p): p for m in modules for p in m.parameters() if p.grad is not None}
    chosen, total = list[nn.Parameter](), 0
    limit = _UPDATE_SHARE * bench.memory_bytes()
    for parameter in distinct.values():
        if total + parameter.nbytes <= limit:
            chosen.append(parameter)
            total += parameter.nbytes
    if not chosen:
        values = torch.rand(8, _UPDATE_BYTES // bench.dtype.itemsize // 8, device=bench.device, dtype=bench.dtype)
        chosen, total = [nn.Parameter(row) for row in values], values.nbytes
        for parameter in chosen:
            parameter.grad = torch.rand_like(parameter)
    step = optimizer(chosen).step
    step()  # makes the states
    marks = [bench.mark()]
    for _ in range(_STEPS):
        step()
        marks.append(bench.mark())
    bench.wait()
    return statistics.median(map(bench.seconds, marks, marks[1:])) / total


def _time_loss(bench: Bench, classes: int) -> float:
    """Seconds per logit of a summed softmax cross-entropy with its gradient."""
    samples = max(1, _LOSS_ELEMENTS // classes)
    logits = torch.rand(samples, classes, device=bench.device, dtype=bench.dtype, requires_grad=True)
    labels = torch.randint(0, classes, (samples,), device=bench.device)

    def loss() -> None:
        logits.grad = None
        torch.autograd.backward([F.cross_entropy(logits, labels, reduction="sum")])

    return bench.median_s(loss) / logits.numel()
