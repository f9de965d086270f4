"""What a machine can do: ``profile`` of the layers, ``probe`` of the links."""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hybridpar.commands.output import check_out, console, note, write
from hybridpar.config import Config, compose
from hybridpar.errors import ConfigError

if TYPE_CHECKING:
    from hybridpar.planning.plan import Plan
    from hybridpar.profiling.record import Profile

_LONG = {"occupancy": "profile.occupancy", "batches": "profile.micro_batches"}
_SHORT = re.compile(r"^(occupancy|batches)(?==)")
"""What a batch study is asked for by."""


def profile(overrides: Sequence[str]) -> None:
    """Measure the layers, by default as ``profile=measured`` says; two of its keys have short forms."""
    written = [_SHORT.sub(lambda m: _LONG[m[1]], o) for o in overrides]
    chosen = any(o.startswith("profile=") for o in written)
    measure(compose(written if chosen else ["profile=measured", *written]))


def measure(config: Config) -> None:
    """Measure the layers on this machine, all ranks at once, and write the profile with its chain to ``out``."""
    from hybridpar.planner import load_model, measured  # noqa: PLC0415
    from hybridpar.planning.plan import Plan  # noqa: PLC0415
    from hybridpar.report.progress import Progress  # noqa: PLC0415
    from hybridpar.runtime.process import Process  # noqa: PLC0415

    if config.out is None:
        raise ConfigError("out: missing; name the file for the profile, as in out=profile.json")
    if config.profile.kind != "measured":
        raise ConfigError(f"profile={config.profile.kind} cannot be measured; use profile=measured")
    first = os.environ.get("RANK", "0") == "0"
    if first:
        check_out(config)
    _check_pictures(config)
    process = Process(config.train.device, config.train.timeout_s)
    traced, _ = load_model(config)
    plan = None
    if config.profile.occupancy and config.plan.shape == "from_file":
        plan = Plan.load(Path(str(config.plan.path)), traced.chain)
    shown = Progress(sys.stderr, quiet=not first)
    found = measured(config, traced, shown.note, process=process, progress=shown.update)
    if first:
        record = dataclasses.replace(found, described=traced.chain)
        write(config.out, record.to_json() + "\n")
        _tell_study(config, record, plan)
        shown.note(f"profile saved to {config.out}; use it with profile=from_file profile.path={config.out}")


def _check_pictures(config: Config) -> None:
    """Refuse, before anything is measured, pictures of no study or such as could not be drawn."""
    if config.pictures is None:
        return
    if not config.profile.occupancy:
        raise ConfigError(f"pictures: {config.pictures} is for those of a batch study; set occupancy=true")
    from hybridpar.report.figure import prepare_folder  # noqa: PLC0415

    prepare_folder(Path(config.pictures))


def _tell_study(config: Config, record: Profile, plan: Plan | None) -> None:
    """Print the study of a profile that has one, and draw it where ``pictures`` says so."""
    from hybridpar.report import study  # noqa: PLC0415

    if record.study is None:
        return
    study.show(record, plan, console())
    if config.pictures is not None:
        study.draw(record, plan, Path(config.pictures))
        note(f"pictures saved to {config.pictures}: {', '.join(study.FILES)}")


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
