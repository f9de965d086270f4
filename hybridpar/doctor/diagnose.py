"""The examination of a whole job: every node by itself, then whether its ranks reach each other."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from hybridpar.config import Config
from hybridpar.doctor import network
from hybridpar.doctor.examine import examine, nodes
from hybridpar.doctor.finding import Diagnosis, Finding, Rank, merge, ok, wrong
from hybridpar.doctor.reach import Address, Listener, unreachable
from hybridpar.errors import HybridparError
from hybridpar.runtime.process import Place, Process
from hybridpar.schema import from_data, to_data

_TOPIC = "job"


def diagnose(config: Config, environment: Mapping[str, str] = os.environ) -> Diagnosis:
    """Examine this process's node, or under torchrun every node and the ways between the ranks.

    Every rank returns the same. Raises LaunchError where the job's ranks cannot meet at all. Where MASTER_ADDR
    does not resolve, they are not asked to: a node then tells of itself alone.
    """
    place = Place.read(environment)
    own = examine(config, place, environment) if place.local_rank == 0 else []
    lost = network.check_master(environment, nodes=nodes(place))
    if place.world == 1 or (lost is not None and lost.status == "wrong"):
        return Diagnosis(merge([own]), ())
    process = Process(config.train.device, config.train.timeout_s)
    try:
        return _Meeting(process, environment).run(own)
    finally:
        process.close()


class _Meeting:
    """The ranks of a job, which talk through the launcher's store until they know that they reach each other."""

    def __init__(self, process: Process, environment: Mapping[str, str]) -> None:
        self.process, self.environment = process, environment
        self.known = network.interfaces()

    def run(self, own: list[Finding]) -> Diagnosis:
        """Return what all ranks found; ``own`` is this node's."""
        missing = self._missing()
        ranks = [
            from_data(Rank, data, "rank", HybridparError)
            for data in self.process.tell(to_data(self._rank(missing)))
        ]
        if any(rank.unreachable for rank in ranks):
            remedy = (
                "let GLOO_SOCKET_IFNAME (NCCL_SOCKET_IFNAME) name, on every node, the interface of the network "
                "that they share, and open that network's ports to each other"
            )
            bad = sum(bool(rank.unreachable) for rank in ranks)
            common = [wrong(_TOPIC, f"{bad} of {len(ranks)} ranks do not reach all others", remedy)]
        else:
            common = self._communicate()
        told = self.process.tell([to_data(f) for f in [*own, *common]])
        findings = [[from_data(Finding, f, "finding", HybridparError) for f in one] for one in told]
        return Diagnosis(merge(findings), tuple(ranks))

    def _missing(self) -> tuple[str, ...]:
        """Return which ranks this one does not reach. All listen until all have tried."""
        with Listener(network.gloo_address(self.environment, self.known)) as listener:
            told = self.process.tell(to_data(listener.address))
            missing = unreachable([from_data(Address, data, "address", HybridparError) for data in told])
            self.process.tell(None)
            return missing

    def _rank(self, missing: tuple[str, ...]) -> Rank:
        process = self.process
        device = str(process.device)
        if process.device.type == "cuda":
            device += f" ({torch.cuda.get_device_name(process.device)})"
        interface = network.shown_address(self.environment, self.known)
        return Rank(socket.gethostname(), os.getpid(), process.place.node, device, interface, missing)

    def _communicate(self) -> list[Finding]:
        """Let all ranks sum something, with each backend of the job."""
        process, found = self.process, list[Finding]()
        tensors: dict[str, Any] = {"gloo": torch.ones(1)}
        if process.device.type == "cuda":
            tensors["nccl"] = torch.ones(1, device=process.device)
        for backend, tensor in tensors.items():
            try:
                process.join()
                dist.all_reduce(tensor)
                total = round(tensor.item())
            except RuntimeError as e:
                remedy = f"start again with {backend.upper()}_SOCKET_IFNAME set, and NCCL_DEBUG=INFO to see more"
                return [*found, wrong(_TOPIC, f"{backend} fails: {str(e).splitlines()[0]}", remedy)]
            assert total == process.world
            found.append(ok(_TOPIC, f"{process.world} ranks reach each other and communicate by {backend}"))
        return found
