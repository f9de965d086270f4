"""Which sources a sampler opens."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from hybridpar.monitor.gpus import Gpu, Gpus
from hybridpar.monitor.host import Host
from hybridpar.monitor.nvml import open_nvml
from hybridpar.monitor.record import read
from hybridpar.monitor.replay import Replay
from hybridpar.monitor.settings import Settings
from hybridpar.monitor.source import Meter, Refused, Source, Unavailable


def open_sources(settings: Settings) -> tuple[list[Source], str | None]:
    """Open everything that can be read on this node, and tell why there is no data of a GPU.

    Raises HybridparError where a recording is to be played and is none.
    """
    if settings.options.replay is not None:
        return [Replay(read(Path(settings.options.replay)))], None
    sources: list[Source] = [Host(dict(settings.ranks))]
    if settings.uuids == ():
        return sources, "the job uses no GPU on this node"
    gpus = _open_gpus(settings.uuids, settings.options.dcgm)
    if isinstance(gpus, Unavailable):
        return sources, gpus.reason
    return [*sources, gpus], None


def _open_gpus(uuids: Sequence[str] | None, url: str | None) -> Gpus | Unavailable:
    """Open the GPUs through NVML; a dcgm-exporter tells what NVML does not know, also where there is no NVML."""
    if url is None:
        return open_nvml(uuids)
    from hybridpar.monitor.dcgm import Dcgm, Exporter  # noqa: PLC0415 - an HTTP client, which few need

    exporter = Exporter(url)

    def told(uuid: str | None, instance: int | None) -> tuple[Meter, ...]:
        return () if uuid is None else (Dcgm(exporter, (uuid, None if instance is None else str(instance))),)

    found = open_nvml(uuids, told)
    if isinstance(found, Gpus):
        return found
    try:
        known = exporter.known(time.time())
    except Refused as e:
        return Unavailable(f"{found.reason}; {e}")
    names = [uuid for uuid, instance in known if instance is None] if uuids is None else uuids
    if not any((uuid, None) in known for uuid in names):
        return Unavailable(f"{found.reason}; the dcgm-exporter at {url} knows none of the GPUs either")
    return Gpus([Gpu(None, uuid, told(uuid, None)) for uuid in names], [found.reason])
