"""What a probe measured, as text."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from hybridpar.cluster.probed import Probed, Series

_UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"))


def show(probed: Probed, console: Console) -> None:
    """Print nodes, the fitted lines with their errors, contention, and what is poor or missing."""
    cluster = probed.cluster
    nodes = len(cluster.nodes)
    cores = sorted({"own" if node.cores is None else str(node.cores) for node in cluster.nodes})
    console.print(
        f"{cluster.name}: {cluster.world} ranks on {nodes} node{'s' * (nodes > 1)}, {cluster.device.name}, "
        f"cores per node: {', '.join(cores)}, {cluster.device.memory_bytes / 2**30:.2f} GiB per rank; "
        f"measured in {probed.wall_s:.0f} s"
    )
    console.print(_lines(probed))
    speeds = [cluster.speed(rank) for rank in range(cluster.world)]
    if len(set(speeds)) > 1:
        console.print("speed of the devices by rank: " + ", ".join(f"{s:.3g}" for s in speeds))
    for series in probed.series:
        if series.fit.poor:
            console.print(_poor(series))
    for missing in probed.unmeasured:
        console.print(f"not measured: {missing}")


def _lines(probed: Probed) -> Table:
    table = Table(box=None, pad_edge=False, show_edge=False)
    table.add_column("level")
    table.add_column("what")
    table.add_column("direction")
    for name in ("ranks", "latency", "bandwidth", "error", "worst at", "contention"):
        table.add_column(name, justify="right")
    for s in probed.series:
        contention = [f"{o.contention:.2f}" for o in probed.overlaps if (o.level, o.what) == (s.level, s.what)]
        table.add_row(
            s.level,
            s.what,
            "" if s.direction == "both" else s.direction,
            str(s.ranks),
            _seconds(s.fit.latency_s),
            f"{s.fit.bytes_per_s / 1e9:.3g} GB/s",
            f"{s.fit.median_error:.0%}",
            f"{s.fit.worst_error:.0%} {_size(_payload(s))}",
            " ".join(contention),
        )
    return table


def _payload(series: Series) -> int:
    """Return the payload of the sample that is farthest from the line."""
    return series.payload_bytes[series.seconds.index(series.fit.worst.seconds)]


def _poor(series: Series) -> str:
    times = ", ".join(
        f"{_size(b)} {_seconds(t)}" for b, t in zip(series.payload_bytes, series.seconds, strict=True)
    )
    return (
        f"poor fit: {series.what} on level {series.level} is no straight line "
        f"(off by {series.fit.median_error:.0%} in the median, {series.fit.worst_error:.0%} at worst): {times}; "
        "probe again on a calm machine"
    )


def _seconds(seconds: float) -> str:
    scale, unit = next(((s, u) for s, u in _UNITS if seconds >= s), _UNITS[-1])
    return f"{seconds / scale:.3g} {unit}"


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:.0f} MiB" if size_bytes >= 2**20 else f"{size_bytes / 2**10:.0f} KiB"
