"""Device presets: what a device can really do, from its data sheet.

A preset's rate is the data sheet's dense peak times ``ATTAINABLE``, the part of it that large matrix products and
convolutions reach. It is a rule of thumb, good enough to plan before there is a device; a measured profile
(``profile=measured``) takes its place as soon as there is one. Memory is the data sheet's size read as 1e9 bytes
per GB; cards have about 7 % more, which leaves room for the CUDA context and the allocator's fragments.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from hybridpar.cluster.topology import Device
from hybridpar.errors import ClusterError
from hybridpar.names import nearest
from hybridpar.schema import from_data, to_data

ATTAINABLE = {
    # Share of the dense peak. Assumed by this project, not measured; ordered by how hard the peak is to feed:
    # plain FMA units reach most of it, tensor cores wait for memory more often the faster they are.
    "fma": 0.8,
    "tensor": 0.6,
}

# Share of the data sheet's memory bandwidth that streaming kernels reach; 0.75 to 0.9 on HBM2 cards. T. Deakin,
# J. Price, M. Martineau, S. McIntosh-Smith,
# "Evaluating attainable memory bandwidth of parallel programming models via BabelStream", Int. J. Computational
# Science and Engineering 17(3), 2018.
ATTAINABLE_BANDWIDTH = 0.8

# Seconds from one layer's kernels to the next when the queue is empty: a CUDA launch takes 2 to 5 us and an eager
# PyTorch operation about 10 us on the host. Assumed by this project, not measured.
CUDA_OVERHEAD_S = 10e-6


def _cuda(
    name: str, memory_gb: float, bandwidth_gb_per_s: float, fma: Mapping[str, float], tensor: Mapping[str, float]
) -> Device:
    """Build a preset from data-sheet peaks: memory in GB, bandwidth in GB/s, rates in TFLOP/s."""
    rates = {dtype: peak * 1e12 * ATTAINABLE["fma"] for dtype, peak in fma.items()}
    rates |= {dtype: peak * 1e12 * ATTAINABLE["tensor"] for dtype, peak in tensor.items()}
    return Device(
        name=name,
        memory_bytes=memory_gb * 1e9,
        flops_per_s=rates,
        memory_bytes_per_s=bandwidth_gb_per_s * 1e9 * ATTAINABLE_BANDWIDTH,
        overhead_s=CUDA_OVERHEAD_S,
    )


DEVICES: dict[str, Device] = {
    # NVIDIA Tesla P100 PCIe 16 GB data sheet (2016): 9.3 TFLOP/s single, 4.7 double, 18.7 half; 732 GB/s.
    "P100": _cuda("P100", 16, 732, {"float32": 9.3, "float64": 4.7, "float16": 18.7}, {}),
    # NVIDIA V100 data sheet (2020), SXM2 16 GB: 15.7 TFLOP/s single, 7.8 double, 125 tensor; 900 GB/s.
    "V100": _cuda("V100", 16, 900, {"float32": 15.7, "float64": 7.8}, {"float16": 125}),
    # NVIDIA A100 data sheet (2021), SXM4 80 GB: 19.5 TFLOP/s FP32, 19.5 FP64 tensor, 312 BF16/FP16 dense;
    # 2039 GB/s. float32 is without TF32, which PyTorch leaves off for matrix products.
    "A100": _cuda("A100", 80, 2039, {"float32": 19.5}, {"float64": 19.5, "bfloat16": 312, "float16": 312}),
    # NVIDIA H100 data sheet (2023), SXM5 80 GB: 67 TFLOP/s FP32, 67 FP64 tensor, 989 BF16/FP16 dense; 3350 GB/s.
    "H100": _cuda("H100", 80, 3350, {"float32": 67}, {"float64": 67, "bfloat16": 989, "float16": 989}),
    # NVIDIA H200 data sheet (2024), SXM5 141 GB: the H100's rates; 4800 GB/s.
    "H200": _cuda("H200", 141, 4800, {"float32": 67}, {"float64": 67, "bfloat16": 989, "float16": 989}),
    # One core of an AMD EPYC server with AVX-512, measured on 2026-11-23 with PyTorch 2.14 on one thread: square
    # matrix products of 1024 gave 87 GFLOP/s in float32, 218 in bfloat16 and 1 in float16; 3x3 convolutions of
    # 128 channels gave 23 in float64. Copying 64 MiB moved 28 GB/s, counting read and write. A linear map of 8
    # features took 6.4 us without autograd, with it about 10 us. One action of the executor took 30 us (forward)
    # to 110 us (loss) beyond its layers, the start of a message 40 us. Memory: an assumed share of the host's.
    "cpu_core": Device(
        name="cpu_core",
        memory_bytes=4e9,
        flops_per_s={"float32": 87e9, "float64": 23e9, "bfloat16": 218e9, "float16": 1e9},
        memory_bytes_per_s=28e9,
        overhead_s=10e-6,
        kind="cpu",
        action_s=50e-6,
    ),
}


def device(name: str, **overrides: Any) -> Device:
    """Return the preset ``name`` with fields replaced; ``flops_per_s`` is merged dtype by dtype.

    Fields and units are those of :class:`~hybridpar.cluster.topology.Device`; an override that is None leaves the
    preset's value. Raises ClusterError for an unknown preset (with the nearest name), an unknown or mistyped
    field, and a value out of range.
    """
    return custom({"preset": name, **overrides}, "device")


def custom(data: Mapping[str, Any], where: str) -> Device:
    """Build a device from plain data: ``preset`` and overrides, or all fields of a Device without a preset.

    ``where`` stands before the field in errors. Raises ClusterError as :func:`device` does.
    """
    given = {field: value for field, value in data.items() if value is not None and field != "preset"}
    if isinstance(given.get("flops_per_s"), Mapping):
        given["flops_per_s"] = {dtype: rate for dtype, rate in given["flops_per_s"].items() if rate is not None}
    preset = data.get("preset")
    if preset is not None:
        base = to_data(_preset(preset, where))
        rates = given.get("flops_per_s")
        if isinstance(rates, Mapping):
            given["flops_per_s"] = base["flops_per_s"] | rates
        given = base | given
    built = from_data(Device, given, where, ClusterError)
    _check(built, where)
    return built


def _preset(name: Any, where: str) -> Device:
    if name in DEVICES:
        return DEVICES[name]
    hint = nearest(str(name), DEVICES, cutoff=0.4)
    raise ClusterError(f"{where}: no device preset {name!r}{hint or ';'} known are {', '.join(DEVICES)}")


def _check(built: Device, where: str) -> None:
    positive = {"memory_bytes": built.memory_bytes, "memory_bytes_per_s": built.memory_bytes_per_s}
    positive |= {f"flops_per_s.{dtype}": rate for dtype, rate in built.flops_per_s.items()}
    for field, value in positive.items():
        if not (value > 0 and math.isfinite(value)):
            raise ClusterError(f"{where}.{field}: {value} is not above 0")
    if not (built.overhead_s >= 0 and math.isfinite(built.overhead_s)):
        raise ClusterError(f"{where}.overhead_s: {built.overhead_s} is below 0")
    if not built.flops_per_s:
        raise ClusterError(f"{where}.flops_per_s: empty; give a rate for at least one dtype, such as float32")
