"""A straight line through measured times: latency and bandwidth, robust against outliers."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from hybridpar.errors import ClusterError

_ROUNDS = 20
"""Of reweighting; the weights settle within a few."""
_HUBER = 1.345
"""Residuals beyond so many standard deviations count linearly: 95 % efficiency for normal noise (Huber 1981)."""
_FLAT = 0.01
_LEAST_SCALE = 1e-9
"""Relative residuals below this are rounding."""
POOR_MEDIAN, POOR_WORST = 0.2, 0.6
"""Relative errors above which a straight line does not describe what was measured."""


@dataclass(frozen=True)
class Sample:
    """A measured time, said to be ``messages * latency + payload_bytes / bandwidth``."""

    messages: float
    """Messages one after the other."""
    payload_bytes: float
    """Bytes on the wire one after the other."""
    seconds: float


@dataclass(frozen=True)
class Fit:
    """Latency and bandwidth, and how well they reproduce the samples that they come from."""

    latency_s: float
    bytes_per_s: float
    median_error: float
    """Median of |predicted - measured| / measured."""
    worst_error: float
    worst: Sample
    """The sample of the worst error."""

    @property
    def poor(self) -> bool:
        """Whether the samples are too far from a line for a prediction."""
        return self.median_error > POOR_MEDIAN or self.worst_error > POOR_WORST

    def seconds(self, messages: float, payload_bytes: float) -> float:
        """Predict a time."""
        return messages * self.latency_s + payload_bytes / self.bytes_per_s


def fit(samples: Sequence[Sample]) -> Fit:
    """Fit ``seconds = messages * latency + payload_bytes / bandwidth``, with latency at least 0.

    Least squares of the *relative* errors (weights 1/t^2), since times span orders of magnitude and the small
    messages alone tell the latency; reweighted by Huber's function (P. J. Huber, "Robust Statistics", 1981, with
    the median of the absolute residuals over 0.6745 as scale) so that a few outliers do not pull the line.
    Where the best line has a negative latency, the best one without latency is taken. Where times do not grow with
    the payload, they are all latency, and the bandwidth is one at which the largest payload adds ``_FLAT`` to it:
    it is unknown, but not below that. Raises ClusterError for fewer than two different payloads.
    """
    if len({s.payload_bytes / s.messages for s in samples}) < 2:
        raise ClusterError(f"a line needs samples of at least two payloads, got {len(samples)} samples of one")
    weights = [1.0] * len(samples)
    latency_s, per_byte_s = 0.0, 0.0
    for _ in range(_ROUNDS):
        latency_s, per_byte_s = _solve(samples, weights)
        off = [abs((s.messages * latency_s + s.payload_bytes * per_byte_s) / s.seconds - 1) for s in samples]
        bound = _HUBER * max(statistics.median(off) / 0.6745, _LEAST_SCALE)
        weights = [1.0 if o <= bound else bound / o for o in off]
    errors = [abs((s.messages * latency_s + s.payload_bytes * per_byte_s) / s.seconds - 1) for s in samples]
    worst = max(range(len(samples)), key=errors.__getitem__)
    return Fit(latency_s, 1 / per_byte_s, statistics.median(errors), errors[worst], samples[worst])


def _solve(samples: Sequence[Sample], weights: Sequence[float]) -> tuple[float, float]:
    """Weighted least squares of the relative errors in (latency, seconds per byte), latency at least 0."""
    aa = ab = bb = a = b = 0.0
    for s, weight in zip(samples, weights, strict=True):
        x, y = s.messages / s.seconds, s.payload_bytes / s.seconds
        aa, ab, bb = aa + weight * x * x, ab + weight * x * y, bb + weight * y * y
        a, b = a + weight * x, b + weight * y
    determinant = aa * bb - ab * ab
    if determinant > 0:
        latency_s, per_byte_s = (a * bb - b * ab) / determinant, (b * aa - a * ab) / determinant
        if latency_s >= 0 and per_byte_s > 0:
            return latency_s, per_byte_s
        if latency_s >= 0:
            largest = max(s.payload_bytes / s.messages for s in samples)
            return a / aa, _FLAT * (a / aa) / largest
    return 0.0, b / bb
