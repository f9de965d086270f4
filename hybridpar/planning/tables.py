"""A chain and its profile as arrays over the layers, for formulas about very many cuts at once."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from functools import cached_property

import numpy as np
import numpy.typing as npt

from hybridpar.model.chain import Chain
from hybridpar.planning.compression import Compression
from hybridpar.profiling.record import Profile

Array = npt.NDArray[np.float64]
Rows = dict[int, tuple[Array, Array]]
"""Layers whose rows have so many entries: their indices, and the rows of their whole widths."""


class Tables:
    """Sums over all layers before each: differences of them are sums over runs of layers.

    Args:
        chain: its layers.
        profile: their times.
        itemsize: bytes per floating element.
        compression: of gradients that are summed.

    """

    def __init__(
        self, chain: Chain, profile: Profile, itemsize: int, compression: Compression | None = None
    ) -> None:
        self.chain, self.profile, self.itemsize, self.compression = chain, profile, itemsize, compression
        self._times: dict[tuple[int, float, bool], Array] = {}

    @cached_property
    def parameters(self) -> Array:
        """Parameter bytes of all layers before each."""
        return np.cumsum([0.0, *(layer.parameter_count * self.itemsize for layer in self.chain.layers)])

    @cached_property
    def trained(self) -> Array:
        """Bytes of the parameters to train of all layers before each."""
        return np.cumsum([0.0, *(count * self.itemsize for count in self.chain.trained)])

    @cached_property
    def summed(self) -> Array:
        """Bytes that the sums of the gradients of all layers before each take."""
        if self.compression is None:
            return self.trained
        frozen, own = set(self.chain.frozen), [0.0]
        for layer in self.chain.layers:
            trained = (p.shape for p in layer.parameters if p.name not in frozen)
            own.append(sum(self.compression.sent_bytes(shape, self.itemsize) for shape in trained))
        return np.cumsum(own)

    @cached_property
    def norms(self) -> Array:
        """Synchronised batch norms of all layers before each."""
        return np.cumsum([0.0, *(len(layer.norms) for layer in self.chain.layers)])

    @cached_property
    def figures(self) -> Array:
        """Bytes that they tell each other in a pass, likewise."""
        own = (sum(norm.figures for norm in layer.norms) for layer in self.chain.layers)
        return np.cumsum([0.0, *(count * self.itemsize for count in own)])

    @cached_property
    def saved(self) -> Array:
        """Bytes per sample that all layers before each keep for their backward passes."""
        kept = [0.0]
        for i, layer in enumerate(self.chain.layers):
            own = layer.saved.elements_per_sample * self.itemsize + layer.saved.bytes_per_sample
            following = self.chain.layers[i + 1 : i + 2]
            if layer.saves_output or (following and following[0].saves_input):
                own += layer.out_elements * self.chain.out_itemsize(i, self.itemsize)
            kept.append(float(own))
        return np.cumsum(kept)

    @cached_property
    def crossing(self) -> Array:
        """Bytes per sample that cross before each layer."""
        sizes = [self.chain.layers[0].in_elements, *(layer.out_elements for layer in self.chain.layers)]
        bytes_each = [self.chain.out_itemsize(i, self.itemsize) for i in range(-1, len(self.chain.layers))]
        return np.array([s * b for s, b in zip(sizes, bytes_each, strict=True)], dtype=float)

    @cached_property
    def crossed(self) -> Array:
        """Bytes per sample that cross before each layer and all earlier ones."""
        return np.cumsum(self.crossing)

    def times(self, size: int, fraction: float, *, backward: bool) -> Array:
        """Return the seconds of all layers before each, at a micro-batch size, on a fraction of the features."""
        key = (size, fraction, backward)
        if key not in self._times:
            own = np.zeros(len(self.chain.layers) + 1)
            several = self._several[backward] if fraction != 1.0 else []
            for layers, rows in self._rows[backward].values():
                own[layers + 1] = _interpolated(self.profile.micro_batches, rows, size * fraction)
            of = self.profile.backward_time if backward else self.profile.forward_time
            for i in several:
                own[i + 1] = of(i, size, fraction)
            self._times[key] = np.cumsum(own)
        return self._times[key]

    @cached_property
    def _rows(self) -> tuple[Rows, Rows]:
        """Rows of the forward and the backward times. Most have one length, so they are interpolated together."""
        found: list[Rows] = []
        for tables in ([x.forward_s for x in self.profile.layers], [x.backward_s for x in self.profile.layers]):
            by_length: dict[int, list[int]] = defaultdict(list)
            for i, table in enumerate(tables):
                by_length[len(table[0])].append(i)
            found.append(
                {n: (np.array(own), np.array([tables[i][0] for i in own])) for n, own in by_length.items()}
            )
        return found[0], found[1]

    @cached_property
    def _several(self) -> tuple[list[int], list[int]]:
        """Layers with times of their own for several fractions, forward and backward."""
        layers = list(enumerate(self.profile.layers))
        return [i for i, x in layers if len(x.forward_s) > 1], [i for i, x in layers if len(x.backward_s) > 1]


def _interpolated(sizes: tuple[int, ...], rows: Array, size: float) -> Array:
    """Return all rows at a size, as :func:`hybridpar.profiling.record.interpolate` does with one."""
    count = rows.shape[1]
    if count == 1:
        return rows[:, 0] * size / sizes[0]
    i = min(max(bisect_left(sizes, size, hi=count), 1), count - 1)
    slope = (rows[:, i] - rows[:, i - 1]) / (sizes[i] - sizes[i - 1])
    found = rows[:, i - 1] + slope * (size - sizes[i - 1])
    if size < sizes[0]:
        return np.asarray(np.maximum(found, rows[:, 0] * size / sizes[0]))
    if size > sizes[count - 1]:
        return np.asarray(np.maximum(found, rows[:, -1]))
    return np.asarray(found)
