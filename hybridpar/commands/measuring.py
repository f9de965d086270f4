"""What a machine can do: ``profile`` of the layers, ``probe`` of the links."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Sequence

from hybridpar.commands.output import check_out, console, note, write
from hybridpar.config import Config, compose
from hybridpar.errors import ConfigError


def profile(overrides: Sequence[str]) -> None:
    """Measure the layers, by default as ``profile=measured`` says."""
    chosen = any(o.startswith("profile=") for o in overrides)
    measure(compose(overrides if chosen else ["profile=measured", *overrides]))


def measure(config: Config) -> None:
    """Measure the layers on this machine, all ranks at once, and write the profile with its chain to ``out``."""
    from hybridpar.planner import load_model, measured  # noqa: PLC0415
    from hybridpar.report.progress import Progress  # noqa: PLC0415
    from hybridpar.runtime.process import Process  # noqa: PLC0415

    if config.out is None:
        raise ConfigError("out: missing; name the file for the profile, as in out=profile.json")
    if config.profile.kind != "measured":
        raise ConfigError(f"profile={config.profile.kind} cannot be measured; use profile=measured")
    first = os.environ.get("RANK", "0") == "0"
    if first:
        check_out(config)
    process = Process(config.train.device, config.train.timeout_s)
    traced, _ = load_model(config)
    shown = Progress(sys.stderr, quiet=not first)
    found = measured(config, traced, shown.note, process=process, progress=shown.update)
    if first:
        record = dataclasses.replace(found, described=traced.chain)
        write(config.out, record.to_json() + "\n")
        shown.note(f"profile saved to {config.out}; use it with profile=from_file profile.path={config.out}")


def probe(config: Config) -> None:
    """Measure the cluster that this job runs on and write its description to ``probe.out``."""
    from hybridpar.prober import probed  # noqa: PLC0415
    from hybridpar.report import probe as table  # noqa: PLC0415

    if config.out is not None:
        raise ConfigError(
            f"out: {config.out} is of no effect on a probe; name its file with probe.out={config.out}"
        )
    result = probed(config, note)
    if result is not None:
        table.show(result, console())
        note(f"cluster saved to {config.probe.out}; use it with cluster=from_file cluster.path={config.probe.out}")
