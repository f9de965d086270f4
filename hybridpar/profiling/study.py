"""The batch study of a profile: what the device did while the layers ran, by micro-batch size."""

from __future__ import annotations

from dataclasses import dataclass, field

from hybridpar.errors import ProfileError

Figures = tuple[float | None, ...]
"""In 0..1, one per micro-batch size of the profile; None is unknown."""


@dataclass(frozen=True)
class LayerUse:
    """A layer's forward and backward together."""

    utilisation: Figures
    """Share of its time in which the device worked for it: kernels ran, or on a CPU its thread did."""
    occupancy: Figures
    """Mean over that share of active warps over the most that fit."""
    below_half: Figures
    """Of that share, the part in which occupancy was below 50 %."""


@dataclass(frozen=True)
class DeviceUse:
    """Passes through the whole model, one after the other, by the device's own counters."""

    graphics_activity: Figures
    """Share of the time in which any kernel ran."""
    occupancy_while_busy: Figures
    tensor_activity: Figures
    dram_activity: Figures


@dataclass(frozen=True)
class Study:
    """Figures of every layer, and of the device."""

    layers: tuple[LayerUse, ...]
    device: DeviceUse
    sources: dict[str, str] = field(default_factory=dict)
    """Where ``utilisation``, ``occupancy`` and the ``device`` come from: ``kineto`` (estimated from the launch of
    every kernel), ``gpm`` (NVML's counters), ``cpu time`` over time on the wall. What is unknown has no source."""

    def check(self, layers: int, sizes: int) -> None:
        """Raise ProfileError where it does not fit a profile of so many layers and micro-batch sizes."""
        if len(self.layers) != layers:
            raise ProfileError(f"study.layers: {len(self.layers)} for {layers} layers; measure again")
        named = [(f"study.layers[{i}]", use) for i, use in enumerate(self.layers)]
        for where, use in (*named, ("study.device", self.device)):
            for name, figures in vars(use).items():
                known = [value for value in figures if value is not None]
                if len(figures) != sizes or not all(0 <= value <= 1 for value in known):
                    raise ProfileError(f"{where}.{name}: {figures} is not one of 0..1 or null per micro-batch")
