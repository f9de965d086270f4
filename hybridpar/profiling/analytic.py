"""A profile without the device: a roofline over each layer's operations and bytes.

Source of the model: S. Williams, A. Waterman, D. Patterson, "Roofline: an insightful visual performance model for
multicore architectures", Communications of the ACM 52(4), 2009. The overhead added to it is what keeps small
micro-batches from looking free. Profiles made here say ``source="estimated"``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hybridpar.cluster.topology import Device
from hybridpar.errors import ProfileError
from hybridpar.model.chain import Chain, Layer
from hybridpar.profiling.record import LayerProfile, Profile

MICRO_BATCHES = tuple(2**i for i in range(11))
FRACTIONS = (1.0, 0.5, 0.25, 0.125)
ITEM_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}

# Bytes moved per byte of parameters in an SGD step with momentum, as torch.optim.SGD's fused path runs it in one
# pass: it reads parameter, gradient and momentum, and writes parameter and momentum.
SGD_MOMENTUM_TRANSFERS = 5

# Bytes moved per byte of logits in softmax cross-entropy: log-softmax reads and writes, and so does its backward.
CROSS_ENTROPY_TRANSFERS = 4

# Bytes moved per byte of a parameter's gradient: written once, then added onto the gradient of the micro-batches
# before (two reads, one write). Where it gathers in place (hybridpar.model.linear), the sum is read and written.
GRADIENT_TRANSFERS, GATHERED_TRANSFERS = 4, 2

# Bytes moved per element to hash a keyed dropout mask: 23 reads and writes of 4 bytes, counted in model/keyed.py.
KEYED_MASK_BYTES = 92


@dataclass(frozen=True)
class _Items:
    """Bytes per element of a layer's input, of its output and of its parameters."""

    inputs: int
    outputs: int
    parameters: int


@dataclass(frozen=True)
class _Work:
    """What one pass of one layer does."""

    flops: float
    moved_bytes: float
    kernels: int

    def time(self, device: Device, flops_per_s: float) -> float:
        """Seconds: ``max(flops / rate, bytes / bandwidth) + kernels x overhead``."""
        busy = max(self.flops / flops_per_s, self.moved_bytes / device.memory_bytes_per_s)
        return busy + self.kernels * device.overhead_s


def estimate(
    chain: Chain,
    device: Device,
    dtype: str = "float32",
    micro_batches: Sequence[int] = MICRO_BATCHES,
    fractions: Sequence[float] = FRACTIONS,
) -> Profile:
    """Estimate the times of every layer of ``chain`` on ``device`` (seconds).

    ``micro_batches`` are samples, ascending; ``fractions`` are shares of a linear layer's output features,
    descending from 1. Under autocast layers compute at the rate of its dtype, or of ``dtype`` where the device has
    none for it. Raises ProfileError where the device has no rate for ``dtype`` or the dtype is unknown.
    """
    if dtype not in ITEM_BYTES:
        raise ProfileError(f"dtype {dtype!r} is unknown; use {', '.join(ITEM_BYTES)}")
    if dtype not in device.flops_per_s:
        raise ProfileError(
            f"device {device.name} has no rate for {dtype}, only for {', '.join(device.flops_per_s)}; "
            f"give cluster.device.flops_per_s.{dtype}, or train in another dtype"
        )
    rate, item_bytes = device.flops_per_s[dtype], ITEM_BYTES[dtype]
    rate = device.flops_per_s.get(chain.autocast or dtype, rate)
    layers = []
    for i, (layer, gathered) in enumerate(zip(chain.layers, chain.gathered, strict=True)):
        shares = tuple(fractions) if layer.linear else (1.0,)
        items = _Items(chain.out_itemsize(i - 1, item_bytes), chain.out_itemsize(i, item_bytes), item_bytes)
        forward = tuple(
            tuple(_forward(layer, b, share, items).time(device, rate) for b in micro_batches) for share in shares
        )
        backward = tuple(
            tuple(
                _backward(layer, b, share, items, gathered, chain.trained[i], ahead=i - chain.first_trained).time(
                    device, rate
                )
                for b in micro_batches
            )
            for share in shares
        )
        layers.append(LayerProfile(layer.name, forward, backward))
    return Profile(
        chain=chain.fingerprint,
        source="estimated",
        device=device.name,
        dtype=dtype,
        micro_batches=tuple(micro_batches),
        fractions=tuple(fractions),
        layers=tuple(layers),
        update_s_per_byte=SGD_MOMENTUM_TRANSFERS / device.memory_bytes_per_s,
        loss_s_per_element=CROSS_ENTROPY_TRANSFERS * item_bytes / device.memory_bytes_per_s,
    )


def _forward(layer: Layer, samples: int, share: float, items: _Items) -> _Work:
    """Count a forward: the layer's operations; input and parameters read, output and saved values written.

    No operation reads more than one parameter, so that a table from which rows are looked up is not read whole.
    """
    if layer.aliases_input:
        return _Work(0.0, 0.0, 1)
    outputs = samples * layer.out_elements * share
    flops = samples * layer.flops_per_sample * share
    parameters = min(layer.parameter_count * share, flops)
    moved_bytes = (
        samples * layer.in_elements * items.inputs + outputs * items.outputs + parameters * items.parameters
    )
    moved_bytes += layer.saved.total_bytes(samples, items.parameters)
    if layer.random == "keyed":
        moved_bytes += outputs * KEYED_MASK_BYTES
    return _Work(flops, moved_bytes, 1)


def _backward(
    layer: Layer, samples: int, share: float, items: _Items, gathered: int, trained: int, *, ahead: int
) -> _Work:
    """Count a backward: as many operations as the forward for each gradient, the input's and the parameters'.

    Reads the output's gradient, what the forward kept, and the parameters; writes the input's gradient, which the
    first layer to train does not need, and adds onto those of the ``trained`` elements, of which ``gathered`` lie
    in place. ``ahead``: how many layers behind the first one to train; none before it has a backward.
    """
    if ahead < 0:
        return _Work(0.0, 0.0, 0)
    parameters, first = trained * share, ahead == 0
    gradients = int(parameters > 0) + int(not first)
    if layer.aliases_input or not gradients:
        return _Work(0.0, 0.0, 1)
    inputs, outputs = samples * layer.in_elements, samples * layer.out_elements * share
    moved_bytes = outputs * (1 + int(layer.saves_output)) * items.outputs
    moved_bytes += inputs * (int(layer.saves_input) + int(not first)) * items.inputs
    elements = (parameters - gathered * share) * GRADIENT_TRANSFERS + gathered * share * GATHERED_TRANSFERS
    if not first:
        elements += layer.parameter_count * share
    moved_bytes += elements * items.parameters + layer.saved.total_bytes(samples, items.parameters)
    return _Work(gradients * samples * layer.flops_per_sample * share, moved_bytes, gradients)
