"""Reads samples of a node's GPUs through NVML."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pynvml

from hybridpar.monitor.gpm import Activity, Gpm
from hybridpar.monitor.record import Sample

IDLE_BELOW = 0.01
"""Graphics activity below which a window counts as idle: the quotient with occupancy would be noise."""

_INIT_REASONS = {
    pynvml.NVML_ERROR_LIBRARY_NOT_FOUND: "no NVIDIA driver: NVML library not found",
    pynvml.NVML_ERROR_DRIVER_NOT_LOADED: "no NVIDIA driver: the kernel module is not loaded",
    pynvml.NVML_ERROR_NO_PERMISSION: "this user may not use the NVIDIA driver",
    pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH: (
        "the NVIDIA kernel module and NVML differ in version; reboot after a driver update"
    ),
}


@dataclass(frozen=True)
class Unavailable:
    """NVML gives no data at all."""

    reason: str
    """One sentence."""


@dataclass(frozen=True)
class _Device:
    """One GPU, or one MIG slice; a handle of None is one that NVML does not give."""

    index: int | None
    uuid: str | None
    handle: Any
    gpm: Gpm | None


class Reader:
    """An open NVML and the GPUs to read; ``close`` gives both back."""

    def __init__(self, devices: Sequence[_Device], gaps: Sequence[str]) -> None:
        self.gaps = tuple(gaps)
        """What will be unknown and why, one sentence each."""
        self._devices = tuple(devices)
        self._host = socket.gethostname()

    def read(self, time_s: float) -> tuple[Sample, ...]:
        """Return one sample per GPU, stamped ``time_s``; whatever a call refuses is None in it."""
        return tuple(_read_device(device, self._host, time_s) for device in self._devices)

    def close(self) -> None:
        """Free the GPM samples and shut NVML down."""
        for device in self._devices:
            if device.gpm is not None:
                device.gpm.close()
        _value(pynvml.nvmlShutdown)


def open_reader(uuids: Sequence[str] | None) -> Reader | Unavailable:
    """Open NVML and the GPUs with the given UUIDs ("GPU-..." or "MIG-..."), or all GPUs of the node for None.

    ``CUDA_VISIBLE_DEVICES`` plays no part: NVML does not know it, and UUIDs do not shift with it.
    """
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as e:
        return Unavailable(_INIT_REASONS.get(e.value, f"NVML does not start: {e}"))
    devices, gaps = [], []
    keys: Sequence[str | int] = range(_value(pynvml.nvmlDeviceGetCount) or 0) if uuids is None else uuids
    for key in keys:
        device, gap = _open_device(key)
        devices.append(device)
        gaps += [gap] if gap else []
    if all(device.handle is None for device in devices):
        _value(pynvml.nvmlShutdown)
        return Unavailable("; ".join(gaps) or "the NVIDIA driver knows no GPU on this node")
    return Reader(devices, gaps)


def _open_device(key: str | int) -> tuple[_Device, str | None]:
    """Open a GPU by UUID or by index; the sentence says what will be unknown of it and why."""
    find: Callable[..., Any] = pynvml.nvmlDeviceGetHandleByIndex
    index, uuid, name = (key, None, f"GPU {key}") if isinstance(key, int) else (None, key, key)
    if isinstance(key, str):
        find = pynvml.nvmlDeviceGetHandleByUUID
    try:
        handle = find(key)
    except pynvml.NVMLError as e:
        return _Device(index, uuid, None, None), f"{name} gives no data: {e}"
    uuid = uuid or _value(pynvml.nvmlDeviceGetUUID, handle)
    parent = _value(pynvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle, handle) if _is_slice(uuid) else None
    index = _value(pynvml.nvmlDeviceGetIndex, parent or handle) if index is None else index
    try:
        instance = pynvml.nvmlDeviceGetGpuInstanceId(handle) if parent else None
        return _Device(index, uuid, handle, Gpm(parent or handle, instance)), None
    except pynvml.NVMLError as e:
        gap = f"{uuid or name} gives no occupancy, which needs Hopper or later: {e}"
        return _Device(index, uuid, handle, None), gap


def _is_slice(uuid: str | None) -> bool:
    return uuid is not None and uuid.startswith("MIG-")


def _read_device(device: _Device, host: str, time_s: float) -> Sample:
    """Classic utilisation where there is one (a MIG slice has none), GPM's graphics activity otherwise."""
    activity = device.gpm.read() if device.gpm else None
    gpm = _activity_fields(activity)
    nvml = _classic_fields(device.handle) if device.handle is not None else {}
    if nvml.get("utilisation") is None:
        gpm["utilisation"] = gpm.get("graphics_activity")
        nvml.pop("utilisation", None)
    known = {"gpm": gpm, "nvml": nvml}
    sources = {name: s for s, fields in known.items() for name, value in fields.items() if value is not None}
    window_s = None if activity is None else activity.window_s
    who = Sample(time_s, host, device.index, device.uuid, sources=sources, window_s=window_s)
    return replace(who, **gpm, **nvml)


def _activity_fields(activity: Activity | None) -> dict[str, Any]:
    if activity is None:
        return {}
    while_busy = None
    if activity.occupancy is not None and activity.graphics is not None and activity.graphics >= IDLE_BELOW:
        while_busy = min(activity.occupancy / activity.graphics, 1.0)
    return {
        "graphics_activity": activity.graphics,
        "sm_activity": activity.sm,
        "occupancy": activity.occupancy,
        "occupancy_while_busy": while_busy,
        "tensor_activity": activity.tensor,
        "dram_activity": activity.dram,
    }


def _classic_fields(handle: Any) -> dict[str, Any]:
    rates = _value(pynvml.nvmlDeviceGetUtilizationRates, handle)
    memory = _value(pynvml.nvmlDeviceGetMemoryInfo, handle, pynvml.nvmlMemory_v2)
    return {
        "utilisation": None if rates is None else rates.gpu / 100.0,
        "memory_used_bytes": None if memory is None else memory.used,
        "memory_total_bytes": None if memory is None else memory.total,
    }


def _value(call: Callable[..., Any], *arguments: Any) -> Any:
    """Return what an NVML call returns, None where it fails."""
    try:
        return call(*arguments)
    except pynvml.NVMLError:
        return None
