"""The profile record: seconds and bytes per layer, pass, micro-batch size and share of features."""

from __future__ import annotations

import json
import math
import re
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hybridpar.errors import ProfileError
from hybridpar.model.chain import Chain
from hybridpar.profiling.study import Study
from hybridpar.schema import from_data, read_json, to_data

SCHEMA_VERSION = 3

Table = tuple[tuple[float, ...], ...]
"""``table[i][j]`` belongs to fraction i and micro-batch size j of the profile. A row may end early: what it lacks
is continued along its last segment. One row where a layer is profiled whole only; none where nothing is known."""
Pass = Literal["forward", "backward"]


@dataclass(frozen=True)
class LayerProfile:
    """Figures of one layer. ``docs/profiles.md`` defines every field for those who write profiles themselves.

    ``backward_s`` includes the gradient of the layer's input, except for the model's first layer, and adding the
    parameters' gradients to those of an earlier micro-batch.
    """

    name: str
    forward_s: Table
    backward_s: Table
    forward_spread: Table = ()
    """Interquartile range of the timed passes as a share of their median."""
    backward_spread: Table = ()
    accumulate_s: float = 0.0
    """Of ``backward_s``: adding to gradients that are there. A micro-batch that finds none does not pay it."""
    saved_bytes: Table = ()
    """Kept for the backward, apart from input, output and parameters."""
    forward_workspace_bytes: Table = ()
    """Peak of the forward above what is there when it ends."""
    backward_workspace_bytes: Table = ()
    """Peak of the backward above what is there when it begins and the input's gradient; includes the parameters'
    gradients before they are added."""
    rank_spread: float = 0.0
    """Greatest minus least rank's time as a share of the median rank's: the median over the layer's figures."""
    by_rows: LayerProfile | None = None
    """The same tables where fractions are shares of a linear layer's input features; None: as by columns."""

    def tables(self) -> dict[str, Table]:
        """Return all tables by field."""
        return {name: value for name, value in vars(self).items() if isinstance(value, tuple)}


@dataclass(frozen=True)
class Profile:
    """Figures of every layer of one chain on one device."""

    chain: str
    """Fingerprint of the chain."""
    source: Literal["measured", "estimated"]
    device: str
    dtype: str
    micro_batches: tuple[int, ...]
    """Ascending."""
    fractions: tuple[float, ...]
    """Descending from 1.0: shares of a linear layer's output features (columns), and of its input features
    (``by_rows``), that were profiled."""
    layers: tuple[LayerProfile, ...]
    update_s_per_byte: float
    """Optimizer step, seconds per byte of parameters."""
    loss_s_per_element: float
    """Softmax cross-entropy with its gradient, seconds per logit."""
    copy_s_per_byte: float = 0.0
    """Copying gradients to their place in a bucket, seconds per byte; 0 where unknown."""
    optimizer: str | None = None
    """What ``update_s_per_byte`` is for; None: SGD with momentum."""
    loader_samples_per_s: float | None = None
    """Training samples of ``data`` that one core reads in a second; None: unknown."""
    data: str | None = None
    """The data set behind ``loader_samples_per_s``."""
    memory_source: Literal["cuda allocator", "resident high-water mark"] | None = None
    """What the workspace bytes were read from."""
    device_kind: Literal["cpu", "cuda"] | None = None
    quota: float = 1.0
    """Share of a core that a rank may use; times on a CPU are CPU seconds divided by what it gets of it."""
    core_share: float | None = None
    """CPU seconds per second that a rank got while it measured; below ``quota`` the machine was busy."""
    rank_speeds: tuple[float, ...] = ()
    """Per rank that measured: how much faster than the median rank it was (2.0: twice as fast)."""
    library_bytes: int = 0
    """Resident memory that the libraries' code takes once the passes have run, beyond what it took before."""
    heap_bytes: tuple[float, ...] = ()
    """By micro-batch size, as far as known: what the C library's heap keeps for passes of the whole chain, without
    parameters and their gradients. More than was ever in use at once, as not every hole can be used again."""
    made_with: str | None = None
    """Versions and threads."""
    notes: tuple[str, ...] = ()
    """Where the measurement ended early, and figures to doubt."""
    study: Study | None = None
    """What the device did at every micro-batch size; None: nobody looked."""
    described: Chain | None = None
    """The chain itself, so that a profile alone is enough to plan."""
    schema: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        _check_schema(self.schema)
        if list(self.micro_batches) != sorted(set(self.micro_batches)) or min(self.micro_batches, default=0) < 1:
            raise ProfileError(f"micro_batches: {self.micro_batches} is not ascending from at least 1")
        if (
            not self.fractions
            or self.fractions[0] != 1.0
            or self.fractions[-1] <= 0
            or list(self.fractions) != sorted(set(self.fractions), reverse=True)
        ):
            raise ProfileError(f"fractions: {self.fractions} does not descend from 1.0 to above 0")
        if self.described is not None and self.described.fingerprint != self.chain:
            raise ProfileError(f"described: chain {self.described.fingerprint} is not the profile's {self.chain}")
        if self.described is not None and len(self.described.layers) != len(self.layers):
            raise ProfileError(f"layers: {len(self.layers)}, but the chain has {len(self.described.layers)}")
        for name in (
            "update_s_per_byte",
            "loss_s_per_element",
            "copy_s_per_byte",
            "loader_samples_per_s",
            "library_bytes",
        ):
            _check_figures(name, [getattr(self, name) or 0.0])
        _check_figures("heap_bytes", self.heap_bytes)
        if len(self.heap_bytes) > len(self.micro_batches):
            raise ProfileError(f"heap_bytes: {len(self.heap_bytes)} for {len(self.micro_batches)} micro_batches")
        if not 0 < self.quota <= 1:
            raise ProfileError(f"quota: {self.quota} is not above 0 and at most 1")
        for layer in self.layers:
            self._check_layer(layer)
        if self.study is not None:
            self.study.check(len(self.layers), len(self.micro_batches))

    def _check_layer(self, layer: LayerProfile) -> None:
        where = f"layer {layer.name}"
        _check_figures(f"{where}: accumulate_s", [layer.accumulate_s])
        for name, table in layer.tables().items():
            required = name in {"forward_s", "backward_s"}
            counts = {1, len(self.fractions)} | (set() if required else {0})
            if len(table) not in counts or any(not 1 <= len(row) <= len(self.micro_batches) for row in table):
                raise ProfileError(
                    f"{where}: {name} does not fit fractions x micro_batches "
                    f"({len(self.fractions)} x {len(self.micro_batches)}); rows may only end early"
                )
            for row in table:
                _check_figures(f"{where}: {name}", row)
        if layer.by_rows is not None:
            self._check_layer(layer.by_rows)

    def check(self, chain: Chain) -> None:
        """Raise ProfileError unless the profile was made for ``chain``."""
        if self.chain != chain.fingerprint:
            raise ProfileError(
                f"the profile was made for chain {self.chain}, but model {chain.model} is {chain.fingerprint}; "
                "profile this model, or use profile=analytic"
            )

    def forward_time(self, layer: int, samples: int, fraction: float = 1.0, *, rows: bool = False) -> float:
        """Seconds of the forward of ``layer`` for a micro-batch, on ``fraction`` of its features.

        Of a linear layer these are its output features, or its input features where ``rows`` is set.
        """
        return self._at(self._entry(layer, rows).forward_s, samples, fraction)

    def backward_time(self, layer: int, samples: int, fraction: float = 1.0, *, rows: bool = False) -> float:
        """Seconds of the backward of ``layer`` for a micro-batch that adds to gradients; else as the forward."""
        return self._at(self._entry(layer, rows).backward_s, samples, fraction)

    def accumulate_time(self, layer: int, fraction: float = 1.0) -> float:
        """Seconds within ``backward_time`` that a micro-batch without gradients to add to does not pay."""
        return self.layers[layer].accumulate_s * fraction

    def saved_bytes(self, layer: int, samples: int, fraction: float = 1.0, *, rows: bool = False) -> float:
        """Bytes that the forward keeps, apart from input, output and parameters; 0 where unknown."""
        return self._at(self._entry(layer, rows).saved_bytes, samples, fraction)

    def workspace_bytes(
        self, layer: int, samples: int, fraction: float = 1.0, *, rows: bool = False, kind: Pass | None = None
    ) -> float:
        """Bytes that a pass needs while it runs and gives back; of the greater one without ``kind``.

        Beyond inputs, outputs, what is saved, and their gradients. A backward's include one gradient of the
        parameters; the micro-batch that finds no gradient to add to keeps that one. 0 where unknown.
        """
        entry = self._entry(layer, rows)
        tables = {"forward": entry.forward_workspace_bytes, "backward": entry.backward_workspace_bytes}
        chosen = tables.values() if kind is None else [tables[kind]]
        return max(self._at(table, samples, fraction) for table in chosen)

    def _entry(self, layer: int, rows: bool) -> LayerProfile:
        entry = self.layers[layer]
        return entry.by_rows if rows and entry.by_rows is not None else entry

    def _at(self, table: Table, samples: int, fraction: float) -> float:
        if samples == 0 or not table:
            return 0.0
        if fraction == 1.0:
            return self._in_row(table[0], samples)
        if len(table) == 1:
            return self._in_row(table[0], samples * fraction)
        ascending = self.fractions[::-1]
        values = tuple(self._in_row(row, samples) for row in table[::-1])
        return interpolate(ascending, values, fraction)

    def _in_row(self, row: tuple[float, ...], samples: float) -> float:
        return interpolate(self.micro_batches[: len(row)], row, samples)

    def save(self, path: Path) -> None:
        """Write the profile as JSON."""
        path.write_text(self.to_json() + "\n")

    def to_json(self) -> str:
        """Return the profile as JSON text, with the rows of the tables on one line each."""
        text = json.dumps(to_data(self), indent=1)
        return re.sub(r"\[\n[^\[\]{}]*?\n\s*\]", lambda m: re.sub(r"\n\s*", " ", m[0]), text)

    @staticmethod
    def load(path: Path) -> Profile:
        """Read a profile from JSON; the chain's fingerprint may be left out where the chain is described.

        Raises ProfileError naming the file and the field, and ModelError for a chain that does not fit together.
        """
        data = read_json(dict[str, Any], path, ProfileError)
        try:
            _check_schema(data.get("schema"))
        except ProfileError as e:
            raise ProfileError(f"{path.name}: {e}") from e
        if "chain" not in data and data.get("described") is not None:
            described = from_data(Chain, data["described"], f"{path.name}.described", ProfileError)
            data["chain"] = described.fingerprint
        return from_data(Profile, data, path.name, ProfileError)


def _check_schema(found: object) -> None:
    if found != SCHEMA_VERSION:
        raise ProfileError(
            f"schema: {found} is not {SCHEMA_VERSION}; measure the profile again with `hybridpar profile`, or "
            "convert it as docs/profiles.md says"
        )


def _check_figures(name: str, values: Iterable[float]) -> None:
    for value in values:
        if not (math.isfinite(value) and value >= 0):
            raise ProfileError(f"{name}: {value} is not a number from 0 up")


def interpolate(xs: tuple[float, ...] | tuple[int, ...], ys: tuple[float, ...], x: float) -> float:
    """Piecewise linear through (xs, ys); beyond the ends along the last segment, never below 0.

    Below the first point the line from the origin bounds the result from below: a time at x is at least
    the share x/xs[0] of the time at xs[0].
    """
    if len(xs) == 1:
        return ys[0] * x / xs[0]
    i = min(max(bisect_left(xs, x), 1), len(xs) - 1)
    slope = (ys[i] - ys[i - 1]) / (xs[i] - xs[i - 1])
    y = ys[i - 1] + slope * (x - xs[i - 1])
    if x < xs[0]:
        return max(y, ys[0] * x / xs[0])
    if x > xs[-1]:
        return max(y, ys[-1])
    return y
