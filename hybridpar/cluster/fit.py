"""A straight line through measured times: latency and bandwidth, robust against outliers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from hybridpar.errors import ClusterError

_ROUNDS = 20
"""Of reweighting; the weights settle within a few."""
_DISTURBED = 0.5
_SMALL = 1e-6
"""A logarithm's argument so close to 1 is its own expansion."""
_FLAT = 0.01
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

    Least squares of the errors' logarithms, since times span orders of magnitude and the small messages alone tell
    the latency; solved by reweighting squares. Half and double the time weigh the same; errors relative to the
    measured time would favour lines that are too low.

    A time that exceeds the one of a larger payload by more than ``_DISTURBED`` was disturbed, and that one stands
    in for it; the errors are those of the times as they were measured.

    Where the best line has a negative latency, the best one without latency is taken. Where times do not grow with
    the payload, they are all latency, and the bandwidth is one at which the largest payload adds ``_FLAT`` to it:
    it is unknown, but not below that. Raises ClusterError for fewer than two different payloads.
    """
    if len({s.payload_bytes / s.messages for s in samples}) < 2:
        raise ClusterError(f"a line needs samples of at least two payloads, got {len(samples)} samples of one")
    calm = [_undisturbed(sample, samples) for sample in samples]
    latency_s, per_byte_s = 0.0, 0.0
    predicted = [s.seconds for s in calm]
    for _ in range(_ROUNDS):
        latency_s, per_byte_s = _solve(calm, [_weight(p, s.seconds) for p, s in zip(predicted, calm, strict=True)])
        predicted = [s.messages * latency_s + s.payload_bytes * per_byte_s for s in calm]
    errors = [abs((s.messages * latency_s + s.payload_bytes * per_byte_s) / s.seconds - 1) for s in samples]
    worst = max(range(len(samples)), key=errors.__getitem__)
    return Fit(latency_s, 1 / per_byte_s, statistics.median(errors), errors[worst], samples[worst])


def _undisturbed(sample: Sample, samples: Sequence[Sample]) -> Sample:
    larger = [
        s.seconds for s in samples if s.payload_bytes > sample.payload_bytes and s.messages == sample.messages
    ]
    least_s = min(larger, default=sample.seconds)
    return replace(sample, seconds=least_s) if sample.seconds > (1 + _DISTURBED) * least_s else sample


def _weight(predicted_s: float, measured_s: float) -> float:
    """Return the weight of a squared error at which its gradient is that of log(predicted / measured)^2 / 2."""
    ratio = predicted_s / measured_s
    if abs(ratio - 1) < _SMALL:
        return 1 / (predicted_s * measured_s)
    return math.log(ratio) / (predicted_s * (predicted_s - measured_s))


def _solve(samples: Sequence[Sample], weights: Sequence[float]) -> tuple[float, float]:
    """Weighted least squares in (latency, seconds per byte), latency at least 0."""
    aa = ab = bb = a = b = 0.0
    for s, weight in zip(samples, weights, strict=True):
        x, y, t = s.messages, s.payload_bytes, s.seconds
        aa, ab, bb = aa + weight * x * x, ab + weight * x * y, bb + weight * y * y
        a, b = a + weight * x * t, b + weight * y * t
    determinant = aa * bb - ab * ab
    if determinant > 0:
        latency_s, per_byte_s = (a * bb - b * ab) / determinant, (b * aa - a * ab) / determinant
        if latency_s >= 0 and per_byte_s > 0:
            return latency_s, per_byte_s
        if latency_s >= 0:
            largest = max(s.payload_bytes / s.messages for s in samples)
            return a / aa, _FLAT * (a / aa) / largest
    return 0.0, b / bb
