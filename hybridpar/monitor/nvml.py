"""Opens a node's GPUs through NVML."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pynvml

from hybridpar.monitor.classic import Classic
from hybridpar.monitor.gpm import Gpm
from hybridpar.monitor.gpus import Gpu, Gpus
from hybridpar.monitor.source import Meter, Unavailable
from hybridpar.monitor.xid import Xids

_INIT_REASONS = {
    pynvml.NVML_ERROR_LIBRARY_NOT_FOUND: "no NVIDIA driver: NVML library not found",
    pynvml.NVML_ERROR_DRIVER_NOT_LOADED: "no NVIDIA driver: the kernel module is not loaded",
    pynvml.NVML_ERROR_NO_PERMISSION: "this user may not use the NVIDIA driver",
    pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH: (
        "the NVIDIA kernel module and NVML differ in version; reboot after a driver update"
    ),
}


_NEEDS = "which needs Hopper or later"

Further = Callable[[str | None, int | None], tuple[Meter, ...]]
"""From a GPU's UUID, and of a MIG slice its GPU instance, to meters besides NVML's."""


def _nothing_more(uuid: str | None, instance: int | None) -> tuple[Meter, ...]:  # noqa: ARG001 - of Further
    return ()


@dataclass(frozen=True)
class _Device:
    """A GPU or MIG slice as NVML gives it."""

    index: int | None
    uuid: str | None
    handle: Any
    parent: Any = None
    """Of a slice, the handle of its GPU; else None."""
    instance: int | None = None
    """Of a slice, the id of its GPU instance."""

    @property
    def whole(self) -> tuple[str | None, int | None]:
        """The GPU's UUID, and of a slice its GPU instance."""
        return (_value(pynvml.nvmlDeviceGetUUID, self.parent) if self.parent else self.uuid), self.instance


def open_nvml(uuids: Sequence[str] | None, more: Further = _nothing_more) -> Gpus | Unavailable:
    """Open NVML and the GPUs with the given UUIDs ("GPU-..." or "MIG-..."), or all GPUs of the node for None.

    ``more`` gives further meters, of a GPU or slice. ``CUDA_VISIBLE_DEVICES`` plays no part: NVML does not know
    it, and UUIDs do not shift with it.
    """
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as e:
        return Unavailable(_INIT_REASONS.get(e.value, f"NVML does not start: {e}"))
    keys: Sequence[str | int] = range(_value(pynvml.nvmlDeviceGetCount) or 0) if uuids is None else uuids
    gpus, gaps, handles = list[Gpu](), list[str](), dict[int, Any]()
    for at, key in enumerate(keys):
        device = _find(key)
        if isinstance(device, Unavailable):
            gpus.append(Gpu(key, None, ()) if isinstance(key, int) else Gpu(None, key, more(key, None)))
            gaps.append(device.reason)
            continue
        meters, gap = _meters(device, (at, len(keys)))
        handles[at] = device.parent or device.handle
        gpus.append(Gpu(device.index, device.uuid, (*meters, *more(*device.whole))))
        gaps += [gap] if gap else []
    if not handles:
        _value(pynvml.nvmlShutdown)
        return Unavailable("; ".join(gaps) or "the NVIDIA driver knows no GPU on this node")
    xids = _listen(handles)
    if isinstance(xids, Unavailable):
        return Gpus(gpus, [*gaps, xids.reason], release=lambda: _value(pynvml.nvmlShutdown))

    def release() -> None:
        xids.close()
        _value(pynvml.nvmlShutdown)

    return Gpus(gpus, gaps, xids.read, release)


def _find(key: str | int) -> _Device | Unavailable:
    """Find a GPU by UUID or by index."""
    try:
        handle, name = _named(key)
    except pynvml.NVMLError as e:
        return Unavailable(f"{f'GPU {key}' if isinstance(key, int) else key} gives no data: {e}")
    uuid, index = (name, key) if isinstance(key, int) else (key, None)
    if name is None or not name.startswith("MIG-"):
        return _Device(_value(pynvml.nvmlDeviceGetIndex, handle) if index is None else index, uuid, handle)
    parent = _value(pynvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle, handle)
    instance = _value(pynvml.nvmlDeviceGetGpuInstanceId, handle)
    if parent is None or instance is None:
        return Unavailable(f"{key} gives no data: NVML does not tell of which GPU it is a MIG slice")
    return _Device(_value(pynvml.nvmlDeviceGetIndex, parent), uuid, handle, parent, instance)


def _named(key: str | int) -> tuple[Any, str | None]:
    """Return NVML's handle and name of what has an index, or a UUID.

    CUDA tells the digits of a slice's UUID as those of a GPU's (cuDeviceGetUuid_v2 in CUDA's driver API), so that
    a slice may be asked for as ``GPU-...``.
    """
    if isinstance(key, int):
        handle = pynvml.nvmlDeviceGetHandleByIndex(key)
        return handle, _value(pynvml.nvmlDeviceGetUUID, handle)
    try:
        return pynvml.nvmlDeviceGetHandleByUUID(key), key
    except pynvml.NVMLError:
        name = key.replace("GPU-", "MIG-", 1)
        if name == key:
            raise
        return pynvml.nvmlDeviceGetHandleByUUID(name), name


def _meters(device: _Device, turn: tuple[int, int]) -> tuple[tuple[Meter, ...], str | None]:
    """Return what measures a device, and a sentence why that is not all."""
    try:
        gpm = Gpm(device.parent or device.handle, device.instance)
    except pynvml.NVMLError as e:
        why = "which this user may not read" if e.value == pynvml.NVML_ERROR_NO_PERMISSION else _NEEDS
        gap = f"{device.uuid or f'GPU {device.index}'} gives no occupancy, {why}: {e}"
        return (Classic(device.handle, traffic=True, turn=turn),), gap
    return (Classic(device.handle, traffic=False), gpm), None


def _listen(handles: dict[int, Any]) -> Xids | Unavailable:
    try:
        return Xids(handles)
    except pynvml.NVMLError as e:
        return Unavailable(f"no Xid errors: {e}")


def _value(call: Callable[..., Any], *arguments: Any) -> Any:
    """Return what an NVML call returns, None where it fails."""
    try:
        return call(*arguments)
    except pynvml.NVMLError:
        return None
