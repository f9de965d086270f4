"""What would run: ``plan``, alone, with a front, a diff or pictures, and as a sweep."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hybridpar.commands.output import check_out, console, note, write
from hybridpar.config import Config, compose, expand
from hybridpar.errors import ConfigError

if TYPE_CHECKING:
    from hybridpar.model.chain import Chain
    from hybridpar.planner import Subject
    from hybridpar.planning.plan import Plan
    from hybridpar.planning.search import Planned

MULTIRUN = {"-m", "--multirun"}


def plan(overrides: Sequence[str]) -> None:
    """Plan once, or with ``-m`` every combination."""
    if not MULTIRUN & set(overrides):
        plan_once(compose(overrides))
        return
    plan_sweep([o for o in overrides if o not in MULTIRUN])


def plan_once(config: Config) -> None:
    """Print the plan, as text or as JSON; save it where ``out``, and draw it where ``pictures`` says so."""
    from hybridpar.planner import make_plan, prepare  # noqa: PLC0415 - a command imports what it needs
    from hybridpar.planning.plan import Plan  # noqa: PLC0415

    check_out(config)
    if config.pictures is not None:
        from hybridpar.report.figure import prepare_folder  # noqa: PLC0415

        prepare_folder(Path(config.pictures))
    subject = prepare(config, report=note)
    if config.plan.global_batch_range is not None:
        _front(config, subject)
        return
    other = None if config.diff is None else Plan.load(Path(config.diff), subject.chain)
    planned = make_plan(config, subject)
    if config.format == "json":
        sys.stdout.write(planned.plan.to_json() + "\n")
    else:
        _explain(config, subject, planned, other)
    if config.out is not None:
        write(config.out, planned.plan.to_json() + "\n")
        note(f"plan saved to {config.out}; use it with plan=from_file plan.path={config.out}")
    if config.pictures is not None:
        from hybridpar.report.pictures import FILES, draw  # noqa: PLC0415

        draw(planned.plan, subject.chain, subject.profile, subject.cluster, Path(config.pictures))
        note(f"pictures saved to {config.pictures}: {', '.join(FILES)}")


def _front(config: Config, subject: Subject) -> None:
    """Print the front of throughput against memory, as a table or JSON; ``out`` gets the JSON."""
    from hybridpar.planner import make_front  # noqa: PLC0415
    from hybridpar.report import pareto  # noqa: PLC0415

    found = make_front(config, subject, note)
    text = json.dumps(pareto.as_data(found), indent=2) + "\n"
    if config.format == "json":
        sys.stdout.write(text)
    else:
        pareto.show(found, console())
    if config.out is not None:
        write(config.out, text)
        note(f"plans saved to {config.out}")
    if config.pictures is not None:
        pareto.draw(found, Path(config.pictures))
        note(f"pictures saved to {config.pictures}: {', '.join(pareto.FILES)}")


def _explain(config: Config, subject: Subject, planned: Planned, other: Plan | None) -> None:
    """Print a plan, why it was chosen, and how it differs from another one."""
    from hybridpar.planning.difference import compare  # noqa: PLC0415
    from hybridpar.planning.explanation import explain  # noqa: PLC0415
    from hybridpar.planning.trial import Trials  # noqa: PLC0415
    from hybridpar.report import difference, dry_run  # noqa: PLC0415

    trials = Trials(subject.chain, subject.profile, subject.cluster)
    explanation = explain(planned, trials, full=config.explain)
    dry_run.show(planned, subject.chain, subject.profile, subject.cluster, console(), explanation)
    tell_compiled(config, planned.plan, subject.chain)
    if other is not None:
        difference.show(compare(planned.plan, other, trials), Path(str(config.diff)).name, console())


def tell_compiled(config: Config, plan: Plan, chain: Chain) -> None:
    """Print what of a plan is compiled, if anything is."""
    from hybridpar.report import dry_run  # noqa: PLC0415

    compiling = config.train.compiling
    if compiling is not None:
        console().print(dry_run.compiled(plan, chain, compiling.stages, compiling.backend))


def plan_sweep(overrides: Sequence[str]) -> None:
    """Plan every combination and print one table, or JSON; ``out`` gets the JSON.

    Raises ConfigError where no combination has a plan.
    """
    from hybridpar import sweep  # noqa: PLC0415
    from hybridpar.report.sweep import as_data, show  # noqa: PLC0415

    wanted = expand(overrides)
    points = sweep.points(wanted)
    config = next(point.config for point in points if point.config is not None)
    check_out(config)
    rows = sweep.run(wanted, points, note)
    text = json.dumps(as_data(wanted.keys, rows), indent=2) + "\n"
    if config.format == "json":
        sys.stdout.write(text)
    else:
        show(wanted.keys, rows, console())
    if config.out is not None:
        write(config.out, text)
        note(f"plans saved to {config.out}")
    if all(row.planned is None for row in rows):
        raise ConfigError(f"none of the {len(rows)} combinations has a plan; the first: {rows[0].error}")
