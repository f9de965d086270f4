"""NVML's GPU performance monitoring (GPM): what the multiprocessors did between two moments, Hopper and later."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import pynvml

MIN_WINDOW_S = 0.12
"""Windows below 100 ms read as zero or not at all; the rest is margin."""


@dataclass(frozen=True)
class Activity:
    """Fractions in 0..1 over one window; None is unknown."""

    graphics: float | None
    sm: float | None
    occupancy: float | None
    tensor: float | None
    dram: float | None
    window_s: float


_METRICS = (
    pynvml.NVML_GPM_METRIC_GRAPHICS_UTIL,
    pynvml.NVML_GPM_METRIC_SM_UTIL,
    pynvml.NVML_GPM_METRIC_SM_OCCUPANCY,
    pynvml.NVML_GPM_METRIC_ANY_TENSOR_UTIL,
    pynvml.NVML_GPM_METRIC_DRAM_BW_UTIL,
)
"""In the order of Activity's first fields."""


class Gpm:
    """A sliding window over one GPU, or over one MIG slice of it.

    The two samples that bound a window live in the driver: they are taken once, reused in turns, and given back by
    ``close``.
    """

    def __init__(self, device: Any, gpu_instance: int | None = None) -> None:
        """Open the first window.

        Args:
            device: NVML's handle of the GPU, of the parent for a MIG slice.
            gpu_instance: the slice's GPU instance id, None for a whole GPU.

        Raises:
            pynvml.NVMLError: the GPU or its driver has no GPM, or does not let this user use it.

        """
        self._device = device
        self._gpu_instance = gpu_instance
        self._samples: list[Any] = []
        self._taken_s = 0.0
        self._request = pynvml.c_nvmlGpmMetricsGet_t()
        self._request.version = pynvml.NVML_GPM_METRICS_GET_VERSION
        self._request.numMetrics = len(_METRICS)
        if not pynvml.nvmlGpmQueryDeviceSupport(device).isSupportedDevice:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        try:
            for _ in range(2):
                self._samples.append(pynvml.nvmlGpmSampleAlloc())
            self._take(self._samples[0])
        except pynvml.NVMLError:
            self.close()
            raise

    def read(self) -> Activity | None:
        """Close the window that the last call opened and open the next.

        Returns None, and lets the window grow, where it is shorter than ``MIN_WINDOW_S`` or the driver refuses.
        """
        began_s = self._taken_s
        if time.monotonic() - began_s < MIN_WINDOW_S:
            return None
        before, after = self._samples
        try:
            self._take(after)
        except pynvml.NVMLError:
            return None
        self._samples = [after, before]
        self._request.sample1, self._request.sample2 = before, after
        for metric, identity in zip(self._request.metrics, _METRICS, strict=False):
            metric.metricId, metric.value = identity, math.nan
        try:
            pynvml.nvmlGpmMetricsGet(self._request)
        except pynvml.NVMLError:
            return None
        found = [_fraction(self._request.metrics[i]) for i in range(len(_METRICS))]
        return Activity(found[0], found[1], found[2], found[3], found[4], self._taken_s - began_s)

    def close(self) -> None:
        """Give the samples back to the driver; may be called twice."""
        while self._samples:
            sample = self._samples.pop()
            try:
                pynvml.nvmlGpmSampleFree(sample)
            except pynvml.NVMLError:
                continue  # a GPU that fell off the bus takes its samples with it

    def _take(self, sample: Any) -> None:
        if self._gpu_instance is None:
            pynvml.nvmlGpmSampleGet(self._device, sample)
        else:
            pynvml.nvmlGpmMigSampleGet(self._device, self._gpu_instance, sample)
        self._taken_s = time.monotonic()


def _fraction(metric: Any) -> float | None:
    """Percent to 0..1; what lies beyond a rounding error outside of it, NaN included, is not believed."""
    if metric.nvmlReturn != pynvml.NVML_SUCCESS or not 0.0 <= metric.value <= 100.5:
        return None
    return float(min(metric.value / 100.0, 1.0))
