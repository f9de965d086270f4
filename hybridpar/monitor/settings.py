"""What the sampler process is told."""

from __future__ import annotations

from dataclasses import dataclass

from hybridpar.errors import ConfigError

DEFAULT_INTERVAL_S = 0.5
DEFAULT_MAX_BYTES = 32 * 1024 * 1024
"""About 50,000 samples."""

_MIN_INTERVAL_S = 0.12
_MIN_BYTES = 64 * 1024


@dataclass(frozen=True)
class Settings:
    """One sampler process: which GPUs, how often, and where to. Raises ConfigError naming a field out of range."""

    path: str
    parent: int
    """Process id; the sampler ends when this is no longer its parent."""
    uuids: tuple[str, ...] | None = None
    """None: all GPUs of the node."""
    interval_s: float = DEFAULT_INTERVAL_S
    max_bytes: int = DEFAULT_MAX_BYTES

    def __post_init__(self) -> None:
        if not _MIN_INTERVAL_S <= self.interval_s <= 3600:
            raise ConfigError(
                f"monitor.interval_s: {self.interval_s} is not in {_MIN_INTERVAL_S}..3600; "
                "NVML averages over at least 100 ms"
            )
        if self.max_bytes < _MIN_BYTES:
            raise ConfigError(
                f"monitor.max_bytes: {self.max_bytes} is below {_MIN_BYTES}; give the file more room"
            )
