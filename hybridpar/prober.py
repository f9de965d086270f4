"""From a job of several processes to the description of the cluster that it runs on."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from hybridpar.cluster import describe
from hybridpar.cluster.hosts import Host, make_nodes, unprobed
from hybridpar.cluster.probe import probe
from hybridpar.cluster.probed import Probed
from hybridpar.config import Config
from hybridpar.errors import LaunchError


def probed(config: Config, report: Callable[[str], None]) -> Probed | None:
    """Measure the cluster and write it to ``probe.out``; return what was measured on rank 0, None on the others.

    ``report`` gets lines of progress on rank 0. Raises LaunchError for fewer than two processes, and ClusterError,
    before anything is measured, for a file that could not be written and for nodes that do not fit the ranks.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        raise LaunchError(
            "a probe measures the links between processes and needs at least 2; start it as "
            "torchrun --nproc-per-node 4 -m hybridpar probe"
        )
    from hybridpar.cluster.measure import TorchTransport, versions  # noqa: PLC0415 - torch takes seconds to import
    from hybridpar.runtime.process import Process  # noqa: PLC0415

    settings = config.probe
    path = Path(settings.out)
    process = Process(config.train.device, config.train.timeout_s)
    process.share(lambda: describe.check_writable(path))
    process.join()
    try:
        transport = TorchTransport(process.device)
        here = describe.local(process.place.local_world, "cuda" if process.device.type == "cuda" else "cpu")
        hosts = transport.gather(Host.here(here.device, process.place.node))
        nodes = make_nodes(hosts, settings.ranks_per_node, settings.racks, settings.sites)
        start = unprobed(hosts, nodes, here.links["node"])
        first = process.rank == 0
        found = probe(
            transport, start, settings.budget_s, lambda text: report(f"probing {text}") if first else None
        )
        if first:
            describe.save(found.cluster, path, {"versions": versions(), **found.about()})
        return found if first else None
    finally:
        process.close()
