"""Timing strands at growing sizes, in rounds, within a time and a memory."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import chain, starmap

import torch
from torch import nn

from hybridpar.errors import ProfileError
from hybridpar.host import free_heap_bytes, packed_heap
from hybridpar.model.chain import Layer
from hybridpar.profiling.bench import Bench, Mark
from hybridpar.profiling.record import interpolate
from hybridpar.profiling.strands import (
    Job,
    Made,
    Strand,
    accumulation_pass,
    calls,
    gather_twice,
    make,
    make_input,
    timed_pass,
)
from hybridpar.profiling.workspace import RESOLUTION_BYTES, Bytes, Gauge, watched_pass

# Rounds through all sizes: so many must fit into the time, so many are enough, and further ones get a share of it.
LEAST_ROUNDS, MOST_ROUNDS, REFINE_SHARE = 3, 9, 0.6
# Passes timed in one visit of a size: as many as fit into so many seconds, up to a limit.
_VISIT_S, _VISIT_PASSES = 0.1, 5
# Memory is watched at sizes whose pass takes up to this share of the time; it grows along a line from there.
_WATCH_SHARE = 0.1
# A heap has settled when so many passes in a row did not make it grow.
_SETTLED_PASSES = 3
# At most so many are made, those beyond as long as they take no more than a share of the time that is left.
_MOST_SETTLING, _SETTLING_SHARE = 16, 0.03


@dataclass
class Entry:
    """One micro-batch size, and the strands that are timed at it."""

    size: int
    made: Made
    passes: list[list[float]] = field(default_factory=list)
    """Per pass: forward and backward seconds of the first strand's first layer, of its second, ..., of the next
    strand's first layer, ... The first pass, which warms up, is left out once there are others."""
    watched: dict[Strand, list[Bytes]] = field(default_factory=dict)
    heap_bytes: int | None = None
    """What the heap keeps for the first strand's passes, between them; None: unknown."""

    def columns(self, strand: Strand) -> list[list[float]]:
        """Forward and backward seconds of each layer of a strand, over all passes; none if it is not timed."""
        at = 0
        for other, modules in self.made:
            if other == strand:
                return [[row[i] for row in self.passes] for i in range(at, at + 2 * len(modules))]
            at += 2 * len(modules)
        return []

    def pass_s(self, strands: Sequence[Strand]) -> float:
        """Seconds of a pass through some strands."""
        return sum(statistics.median(column) for s in strands for column in self.columns(s))

    @property
    def strands(self) -> list[Strand]:
        """The strands that are timed."""
        return [strand for strand, _ in self.made]


@dataclass
class Timed:
    """All that was timed of a job."""

    entries: list[Entry]
    accumulate_s: list[float]
    """Per layer of the first strand: adding its gradients to those that are there."""
    copy_s_per_byte: float


@contextmanager
def run_job(
    bench: Bench, job: Job, sizes: Sequence[int], share_s: float, gauge: Gauge | None
) -> Iterator[tuple[Timed, Made]]:
    """Time the strands at as many of ``sizes`` as ``share_s`` and memory allow; their copies live in the context.

    Where the first strand of several has to stop, the others go on alone. Times are taken in rounds through all
    sizes: what keeps the machine busy for a while spoils no size whole. Raises ProfileError where not even the
    first size fits into memory, on all ranks alike.
    """
    began, memory_bytes, made = time.perf_counter(), bench.memory_bytes(), Made()
    try:
        entries = _grow(bench, job, sizes, began + share_s, memory_bytes, gauge, made)
        accumulate, copy = _rounds(bench, entries, began, share_s)
        yield Timed(entries, accumulate, copy), made
    finally:
        nn.ModuleList(chain(*(modules for _, modules in made))).to_empty(device="meta")
        torch.cuda.empty_cache()


def _grow(
    bench: Bench,
    job: Job,
    sizes: Sequence[int],
    end_s: float,
    memory_bytes: float,
    gauge: Gauge | None,
    made: Made,
) -> list[Entry]:
    """Visit one size after the other for the first time."""
    active, entries = list(job), list[Entry]()
    for number, size in enumerate(sizes):
        while active:
            # Beside a chain, single layers are timed at every other size.
            chosen = active[:1] if number % 2 and len(active[0].layers) > 1 else active
            next_s, why = _obstacle(bench, job, chosen, entries, size, end_s, memory_bytes)
            why, entry = _agreed(bench, why), None
            if not why:
                try:
                    made.extend([] if made else make(job, bench))
                    watching = gauge if next_s <= _WATCH_SHARE * _left_s(end_s) else None
                    settling_s = _SETTLING_SHARE * _left_s(end_s)
                    entry = _first_visit(bench, [p for p in made if p[0] in chosen], size, watching, settling_s)
                except torch.OutOfMemoryError:
                    why = "runs out of memory"
                why = _agreed(bench, why)
            if entry is not None and not why:
                entries.append(entry)
                bench.progress(f"micro-batch {size}: {_label(chosen)}, {_left_s(end_s):.0f} s left")
                break
            if not entries:
                raise ProfileError(f"micro-batch {size} does not fit into memory: {_label(active)} {why}")
            bench.note(f"profile ends before micro-batch {size}: {_label(active)} {why}")
            active = active[1:] if len(active[0].layers) > 1 else []
    return entries


def _agreed(bench: Bench, why: str) -> str:
    """Return the first reason that any rank has."""
    return next(filter(None, map(str, bench.meet(why))), "")


def _label(active: Sequence[Strand]) -> str:
    first = active[0].layers
    if len(first) > 1:
        return f"chain of {len(first)} layers"
    return "linear layers" if len({s.layers for s in active}) > 1 else f"layer {first[0].kind}"


def _left_s(end_s: float) -> float:
    return max(0.0, end_s - time.perf_counter())


def _obstacle(
    bench: Bench,
    job: Job,
    active: list[Strand],
    entries: list[Entry],
    size: int,
    end_s: float,
    memory_bytes: float,
) -> tuple[float, str]:
    """Return how long a pass of a size will take, and why it cannot be timed; no reason if it can."""
    item_bytes = bench.dtype.itemsize
    need = need_bytes(job, active, size, item_bytes) + _workspace_bytes(active, entries, size, item_bytes)
    if need > memory_bytes:
        return 0.0, f"needs about {need / 1e9:.2g} GB and may fill {memory_bytes / 1e9:.2g}"
    if not entries:
        return 0.0, ""
    next_s = sum(_expected_s(entries, strand, size) for strand in active)
    rounds_s = LEAST_ROUNDS * sum(_visit_s(e.pass_s(e.strands)) for e in entries)
    rounds_s += (LEAST_ROUNDS + 2) * _visit_s(next_s)
    if time.perf_counter() + rounds_s * bench.stretch > end_s:
        return next_s, f"would take more than the {_left_s(end_s):.3g} s that are left"
    return next_s * bench.stretch, ""


def _expected_s(entries: list[Entry], strand: Strand, size: int) -> float:
    """Seconds of a pass of a strand at a size to come."""
    known = [(e.size, e.pass_s([strand])) for e in entries if strand in e.strands]
    return interpolate(tuple(s for s, _ in known), tuple(t for _, t in known), size)


def need_bytes(job: Job, active: Sequence[Strand], samples: int, item_bytes: int) -> float:
    """Bytes of parameters, gradients, one gradient to be added; activations, saved values, a layer's gradients."""
    main = next(iter(job))
    counts, made = [layer.parameter_count for layer in main.layers], [_made(layer) for layer in main.layers]
    moving = max(_moving_bytes(strand.layers, samples, item_bytes) for strand in active)
    return (2 * sum(counts) + max(made)) * item_bytes + moving


def _made(layer: Layer) -> int:
    """Parameter elements whose gradients a backward makes before it adds them: not a linear layer's weight."""
    return sum(p.count for p in layer.parameters[layer.linear is not None :])


def _moving_bytes(layers: Sequence[Layer], samples: int, item_bytes: int) -> float:
    outs = sum(layer.out_elements for layer in layers if not layer.aliases_input)
    widest = max(layer.in_elements + layer.out_elements for layer in layers)
    elements = samples * (layers[0].in_elements + outs + widest)
    return elements * item_bytes + sum(layer.saved.total_bytes(samples, item_bytes) for layer in layers)


def _beyond_gradient(entry: Entry, strand: Strand, item_bytes: int) -> float:
    pairs = zip(strand.layers, entry.watched.get(strand, ()), strict=False)
    return max((max(b.forward, b.backward - _made(layer) * item_bytes) for layer, b in pairs), default=0.0)


def _workspace_bytes(active: Sequence[Strand], entries: list[Entry], size: int, item_bytes: int) -> float:
    """Greatest workspace of a layer at a size to come, along the line of the sizes that were watched.

    Without the parameters' gradient in a backward's workspace, which is in ``need_bytes`` already.
    """
    known = [(e.size, max(_beyond_gradient(e, s, item_bytes) for s in active)) for e in entries if e.watched]
    if not known:
        return 0.0
    return interpolate(tuple(s for s, _ in known), tuple(y for _, y in known), size)


def _timed(pass_s: float) -> int:
    """How many passes a visit times. One to warm up goes before, if they are several."""
    return min(_VISIT_PASSES, max(1, int(_VISIT_S / max(pass_s, 1e-6))))


def _visit_s(pass_s: float) -> float:
    return pass_s * (_timed(pass_s) + (_timed(pass_s) > 1))


def _first_visit(bench: Bench, made: Made, size: int, gauge: Gauge | None, settling_s: float) -> Entry:
    """Warm up a size with one pass, which says how long it takes, after those that watch its memory."""
    entry = Entry(size, made)
    for strand, modules in made if gauge else ():
        assert gauge is not None
        layers, x = calls(bench, strand, modules, size), make_input(bench, strand, size)
        resolution = 0 if bench.on_gpu else RESOLUTION_BYTES
        entry.watched[strand] = watched_pass(gauge, modules, layers, x, resolution)
    if gauge and not bench.on_gpu and len(made[0][0].layers) > 1:
        entry.heap_bytes = _heap_bytes(bench, *made[0], size, settling_s)
    entry.passes += visit(bench, entry, 0.0)
    return entry


def _heap_bytes(
    bench: Bench, strand: Strand, modules: Sequence[nn.Module], size: int, settling_s: float
) -> int | None:
    """Return the free bytes of the heap after passes of a chain: what they need, and what they cannot reuse.

    A training's steps grow it for a while, as their blocks do not fall into the same holes every time.
    """
    end_s, found = time.perf_counter() + settling_s, list[int]()
    while len(found) < _MOST_SETTLING and (len(found) < _SETTLED_PASSES or time.perf_counter() < end_s):
        timed_pass(bench, calls(bench, strand, modules, size), make_input(bench, strand, size))
        free = free_heap_bytes()
        if free is None:
            return None
        found.append(free)
        if len(found) > _SETTLED_PASSES and found[-1] <= found[-1 - _SETTLED_PASSES]:
            break
    return max(found)


def visit(bench: Bench, entry: Entry, pass_s: float) -> list[list[float]]:
    """Seconds of a few passes through all strands of an entry, given those of one; 0: one pass, to warm up."""
    runs = [(s, calls(bench, s, modules, entry.size)) for s, modules in entry.made]

    def run() -> list[tuple[Mark, Mark]]:
        marks = []
        for strand, layers in runs:
            # A layer alone: in a model, others' activations would fill the heap.
            with nullcontext() if bench.on_gpu or len(strand.layers) > 1 else packed_heap():
                marks += timed_pass(bench, layers, make_input(bench, strand, entry.size))
        return marks

    count = _timed(pass_s) if pass_s else 1
    if count > 1:
        run()
        bench.wait()
    with bench.visiting():
        passes = [run() for _ in range(count)]
    return [[bench.seconds(*pair) for pair in row] for row in passes]


def _rounds(bench: Bench, entries: list[Entry], began: float, share_s: float) -> tuple[list[float], float]:
    """Visit all sizes in rounds; returns what adding gradients takes per layer, and copying them per byte."""
    first = {id(entry): entry.passes for entry in entries}
    added, copied = list[list[float]](), list[float]()
    for number in range(MOST_ROUNDS):
        limit_s = share_s * (1.0 if number < LEAST_ROUNDS else REFINE_SHARE)
        round_s = sum(_visit_s(e.pass_s(e.strands)) for e in entries) * bench.stretch
        over = number > 0 and time.perf_counter() - began + round_s > limit_s
        if any(bench.meet(over)):
            break
        for entry in entries:
            bench.meet(None)
            pass_s = entry.pass_s(entry.strands)
            kept = [] if entry.passes is first[id(entry)] else entry.passes
            entry.passes = kept + visit(bench, entry, pass_s)
        added.append(_accumulation(bench, entries[0]))
        copied.append(_copying(bench, entries[0]))
        bench.progress(f"round {number + 1} through {len(entries)} sizes: {time.perf_counter() - began:.0f} s")
    if len(added) < LEAST_ROUNDS:
        bench.note(f"every size was timed in {len(added)} rounds instead of {LEAST_ROUNDS}: the time was over")
    typical = [max(0.0, statistics.median(column)) for column in zip(*added, strict=True)]
    return typical, statistics.median(copied)


def _accumulation(bench: Bench, entry: Entry) -> list[float]:
    """Seconds per layer of the first strand that its gradients take to be added to those that are there."""
    strand, modules = entry.made[0]
    layers, x = calls(bench, strand, modules, entry.size), make_input(bench, strand, entry.size)
    spans = accumulation_pass(bench, modules, layers, x)
    doubled = [
        gather_twice(bench, module, entry.size * math.prod(layer.in_shape[:-1]), bench.autocast)
        for layer, module in zip(strand.layers, modules, strict=True)
    ]
    bench.wait()
    added_s = [sum(starmap(bench.seconds, own)) for own in spans]
    for own, pair in enumerate(doubled):
        if pair is not None:
            adding_s, overwriting_s = starmap(bench.seconds, pair)
            added_s[own] = adding_s - overwriting_s
    return added_s


def _copying(bench: Bench, entry: Entry) -> float:
    """Seconds per byte that the first strand's gradients take to be copied to memory that was used before."""
    gradients = {id(p.grad): p.grad for m in entry.made[0][1] for p in m.parameters() if p.grad is not None}
    total = sum(g.nbytes for g in gradients.values())
    place = torch.zeros(
        max((g.nbytes for g in gradients.values()), default=0), dtype=torch.uint8, device=bench.device
    )
    begin = bench.mark()
    for gradient in gradients.values():
        place[: gradient.nbytes].view(gradient.dtype).view_as(gradient).copy_(gradient)
    end = bench.mark()
    bench.wait()
    return bench.seconds(begin, end) / total if total else 0.0
