"""Figures of GPUs from a dcgm-exporter, as text of Prometheus, on nodes where one runs.

Names and units are those of its counters (github.com/NVIDIA/dcgm-exporter, etc/dcp-metrics-included.csv). What an
exporter gives is up to its configuration; it looks at the GPUs every 30 s unless it is told otherwise.
"""

from __future__ import annotations

import http.client
import math
import re
import time
from collections.abc import Callable, Mapping
from urllib.parse import urlsplit

from hybridpar.monitor import throttle
from hybridpar.monitor.source import Figures, Refused

SCRAPE_AFTER_S, RETRY_AFTER_S = 5.0, 30.0
"""From one look to the next; and from one that failed, since it may have waited for nothing."""
TIMEOUT_S, MOST_BYTES = 1.0, 4 * 2**20
"""Of one answer."""

_SCALES = {
    "DCGM_FI_DEV_GPU_UTIL": ("utilisation", 1e-2),
    "DCGM_FI_DEV_MEM_COPY_UTIL": ("memory_utilisation", 1e-2),
    "DCGM_FI_PROF_GR_ENGINE_ACTIVE": ("graphics_activity", 1.0),
    "DCGM_FI_PROF_SM_ACTIVE": ("sm_activity", 1.0),
    "DCGM_FI_PROF_SM_OCCUPANCY": ("occupancy", 1.0),
    "DCGM_FI_PROF_PIPE_TENSOR_ACTIVE": ("tensor_activity", 1.0),
    "DCGM_FI_PROF_DRAM_ACTIVE": ("dram_activity", 1.0),
    "DCGM_FI_DEV_SM_CLOCK": ("sm_clock_hz", 1e6),
    "DCGM_FI_DEV_MEM_CLOCK": ("memory_clock_hz", 1e6),
    "DCGM_FI_DEV_GPU_TEMP": ("temperature_c", 1.0),
    "DCGM_FI_DEV_POWER_USAGE": ("power_w", 1.0),
    "DCGM_FI_DEV_ENFORCED_POWER_LIMIT": ("power_limit_w", 1.0),
    "DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION": ("energy_j", 1e-3),
    "DCGM_FI_PROF_PCIE_TX_BYTES": ("pcie_sent_bytes_per_s", 1.0),
    "DCGM_FI_PROF_PCIE_RX_BYTES": ("pcie_received_bytes_per_s", 1.0),
    "DCGM_FI_PROF_NVLINK_TX_BYTES": ("nvlink_sent_bytes_per_s", 1.0),
    "DCGM_FI_PROF_NVLINK_RX_BYTES": ("nvlink_received_bytes_per_s", 1.0),
}
"""Field of a GpuSample and what a metric is multiplied with."""
_USED, _REST = "DCGM_FI_DEV_FB_USED", ("DCGM_FI_DEV_FB_FREE", "DCGM_FI_DEV_FB_RESERVED")
_REASONS = ("DCGM_FI_DEV_CLOCKS_EVENT_REASONS", "DCGM_FI_DEV_CLOCK_THROTTLE_REASONS")
_LINE = re.compile(r"(DCGM_FI_\w+)\{(.*)\}\s+(\S+)")
_LABEL = re.compile(r'(\w+)="([^"\\]*)"')

Slice = tuple[str, str | None]
"""UUID of a GPU, and of a MIG slice its GPU instance."""


class Exporter:
    """A dcgm-exporter, asked every ``SCRAPE_AFTER_S`` however often somebody wants to know."""

    def __init__(self, url: str, now_s: Callable[[], float] = time.monotonic) -> None:
        """Ask nothing yet; ``url`` is http://HOST:PORT/metrics."""
        self.url, self._now_s = url, now_s
        self._due_s, self._asked_at_s = -math.inf, 0.0
        self._found: dict[Slice, Figures] = {}
        self._error: str | None = None

    def known(self, time_s: float) -> tuple[Slice, ...]:
        """Return the GPUs and slices that it tells of; raises Refused where it tells nothing."""
        self._ask(time_s)
        self._due_s = -math.inf  # the first tick is to have figures, too
        return tuple(self._found)

    def figures(self, which: Slice, time_s: float) -> Figures:
        """Return the figures of a GPU or slice, as of the tick of that time; none between two looks.

        Raises Refused where the last look failed, or told nothing of it.
        """
        self._ask(time_s)
        if which not in self._found:
            raise Refused(f"the dcgm-exporter at {self.url} tells nothing of it")
        return self._found[which] if self._asked_at_s == time_s else {}

    def _ask(self, time_s: float) -> None:
        if self._now_s() >= self._due_s:
            self._asked_at_s, self._error = time_s, None
            try:
                self._found = parse(_fetch(self.url))
            except (OSError, http.client.HTTPException, UnicodeDecodeError) as e:
                self._error = f"no dcgm-exporter at {self.url}: {e or type(e).__name__}"
            self._due_s = self._now_s() + (SCRAPE_AFTER_S if self._error is None else RETRY_AFTER_S)
        if self._error is not None:
            raise Refused(self._error)


class Dcgm:
    """The figures of one GPU or slice."""

    source = "dcgm"

    def __init__(self, exporter: Exporter, which: Slice) -> None:
        self._exporter, self._which = exporter, which

    def read(self, time_s: float) -> Figures:
        """Return the figures, none between two looks of the exporter; raises Refused where there are none."""
        return self._exporter.figures(self._which, time_s)

    def close(self) -> None:
        """Do nothing: there is nothing to give back."""


def parse(text: str) -> dict[Slice, Figures]:
    """Return the figures in an exporter's text; what is no number is left out."""
    raw: dict[Slice, dict[str, float]] = {}
    for name, labels, value in _LINE.findall(text):
        about = dict(_LABEL.findall(labels))
        number = _number(value)
        if "UUID" in about and number is not None:
            raw.setdefault((about["UUID"], about.get("GPU_I_ID") or None), {})[name] = number
    return {which: _figures(metrics) for which, metrics in raw.items()}


def _figures(metrics: Mapping[str, float]) -> Figures:
    figures: Figures = {field: metrics[name] * unit for name, (field, unit) in _SCALES.items() if name in metrics}
    if _USED in metrics:  # MiB
        figures["memory_used_bytes"] = int(metrics[_USED] * 2**20)
        if _REST[0] in metrics:
            rest = sum(metrics.get(name, 0.0) for name in _REST)
            figures["memory_total_bytes"] = int((metrics[_USED] + rest) * 2**20)
    bits = next((metrics[name] for name in _REASONS if name in metrics), None)
    if bits is not None:
        figures["throttle"] = throttle.names(int(bits))
    return figures


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _fetch(url: str) -> str:
    """Return what a web server says, within a time and a size; raises OSError or HTTPException where not."""
    parts, deadline_s = urlsplit(url), time.monotonic() + TIMEOUT_S
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=TIMEOUT_S)
    try:
        connection.request("GET", parts.path + (f"?{parts.query}" if parts.query else ""))
        response = connection.getresponse()
        if response.status != http.client.OK:
            raise OSError(f"it answers {response.status} {response.reason}")
        text = b""
        while chunk := response.read1(65536):
            text += chunk
            if len(text) > MOST_BYTES or time.monotonic() > deadline_s:
                raise OSError(f"its answer takes more than {TIMEOUT_S:g} s or {MOST_BYTES} bytes")
        return text.decode()
    finally:
        connection.close()
