"""One profile from those of several ranks that measured at the same time."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace

from hybridpar.errors import ProfileError
from hybridpar.profiling.record import LayerProfile, Profile, Table

_RANK_SPREAD = 0.15
"""Ranks whose speeds differ by more are told to the user."""


def combine(profiles: Sequence[Profile]) -> Profile:
    """Return the profile whose every figure is the median over the ranks' profiles, which are in rank order.

    Layers take as much longer as the slowest rank took over all of them: a step waits for its slowest rank, and
    equal ranks differ too. Ranks that differ by more than ``_RANK_SPREAD`` are not equal: theirs stay medians.

    Keeps how far ranks were apart per layer, and each rank's speed. Bytes of memory are the greatest. Raises
    ProfileError where ranks measured other sizes, chains or precisions, or on devices of another kind.
    """
    first = profiles[0]
    for field in ("chain", "dtype", "micro_batches", "fractions", "device_kind"):
        found = {getattr(p, field) for p in profiles}
        if len(found) > 1:
            raise ProfileError(
                f"the ranks' profiles differ in {field}: {sorted(map(str, found))}; profile on equal ranks"
            )
    layers = tuple(_layer(entries) for entries in zip(*(p.layers for p in profiles), strict=True))
    speeds = tuple(_speed(layers, p.layers) for p in profiles)
    notes = list(dict.fromkeys(note for p in profiles for note in p.notes))
    if max(speeds) > (1 + _RANK_SPREAD) * min(speeds):
        slow, fast = speeds.index(min(speeds)), speeds.index(max(speeds))
        notes.append(f"rank {fast} was {max(speeds) / min(speeds):.2f} times as fast as rank {slow}")
    else:
        layers = tuple(_slower(layer, 1 / min(speeds)) for layer in layers)
    devices = dict.fromkeys(p.device for p in profiles)

    def median(name: str) -> float:
        return float(statistics.median(getattr(p, name) for p in profiles))

    return replace(
        first,
        device=" / ".join(devices),
        layers=layers,
        update_s_per_byte=median("update_s_per_byte"),
        loss_s_per_element=median("loss_s_per_element"),
        copy_s_per_byte=median("copy_s_per_byte"),
        loader_samples_per_s=None
        if any(p.loader_samples_per_s is None for p in profiles)
        else median("loader_samples_per_s"),
        quota=median("quota"),
        core_share=None if first.core_share is None else median("core_share"),
        rank_speeds=speeds,
        heap_bytes=tuple(max(sizes) for sizes in zip(*(p.heap_bytes for p in profiles), strict=False)),
        library_bytes=max(p.library_bytes for p in profiles),
        notes=tuple(notes),
    )


def _layer(entries: Sequence[LayerProfile]) -> LayerProfile:
    """Combine one layer's entries."""
    tables = {}
    for name in entries[0].tables():
        merge = max if name.endswith("bytes") else statistics.median
        tables[name] = _merged([entry.tables()[name] for entry in entries], merge)
    rows = [entry.by_rows for entry in entries if entry.by_rows is not None]
    return LayerProfile(
        entries[0].name,
        **tables,
        accumulate_s=statistics.median(entry.accumulate_s for entry in entries),
        rank_spread=_spread(entries),
        by_rows=_layer(rows) if rows else None,
    )


def _slower(entry: LayerProfile, factor: float) -> LayerProfile:
    """Return an entry whose passes take so many times as long."""
    return replace(
        entry,
        forward_s=_times_factor(entry.forward_s, factor),
        backward_s=_times_factor(entry.backward_s, factor),
        accumulate_s=entry.accumulate_s * factor,
        by_rows=None if entry.by_rows is None else _slower(entry.by_rows, factor),
    )


def _times_factor(table: Table, factor: float) -> Table:
    return tuple(tuple(seconds * factor for seconds in row) for row in table)


def _merged(tables: Sequence[Table], merge: Callable[[Sequence[float]], float]) -> Table:
    """Merge tables figure by figure; rows are as long as the shortest."""
    return tuple(
        tuple(merge(values) for values in zip(*rows, strict=False)) for rows in zip(*tables, strict=False)
    )


def _spread(entries: Sequence[LayerProfile]) -> float:
    figures = [
        (max(values) - min(values)) / statistics.median(values)
        for values in zip(*(_times(entry) for entry in entries), strict=False)
        if statistics.median(values) > 0
    ]
    return float(f"{statistics.median(figures):.3g}") if figures else 0.0


def _times(entry: LayerProfile) -> list[float]:
    """Forward and backward seconds of the whole layer, at all sizes."""
    return [*entry.forward_s[0], *entry.backward_s[0]]


def _speed(layers: Sequence[LayerProfile], own: Sequence[LayerProfile]) -> float:
    """How much faster than the combined layers a rank's own were, over the sum of all their times."""
    common = [pair for a, b in zip(layers, own, strict=True) for pair in zip(_times(a), _times(b), strict=False)]
    own_s = sum(b for _, b in common)
    return float(f"{sum(a for a, _ in common) / own_s:.4g}") if own_s else 1.0
