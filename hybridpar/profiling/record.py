"""The profile record: seconds per layer, pass, micro-batch size and share of features."""

from __future__ import annotations

import json
from bisect import bisect_left
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hybridpar.errors import ProfileError
from hybridpar.model.chain import Chain
from hybridpar.schema import read_json, to_data

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class LayerProfile:
    """Times of one layer: ``forward_s[i][j]`` belongs to fraction i and micro-batch size j of the profile.

    Only linear layers are profiled at fractions below 1; for all others the outer tuples have one entry.
    ``backward_s`` includes the gradient of the layer's input, except for the model's first layer.
    """

    name: str
    forward_s: tuple[tuple[float, ...], ...]
    backward_s: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Profile:
    """Times of every layer of one chain on one device."""

    chain: str
    """Fingerprint of the chain."""
    source: Literal["measured", "estimated"]
    device: str
    dtype: str
    micro_batches: tuple[int, ...]
    """Ascending."""
    fractions: tuple[float, ...]
    """Descending from 1.0: shares of a linear layer's output features that were timed."""
    layers: tuple[LayerProfile, ...]
    update_s_per_byte: float
    """Optimizer step, seconds per byte of parameters."""
    loss_s_per_element: float
    """Softmax cross-entropy with its gradient, seconds per logit."""
    described: Chain | None = None
    """The chain itself, so that a profile alone is enough to plan."""
    schema: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        if self.schema != SCHEMA_VERSION:
            raise ProfileError(f"schema {self.schema} is not {SCHEMA_VERSION}; profile the model again")
        if list(self.micro_batches) != sorted(set(self.micro_batches)) or not self.micro_batches:
            raise ProfileError(f"micro_batches: {self.micro_batches} is not ascending")
        if (
            not self.fractions
            or self.fractions[0] != 1.0
            or list(self.fractions) != sorted(set(self.fractions), reverse=True)
        ):
            raise ProfileError(f"fractions: {self.fractions} does not descend from 1.0")
        if self.described is not None and self.described.fingerprint != self.chain:
            raise ProfileError(f"described: chain {self.described.fingerprint} is not the profile's {self.chain}")
        for layer in self.layers:
            for field, table in (("forward_s", layer.forward_s), ("backward_s", layer.backward_s)):
                if len(table) not in {1, len(self.fractions)} or any(
                    len(row) != len(self.micro_batches) for row in table
                ):
                    raise ProfileError(f"layer {layer.name}: {field} does not fit fractions x micro_batches")

    def check(self, chain: Chain) -> None:
        """Raise ProfileError unless the profile was made for ``chain``."""
        if self.chain != chain.fingerprint:
            raise ProfileError(
                f"the profile was made for chain {self.chain}, but model {chain.model} is {chain.fingerprint}; "
                "profile this model, or use profile=analytic"
            )

    def forward_time(self, layer: int, samples: int, fraction: float = 1.0) -> float:
        """Seconds of the forward of ``layer`` for a micro-batch, on ``fraction`` of its features."""
        return self._time(self.layers[layer].forward_s, samples, fraction)

    def backward_time(self, layer: int, samples: int, fraction: float = 1.0) -> float:
        """Seconds of the backward of ``layer`` for a micro-batch, on ``fraction`` of its features."""
        return self._time(self.layers[layer].backward_s, samples, fraction)

    def _time(self, table: tuple[tuple[float, ...], ...], samples: int, fraction: float) -> float:
        if samples == 0:
            return 0.0
        if fraction == 1.0:
            return interpolate(self.micro_batches, table[0], samples)
        if len(table) == 1:
            return interpolate(self.micro_batches, table[0], samples * fraction)
        ascending = self.fractions[::-1]
        times = tuple(interpolate(self.micro_batches, row, samples) for row in table[::-1])
        return interpolate(ascending, times, fraction)

    def save(self, path: Path) -> None:
        """Write the profile as JSON."""
        path.write_text(self.to_json() + "\n")

    def to_json(self) -> str:
        """Return the profile as JSON text."""
        return json.dumps(to_data(self), indent=1)

    @staticmethod
    def load(path: Path) -> Profile:
        """Read a profile from JSON; raises ProfileError naming the field."""
        return read_json(Profile, path, ProfileError)


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
