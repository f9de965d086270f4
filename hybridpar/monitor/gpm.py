"""NVML's GPU performance monitoring (GPM): what the multiprocessors did between two moments, Hopper and later."""

from __future__ import annotations

import math
import time
from typing import Any

import pynvml

from hybridpar.monitor.source import Figures, Refused

MIN_WINDOW_S = 0.12
"""Windows below 100 ms read as zero or not at all; the rest is margin."""


_PERCENT, _MEBIBYTES = 100.0, 2.0**-20
_METRICS = {
    "graphics_activity": (pynvml.NVML_GPM_METRIC_GRAPHICS_UTIL, _PERCENT),
    "sm_activity": (pynvml.NVML_GPM_METRIC_SM_UTIL, _PERCENT),
    "occupancy": (pynvml.NVML_GPM_METRIC_SM_OCCUPANCY, _PERCENT),
    "tensor_activity": (pynvml.NVML_GPM_METRIC_ANY_TENSOR_UTIL, _PERCENT),
    "dram_activity": (pynvml.NVML_GPM_METRIC_DRAM_BW_UTIL, _PERCENT),
    "pcie_sent_bytes_per_s": (pynvml.NVML_GPM_METRIC_PCIE_TX_PER_SEC, _MEBIBYTES),
    "pcie_received_bytes_per_s": (pynvml.NVML_GPM_METRIC_PCIE_RX_PER_SEC, _MEBIBYTES),
    "nvlink_sent_bytes_per_s": (pynvml.NVML_GPM_METRIC_NVLINK_TOTAL_TX_PER_SEC, _MEBIBYTES),
    "nvlink_received_bytes_per_s": (pynvml.NVML_GPM_METRIC_NVLINK_TOTAL_RX_PER_SEC, _MEBIBYTES),
}
"""By field of a GpuSample: GPM's metric, and how many of its units are one of the field's."""


class Gpm:
    """A sliding window over one GPU, or over one MIG slice of it.

    The two samples that bound a window live in the driver: they are taken once, reused in turns, and given back by
    ``close``.
    """

    source = "gpm"

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

    def read(self, time_s: float) -> Figures:  # noqa: ARG002 - of Meter: the driver stamps its samples itself
        """Close the window that the last call opened and open the next.

        Returns nothing, and lets the window grow, where it is shorter than ``MIN_WINDOW_S``.
        Raises Refused where the driver refuses.
        """
        began_s = self._taken_s
        if time.monotonic() - began_s < MIN_WINDOW_S:
            return {}
        before, after = self._samples
        try:
            self._take(after)
            self._samples = [after, before]
            self._request.sample1, self._request.sample2 = before, after
            for metric, (identity, _) in zip(self._request.metrics, _METRICS.values(), strict=False):
                metric.metricId, metric.value = identity, math.nan
            pynvml.nvmlGpmMetricsGet(self._request)
        except pynvml.NVMLError as e:
            raise Refused(str(e)) from e
        units = zip(_METRICS.items(), self._request.metrics, strict=False)
        figures = {name: _value(metric, unit) for (name, (_, unit)), metric in units}
        return {**figures, "utilisation": figures["graphics_activity"], "window_s": self._taken_s - began_s}

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


def _value(metric: Any, unit: float) -> float | None:
    """Return a metric in the units of its field; NaN, what is below 0 or well above 100 % is not believed."""
    if metric.nvmlReturn != pynvml.NVML_SUCCESS or not 0.0 <= metric.value < math.inf:
        return None
    if unit == _PERCENT:
        return None if metric.value > 100.5 else float(min(metric.value / unit, 1.0))
    return float(metric.value / unit)
