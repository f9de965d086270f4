"""What the sampler process is told."""

from __future__ import annotations

from dataclasses import dataclass, field
from urllib.parse import urlsplit

from hybridpar.errors import require

DEFAULT_INTERVAL_S = 0.5
DEFAULT_MAX_BYTES = 32 * 1024 * 1024
"""About 30,000 samples."""

_MIN_INTERVAL_S = 0.12
_MIN_BYTES = 64 * 1024


@dataclass(frozen=True)
class Options:
    """What a user chooses of the sampling. Raises ConfigError naming a field out of range."""

    interval_s: float = DEFAULT_INTERVAL_S
    """Seconds between samples."""
    max_bytes: int = DEFAULT_MAX_BYTES
    """Bound of the file."""
    dcgm: str | None = None
    """URL of a dcgm-exporter that is asked for what NVML does not know; None: none is."""
    openmetrics: str | None = None
    """File for a node exporter, which has the latest samples; None: there is none."""
    replay: str | None = None
    """A monitor.jsonl that is played in the place of sampling; None: none is."""

    def __post_init__(self) -> None:
        fits = _MIN_INTERVAL_S <= self.interval_s <= 3600
        remedy = f"is not in {_MIN_INTERVAL_S}..3600; NVML averages over at least 100 ms"
        require(fits, "monitor.interval_s", self.interval_s, remedy)
        remedy = f"is below {_MIN_BYTES}; give the file more room"
        require(self.max_bytes >= _MIN_BYTES, "monitor.max_bytes", self.max_bytes, remedy)
        fits = self.dcgm is None or _is_address(self.dcgm)
        require(fits, "monitor.dcgm", self.dcgm, "must be an address like http://localhost:9400/metrics, or null")


def _is_address(url: str) -> bool:
    """Whether a URL is one of HTTP with a host, and with a port that is a number if there is one."""
    try:
        parts = urlsplit(url)
        return parts.scheme == "http" and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        return False


@dataclass(frozen=True)
class Settings:
    """One sampler process: what to watch, how often, and where to."""

    path: str
    parent: int
    """Process id; the sampler ends when this is no longer its parent."""
    uuids: tuple[str, ...] | None = None
    """None: all GPUs of the node; none given: the job uses no GPU."""
    ranks: tuple[tuple[int, int], ...] = ()
    """Rank and process id of the job's processes on this node."""
    options: Options = field(default_factory=Options)
