"""GPUs, driver and backends of a rank's node."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pynvml
import torch
import torch.distributed as dist

from hybridpar.doctor.finding import Finding, note, ok, wrong
from hybridpar.report.text import in_bytes

_TOPIC = "devices"


@dataclass(frozen=True)
class Driver:
    """The NVIDIA driver, as NVML tells."""

    version: str
    cuda: tuple[int, int]
    """The newest CUDA that it runs."""
    gpus: tuple[str, ...]
    """Name and memory of each."""


def read_driver() -> Driver | str:
    """Return the driver, or why there is none."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as e:
        return str(e)
    try:
        number = int(pynvml.nvmlSystemGetCudaDriverVersion_v2())
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        gpus = tuple(_gpu(i, handle) for i, handle in enumerate(handles))
        return Driver(str(pynvml.nvmlSystemGetDriverVersion()), (number // 1000, number % 1000 // 10), gpus)
    except pynvml.NVMLError as e:
        return str(e)
    finally:
        pynvml.nvmlShutdown()


def _gpu(index: int, handle: Any) -> str:
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    free, total = in_bytes(memory.free), in_bytes(memory.total)
    return f"{index}: {pynvml.nvmlDeviceGetName(handle)}, {free} of {total} free"


def check_driver(driver: Driver | str, built_for: str | None, *, monitored: bool) -> list[Finding]:
    """Compare the driver with the CUDA that torch is built for; ``monitored``: ``monitor=required``."""
    if isinstance(driver, str):
        if monitored:
            return [wrong(_TOPIC, f"NVML: {driver}", "install the NVIDIA driver, or set monitor=auto")]
        return [note(_TOPIC, f"no GPU data (NVML: {driver})")]
    newest = "{}.{}".format(*driver.cuda)
    what = f"driver {driver.version} runs CUDA up to {newest}"
    if built_for is not None and int(built_for.split(".")[0]) > driver.cuda[0]:
        remedy = f"update the driver, or install a torch for CUDA {driver.cuda[0]} (pytorch.org/get-started)"
        return [wrong(_TOPIC, f"{what}, but torch is built for CUDA {built_for}", remedy)]
    return [ok(_TOPIC, what), *(ok(_TOPIC, f"GPU {gpu}") for gpu in driver.gpus)]


def check_torch(driver: Driver | str, wanted: str, ranks: int, environment: Mapping[str, str]) -> list[Finding]:
    """Look at torch's GPUs and backends, for ``ranks`` ranks per node with ``train.device`` as ``wanted``."""
    found, count = [_backends()], _count()
    physical = 0 if isinstance(driver, str) else len(driver.gpus)
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if physical and torch.version.cuda is None:
        remedy = "install a CUDA build of torch (pytorch.org/get-started)"
        found.append(wrong(_TOPIC, f"torch {torch.__version__} is built for the CPU only", remedy))
    elif physical > count and visible is not None:
        found.append(note(_TOPIC, f"CUDA_VISIBLE_DEVICES={visible} leaves {count} of {physical} GPUs"))
    elif physical and not count:
        remedy = "see what `python -c 'import torch; torch.cuda.init()'` says; often driver and torch do not fit"
        found.append(wrong(_TOPIC, f"torch uses none of the {physical} GPUs", remedy))
    found += [_try(i) for i in range(count)]
    if count < ranks and (wanted == "cuda" or count):
        what = f"{count} GPUs for {ranks} ranks per node"
        remedy = f"start {count or 'no'} ranks per node, or set train.device=cpu"
        found.append(
            wrong(_TOPIC, what, remedy)
            if wanted == "cuda"
            else note(_TOPIC, f"{what}: they run on the CPU", remedy)
        )
    return found


def _backends() -> Finding:
    gloo, nccl = dist.is_available() and dist.is_gloo_available(), dist.is_available() and dist.is_nccl_available()
    numbers: tuple[int, ...] = torch.cuda.nccl.version() if nccl else ()  # type: ignore[no-untyped-call]
    version = ".".join(map(str, numbers)) or "none"
    what = f"torch {torch.__version__}, CUDA {torch.version.cuda or 'none'}, NCCL {version}"
    if not gloo:
        return wrong(_TOPIC, f"{what}, no gloo", "install a torch with gloo; the official builds have it")
    return ok(_TOPIC, f"{what}, gloo")


def _count() -> int:
    with warnings.catch_warnings():  # torch warns of a driver that is too old, which check_driver tells
        warnings.simplefilter("ignore")
        return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _try(index: int) -> Finding:
    """Compute something on a GPU."""
    properties = torch.cuda.get_device_properties(index)
    what = f"torch's GPU {index}: {properties.name}, compute capability {properties.major}.{properties.minor}"
    try:
        with warnings.catch_warnings():  # of an architecture that the build lacks, which fails below
            warnings.simplefilter("ignore")
            torch.ones(2, device=f"cuda:{index}").sum().item()
    except RuntimeError as e:
        remedy = "see who uses it (nvidia-smi), or install a torch that is built for it"
        return wrong(_TOPIC, f"{what} does not compute: {str(e).splitlines()[0]}", remedy)
    return ok(_TOPIC, what)
