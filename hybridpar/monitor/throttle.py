"""What keeps a GPU's clocks down, by names: NVML and DCGM number the reasons alike."""

from __future__ import annotations

NAMES = {
    0x2: "application_clocks",  # somebody set them
    0x4: "power_cap",
    0x8: "hardware",  # temperature or power, far beyond what is allowed
    0x10: "sync_boost",  # as slow as the slowest GPU of its group
    0x20: "thermal",
    0x40: "hardware_thermal",
    0x80: "power_brake",  # the power supply asks for it
    0x100: "display_clocks",
}
"""Bits of ``nvmlDeviceGetCurrentClocksEventReasons`` (nvml.h, nvmlClocksEventReasons). That the GPU is idle, 0x1,
is left out: then there is nothing to slow down."""


def names(bits: int) -> tuple[str, ...]:
    """Return the names of the reasons in a mask."""
    return tuple(name for bit, name in NAMES.items() if bits & bit)
