"""Our plans: layers profiled and links probed on the very hosts, and what the planner makes of both."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from hybridpar.cluster import describe
from hybridpar.cluster.topology import Cluster
from hybridpar.config import compose
from hybridpar.errors import ConfigError, PlanError
from hybridpar.planning.request import SHAPES
from hybridpar.planning.search import Planned, search
from hybridpar.profiling.record import Profile
from hybridpar.schema import read_json, to_data
from scripts.bench.children import environment
from scripts.bench.cluster.folder import Folder
from scripts.bench.cluster.launch import on_hosts
from scripts.bench.cluster.setting import Setting
from scripts.bench.files import digest, write_json

PATIENCE_S = 600.0
"""What a profile or a probe may take beyond its budget: imports, tracing, and the last of its measurements."""
FORMATS = {"contiguous": [], "channels_last": ["train.memory_format=channels_last"]}
"""Overrides by memory format."""


@dataclass(frozen=True)
class Predicted:
    """The best plan of a shape that the planner found; without one, why not."""

    shape: str
    step_s: float | None = None
    memory_bytes: tuple[int, ...] = ()
    """Of every rank, above its baseline."""
    plan_sha256: str | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Predictions:
    """Everything predicted for a setting, written before any of the plans ran there."""

    date: str
    """UTC."""
    profile_sha256: str
    cluster_sha256: str
    chosen: str
    """The shape that ``plan=auto`` takes."""
    plans: tuple[Predicted, ...]

    def of(self, shape: str) -> Predicted:
        """Return what is predicted for a shape."""
        return next(p for p in self.plans if p.shape == shape)


@dataclass(frozen=True)
class Planner:
    """Plans for settings; what is in the folder is not measured again."""

    folder: Folder
    profile_s: float
    """Budget of a profile."""
    probe_s: float
    """Budget of a probe."""
    say: Callable[[str], None]

    def predict(self, setting: Setting, memory_format: str = "contiguous") -> tuple[Path, Predictions]:
        """Return the folder of a setting's plans, ``SHAPE.json``, and their predictions.

        Raises PlanError and MemoryLimitError where no plan is possible, LaunchFailedError where a measurement
        fails.
        """
        out = self.folder.plans(setting, memory_format)
        path = out / "predictions.json"
        if not path.exists():
            profile, cluster = self._profile(setting, memory_format), self._probe(setting)
            planned = _search(setting, memory_format, profile, cluster)
            out.mkdir(parents=True, exist_ok=True)
            write_json(path, to_data(_written(planned, out, digest(profile), digest(cluster))))
        return out, read_json(Predictions, path, ConfigError)

    def _profile(self, setting: Setting, memory_format: str) -> Path:
        """Measure the layers on all ranks at once, so that they contend as in a run."""
        path = self.folder.profile(setting, memory_format)
        if not path.exists():
            self.say(f"profiling {setting.devices.name}, {memory_format}")
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(".part.json")
            wanted = [
                "profile=measured",
                "profile.cache=false",
                f"profile.budget_s={self.profile_s}",
                f"out={part}",
            ]
            overrides = [*setting.devices.overrides, *FORMATS[memory_format]]
            self._measure(setting.devices, "profile", [*overrides, *wanted], self.profile_s)
            part.replace(path)
        return path

    def _probe(self, setting: Setting) -> Path:
        """Measure the links between the ranks."""
        path = self.folder.cluster(setting)
        if not path.exists():
            self.say(f"probing {setting.links_name}")
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(".part.yaml")
            wanted = ["train.device=cpu", f"probe.budget_s={self.probe_s}", f"probe.out={part}"]
            self._measure(setting, "probe", wanted, self.probe_s)
            part.replace(path)
        return path

    def _measure(self, setting: Setting, command: str, arguments: list[str], budget_s: float) -> None:
        log = self.folder.log(f"{command}-{setting.name}")
        on_hosts(setting, ["-m", "hybridpar", command, *arguments], log, budget_s + PATIENCE_S)


def _search(setting: Setting, memory_format: str, profile_path: Path, cluster_path: Path) -> Planned:
    """Plan as ``hybridpar plan`` does with this profile and cluster."""
    profile = Profile.load(profile_path)
    if profile.described is None:
        raise PlanError(f"{profile_path} holds no chain; remove it, and it will be measured again")
    overrides = [*setting.overrides, *FORMATS[memory_format], "profile=from_file", f"profile.path={profile_path}"]
    cluster = describe.load(cluster_path)
    if setting.memory_mb is not None:
        cluster = _less_baseline(cluster)
    return search(profile.described, profile, cluster, compose(overrides).request())


def _written(planned: Planned, out: Path, profile_sha256: str, cluster_sha256: str) -> Predictions:
    """Write the best plan of every shape, and return their predictions."""
    found = []
    for candidate in planned.candidates:
        if candidate.shape not in SHAPES:
            continue
        if candidate.plan is None:
            found.append(Predicted(candidate.shape, reason=candidate.reason))
            continue
        path, prediction = out / f"{candidate.shape}.json", candidate.prediction
        candidate.plan.save(path)
        memory_bytes = prediction.memory_bytes * candidate.plan.replicas
        found.append(Predicted(candidate.shape, prediction.step_s, memory_bytes, digest(path)))
    date = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())
    return Predictions(date, profile_sha256, cluster_sha256, planned.shape, tuple(found))


def _less_baseline(cluster: Cluster) -> Cluster:
    """Return the cluster with what a process takes before it trains left out of its devices' memory.

    A device of its own holds no interpreter; a rank whose memory limit stands for one does.
    """
    code = (
        "import torch.distributed, hybridpar.runtime.job\n"
        "print(next(l for l in open('/proc/self/status') if l.startswith('RssAnon')).split()[1])"
    )
    said = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True
    ).stdout
    left = cluster.device.memory_bytes - int(said) * 1024
    return replace(cluster, device=replace(cluster.device, memory_bytes=left))
