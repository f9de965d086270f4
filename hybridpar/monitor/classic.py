"""NVML's figures of GPUs of any generation: utilisation, memory, clocks, power; traffic where there is no GPM."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pynvml

from hybridpar.monitor import throttle
from hybridpar.monitor.rate import Rate
from hybridpar.monitor.source import Figures, Refused

_ALL_LINKS = 0xFFFFFFFF
_COUNTERS = {
    "pcie_sent_bytes_per_s": ((pynvml.NVML_FI_DEV_PCIE_COUNT_TX_BYTES, 0), 1),
    "pcie_received_bytes_per_s": ((pynvml.NVML_FI_DEV_PCIE_COUNT_RX_BYTES, 0), 1),
    "nvlink_sent_bytes_per_s": ((pynvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX, _ALL_LINKS), 1024),
    "nvlink_received_bytes_per_s": ((pynvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX, _ALL_LINKS), 1024),
}
"""Field, scope, and bytes per unit of NVML's traffic counters."""
_FOR_GOOD = {
    pynvml.NVML_ERROR_NOT_SUPPORTED,
    pynvml.NVML_ERROR_FUNCTION_NOT_FOUND,
    pynvml.NVML_ERROR_NO_PERMISSION,
    pynvml.NVML_ERROR_DEPRECATED,
}
"""Refusals after which a call is not made again."""


class Classic:
    """The figures of one GPU, or of a MIG slice, which has few of them."""

    source = "nvml"

    def __init__(self, device: Any, *, traffic: bool, turn: tuple[int, int] = (0, 1)) -> None:
        """Read nothing yet.

        Args:
            device: NVML's handle.
            traffic: whether to read what goes over PCIe and NVLink.
            turn: (i, n): in which of n ticks NVML may look at PCIe for 20 ms per direction, where the driver has
                no counters of it.

        """
        self._device, self._traffic, self._turn = device, traffic, turn
        self._refused: set[tuple[Callable[..., Any], str]] = set()
        self._rates = {name: Rate() for name in _COUNTERS}
        self._counted_s: float | None = None
        self._ticks = self._answers = 0
        self._error: pynvml.NVMLError | None = None
        self._max_clock = self._ask(pynvml.nvmlDeviceGetMaxClockInfo, pynvml.NVML_CLOCK_SM)

    def read(self, time_s: float) -> Figures:  # noqa: ARG002 - of Meter: NVML needs no stamp
        """Return the figures of now; raises Refused where NVML gives none at all."""
        self._answers, self._error = 0, None
        figures = {**self._use(), **self._clocks(), **self._power()}
        if self._traffic:
            figures |= self._moved()
        self._ticks += 1
        if not self._answers:
            raise Refused(str(self._error or "the driver supports no figure of this device"))
        return figures

    def close(self) -> None:
        """Do nothing: there is nothing to give back."""

    def _use(self) -> Figures:
        rates = self._ask(pynvml.nvmlDeviceGetUtilizationRates)
        memory = self._ask(pynvml.nvmlDeviceGetMemoryInfo, pynvml.nvmlMemory_v2)
        return {
            "utilisation": None if rates is None else rates.gpu / 100.0,
            "memory_utilisation": None if rates is None else rates.memory / 100.0,
            "memory_used_bytes": None if memory is None else memory.used,
            "memory_total_bytes": None if memory is None else memory.total,
        }

    def _clocks(self) -> Figures:
        """MHz to Hz."""
        sm = self._ask(pynvml.nvmlDeviceGetClockInfo, pynvml.NVML_CLOCK_SM)
        memory = self._ask(pynvml.nvmlDeviceGetClockInfo, pynvml.NVML_CLOCK_MEM)
        bits = self._ask(pynvml.nvmlDeviceGetCurrentClocksEventReasons)
        if bits is None:  # drivers before 535 know it by its older name only
            bits = self._ask(pynvml.nvmlDeviceGetCurrentClocksThrottleReasons)
        return {
            "sm_clock_hz": _scaled(sm, 1e6),
            "sm_clock_max_hz": _scaled(self._max_clock, 1e6),
            "memory_clock_hz": _scaled(memory, 1e6),
            "throttle": None if bits is None else throttle.names(bits),
        }

    def _power(self) -> Figures:
        """MW and mJ to W and J."""
        return {
            "temperature_c": _scaled(self._ask(pynvml.nvmlDeviceGetTemperature, pynvml.NVML_TEMPERATURE_GPU), 1.0),
            "power_w": _scaled(self._ask(pynvml.nvmlDeviceGetPowerUsage), 1e-3),
            "power_limit_w": _scaled(self._ask(pynvml.nvmlDeviceGetEnforcedPowerLimit), 1e-3),
            "energy_j": _scaled(self._ask(pynvml.nvmlDeviceGetTotalEnergyConsumption), 1e-3),
        }

    def _moved(self) -> Figures:
        """Rates of the counters; of PCIe, where there are none, what the driver saw within 20 ms."""
        now_s = time.monotonic()
        window_s = None if self._counted_s is None else now_s - self._counted_s
        self._counted_s = now_s
        values = self._ask(pynvml.nvmlDeviceGetFieldValues, [field for field, _ in _COUNTERS.values()])
        figures: Figures = {}
        for i, (name, (_, unit_bytes)) in enumerate(_COUNTERS.items()):
            count = None if values is None else _count(values[i])
            figures[name] = self._rates[name].step(_scaled(count, unit_bytes), window_s)
        counted = values is not None and _count(values[0]) is not None
        mine, turns = self._turn
        if not counted and self._ticks % turns == mine:
            looks = {"sent": pynvml.NVML_PCIE_UTIL_TX_BYTES, "received": pynvml.NVML_PCIE_UTIL_RX_BYTES}
            for way, counter in looks.items():
                seen = self._ask(pynvml.nvmlDeviceGetPcieThroughput, counter)
                figures[f"pcie_{way}_bytes_per_s"] = _scaled(seen, 1024)
        return figures

    def _ask(self, call: Callable[..., Any], *arguments: Any) -> Any:
        """Return what an NVML call returns, None where it fails, which is not tried again where it is for good."""
        asked = call, str(arguments)  # one clock may be refused, and another one known
        if asked in self._refused:
            return None
        try:
            value = call(self._device, *arguments)
        except pynvml.NVMLError as e:
            self._error = self._error or e
            if e.value in _FOR_GOOD:
                self._refused.add(asked)
            return None
        self._answers += 1
        return value


def _scaled(value: float | None, unit: float) -> float | None:
    return None if value is None else float(value * unit)


def _count(field: Any) -> int | None:
    """Return a field's unsigned value, None where the driver does not have it."""
    if field.nvmlReturn != pynvml.NVML_SUCCESS:
        return None
    kinds = {
        pynvml.NVML_VALUE_TYPE_UNSIGNED_INT: "uiVal",
        pynvml.NVML_VALUE_TYPE_UNSIGNED_LONG: "ulVal",
        pynvml.NVML_VALUE_TYPE_UNSIGNED_LONG_LONG: "ullVal",
    }
    kind = kinds.get(field.valueType)
    return None if kind is None else int(getattr(field.value, kind))
