"""What a monitor would have recorded, made by formulas."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from hybridpar.monitor.record import Gap, GpuSample, HostSample, RankSample, Record, Traffic

BEGIN_S = 1_800_000_000.0
INTERVAL_S = 0.5
GIB = 2**30


def uuid_of(gpu: int) -> str:
    return f"GPU-{gpu}"


def gpu_samples(ticks: int, gpus: int = 2, host: str = "node0") -> Iterator[GpuSample]:
    """GPUs that are always busy; the even ones are full, the odd ones below a half three times out of four."""
    for tick in range(ticks):
        for gpu in range(gpus):
            full = gpu % 2 == 0 or tick % 4 == 0
            occupancy = (0.8 if full else 0.3) + 0.05 * math.sin(tick / 9)
            yield GpuSample(
                time_s=BEGIN_S + INTERVAL_S * tick,
                host=host,
                gpu=gpu,
                uuid=uuid_of(gpu),
                utilisation=0.97,
                graphics_activity=0.95,
                occupancy=0.95 * occupancy,
                occupancy_while_busy=occupancy,
                memory_used_bytes=(10 + gpu) * GIB,
                memory_total_bytes=80 * GIB,
                sources={"utilisation": "nvml", "occupancy": "gpm"},
            )


def host_samples(
    ticks: int, ranks: Sequence[int], host: str = "node0", step_s: float = 0.1, bytes_per_step: int = 10**6
) -> Iterator[HostSample]:
    """A host whose ranks keep half a CPU busy each and send so much over the loopback interface in every step."""
    for tick in range(ticks):
        sent = round(tick * INTERVAL_S / step_s * bytes_per_step)
        rate = None if tick == 0 else bytes_per_step / step_s
        yield HostSample(
            time_s=BEGIN_S + INTERVAL_S * tick,
            host=host,
            window_s=None if tick == 0 else INTERVAL_S,
            cpus=4,
            cpu_cores=None if tick == 0 else 0.5 * len(ranks) + 0.3 * math.sin(tick / 5) ** 2,
            memory_used_bytes=3 * GIB,
            memory_total_bytes=16 * GIB,
            network={"lo": Traffic(sent, sent, rate, rate)} if tick else {},
            ranks=tuple(RankSample(r, 100 + r, None if tick == 0 else 0.5, 0.1, GIB) for r in ranks),
            sampler_cpu_s=0.1 + 0.001 * tick,
            sources={"cpu_cores": "psutil"},
        )


def in_turns(*streams: Iterator[Record]) -> list[Record]:
    return sorted((r for stream in streams for r in stream), key=lambda r: r.time_s)


NO_GPU = Gap(BEGIN_S, "node0", "the job uses no GPU on this node")
