"""What the doctor looks at on one node, given the configuration of a job."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from hybridpar.cluster.limits import cpu_limit, memory_limit
from hybridpar.config import Config
from hybridpar.doctor import devices, machine, network, packages
from hybridpar.doctor.finding import Finding
from hybridpar.runtime.process import Place


def examine(config: Config, place: Place, environment: Mapping[str, str]) -> list[Finding]:
    """Look at packages, devices, machine and network of this node. Touches no other process."""
    return [
        *_packages(config),
        *_devices(config, place, environment),
        *_machine(config, place),
        *_network(place, environment),
    ]


def nodes(place: Place) -> int:
    """Return the number of nodes of the job, as far as all have as many ranks as this one."""
    return max(1, place.world // place.local_world)


def _packages(config: Config) -> list[Finding]:
    used = {"zero"} if config.optimizer.sharding in {"zero1", "zero2"} else set()
    if config.pictures is not None:
        used.add("pictures")
    return [
        *packages.check_packages(used),
        *packages.check_imports(),
        *packages.check_present(config.train.loggers),
    ]


def _devices(config: Config, place: Place, environment: Mapping[str, str]) -> list[Finding]:
    driver = devices.read_driver()
    return [
        *devices.check_torch(driver, config.train.device, place.local_world, environment),
        *devices.check_driver(driver, torch.version.cuda, monitored=config.monitor.mode == "required"),
    ]


def _machine(config: Config, place: Place) -> list[Finding]:
    gpus = torch.cuda.device_count() if config.train.device != "cpu" and torch.cuda.is_available() else 0
    cpu = gpus < place.local_world
    threads = 1 if cpu and place.local_world > 1 else torch.get_num_threads()  # as a process of a job has it
    folder = Path(config.run.dir or "runs").expanduser().absolute()
    several = min(gpus, place.local_world) > 1
    return [
        machine.check_cores(cpu_limit(), threads, place.local_world, cpu=cpu),
        machine.check_memory(memory_limit()),
        machine.check_shared_memory(needed=config.data.workers > 0 or several),
        machine.check_files(place.world),
        machine.check_run_dir(folder),
    ]


def _network(place: Place, environment: Mapping[str, str]) -> list[Finding]:
    known, count = network.interfaces(), nodes(place)
    found = [
        network.check_interfaces(known, nodes=count),
        network.check_gloo(environment, known, nodes=count),
        network.check_nccl(environment, known, nodes=count),
        network.check_master(environment, nodes=count),
    ]
    return [f for f in found if f is not None]
