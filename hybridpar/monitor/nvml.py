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
    parent: Any
    """Of a slice, the handle of its GPU; else None."""
    instance: int | None
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
    find: Callable[..., Any] = pynvml.nvmlDeviceGetHandleByIndex
    index, uuid, label = (key, None, f"GPU {key}") if isinstance(key, int) else (None, key, key)
    if isinstance(key, str):
        find = pynvml.nvmlDeviceGetHandleByUUID
    try:
        handle = find(key)
    except pynvml.NVMLError as e:
        return Unavailable(f"{label} gives no data: {e}")
    uuid = uuid or _value(pynvml.nvmlDeviceGetUUID, handle)
    parent = _value(pynvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle, handle) if _is_slice(uuid) else None
    index = _value(pynvml.nvmlDeviceGetIndex, parent or handle) if index is None else index
    instance = _value(pynvml.nvmlDeviceGetGpuInstanceId, handle) if parent else None
    return _Device(index, uuid, handle, parent, instance)


def _is_slice(uuid: str | None) -> bool:
    return uuid is not None and uuid.startswith("MIG-")


def _meters(device: _Device, turn: tuple[int, int]) -> tuple[tuple[Meter, ...], str | None]:
    """Return what measures a device, and a sentence why that is not all."""
    try:
        gpm = Gpm(device.parent or device.handle, device.instance)
    except pynvml.NVMLError as e:
        label = device.uuid or f"GPU {device.index}"
        gap = f"{label} gives no occupancy, which needs Hopper or later: {e}"
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
