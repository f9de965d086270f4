"""What runs: ``train``, ``verify``, and ``export`` of what came of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hybridpar.commands.output import console, note
from hybridpar.commands.planning import tell_compiled
from hybridpar.config import Config
from hybridpar.errors import ConfigError

if TYPE_CHECKING:
    from hybridpar.planning.plan import Plan

TERMINATED = 128 + 15
"""Exit code of a process that SIGTERM ends."""


def train(config: Config) -> int:
    """Plan on rank 0, then train on all ranks and print the summary; return 0 unless work is lost by SIGTERM."""
    from hybridpar.planner import load_model, make_plan, prepare  # noqa: PLC0415
    from hybridpar.report import difference, dry_run, summary  # noqa: PLC0415
    from hybridpar.report.basis import Basis  # noqa: PLC0415
    from hybridpar.runtime import checks, intact, resume, trainer  # noqa: PLC0415
    from hybridpar.runtime.process import Process, check_world  # noqa: PLC0415

    config.refuse_for_training()
    process = Process(config.train.device, config.train.timeout_s)
    traced, source = load_model(config)
    found = intact.look(config, process)
    basis: Basis | None = None

    def planned() -> Plan:
        nonlocal basis
        checks.check_config(config, process.place)
        subject = prepare(config, traced, process.world, note)
        basis = Basis(subject.chain, subject.profile, subject.cluster)
        former = resume.former_plan(config, found.folder, traced.chain.fingerprint)
        kept = former if former is not None and former.world == process.world else None
        result = make_plan(config, subject, kept)
        check_world(result.plan, process.world)
        checks.check(config, result.plan, traced.chain, process.place)
        if config.train.mode != "quiet":
            dry_run.show(result, subject.chain, subject.profile, subject.cluster, console())
            tell_compiled(config, result.plan, subject.chain)
            if former is not None and kept is None:
                difference.show_replanned(result.plan, former, subject.chain, console())
        return result.plan

    plan = process.agree(planned)
    outcome = trainer.train(config, plan, traced, source, process, basis=basis, found=found)
    if outcome is None:
        return 0 if config.checkpoint.every is not None else TERMINATED
    if process.rank == 0:
        summary.show(outcome, console())
    return 0


def verify(config: Config) -> int:
    """Plan as for a training, compare some of its steps with a single process, and return 1 where they differ."""
    from hybridpar.planner import load_model, make_plan, prepare  # noqa: PLC0415
    from hybridpar.report import verification  # noqa: PLC0415
    from hybridpar.runtime import verify as verifying  # noqa: PLC0415
    from hybridpar.runtime.process import Process, check_world  # noqa: PLC0415

    config.refuse_for_training()
    process = Process(config.train.device, config.train.timeout_s)
    traced, source = load_model(config)

    def planned() -> Plan:
        result = make_plan(config, prepare(config, traced, process.world, note)).plan
        check_world(result, process.world)
        verifying.check(config, result, traced)
        return result

    plan = process.agree(planned)
    if config.train.autocast is not None:
        note(f"verified without train.autocast={config.train.autocast}, which rounds differently in every plan")
        scale = dataclasses.replace(config.train.loss_scale, enabled=plan.recipe.scaling)
        train = dataclasses.replace(config.train, autocast=None, loss_scale=scale)
        config = dataclasses.replace(config, train=train)
        traced, source = load_model(config)
        plan = dataclasses.replace(plan, chain=traced.chain.fingerprint)
    found = verifying.verify(config, plan, traced, source, process)
    if process.rank == 0:
        verification.show(found, console())
    return 0 if found.first is None else 1


def export(arguments: Sequence[str]) -> int:
    """Write the state dict of a checkpoint to a file: ``export RUN_OR_CHECKPOINT out=FILE [ema=true]``."""
    from hybridpar.runtime.export import SUFFIXES, export  # noqa: PLC0415

    outs = [a.removeprefix("out=") for a in arguments if a.startswith("out=")]
    averages = [a.removeprefix("ema=") for a in arguments if a.startswith("ema=")]
    paths = [a for a in arguments if not a.startswith(("out=", "ema="))]
    if len(outs) != 1 or len(paths) != 1 or averages not in ([], ["true"], ["false"]):
        raise ConfigError(
            f"export {' '.join(arguments)}: takes a run's folder or a checkpoint's, out=FILE with one of the "
            f"suffixes {', '.join(SUFFIXES)}, and ema=true for the moving average of the weights"
        )
    done = export(Path(paths[0]).expanduser(), Path(outs[0]).expanduser(), ema=averages == ["true"])
    if done.unused:
        note(f"left out, as no layer uses them: {', '.join(done.unused)}")
    note(f"{done.tensors} tensors of {done.checkpoint} (step {done.step}) saved to {outs[0]}")
    return 0
