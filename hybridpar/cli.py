"""The command line: ``hybridpar COMMAND [overrides]``. Thin: composes the configuration and calls one function."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from hybridpar import __version__
from hybridpar.config import Config, compose, expand
from hybridpar.errors import ConfigError, HybridparError
from hybridpar.names import nearest
from hybridpar.usage import USAGE

if TYPE_CHECKING:
    from rich.console import Console

    from hybridpar.model.chain import Chain
    from hybridpar.planner import Subject
    from hybridpar.planning.plan import Plan
    from hybridpar.planning.search import Planned
    from hybridpar.report.comparison import Comparison
    from hybridpar.report.run import Run

MULTIRUN = {"-m", "--multirun"}
TELLING_S = 5.0
"""So long the first rank of a node has to tell a mistake that all make."""
TERMINATED = 128 + 15
"""Exit code of a process that SIGTERM ends."""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command and exit: 0 when done, 2 with one line for a user's mistake; a bug shows its traceback (1)."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in {"-h", "--help", "help"}:
        sys.stdout.write(USAGE)
        raise SystemExit(0 if given else 2)
    if given[0] == "--version":
        sys.stdout.write(f"hybridpar {__version__}\n")
        raise SystemExit(0)
    raise SystemExit(_run(given[0], given[1:]))


def _run(command: str, overrides: Sequence[str]) -> int:
    """Run a command and return its exit code."""
    try:
        function = _command(command)
        if MULTIRUN & set(overrides):
            _check_sweep(command)
        return function(overrides) or 0
    except HybridparError as e:
        _tell(e)
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("hybridpar: interrupted\n")
        return 130
    except BrokenPipeError:
        # Whoever read has left: nothing is flushed to them at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _tell(error: HybridparError) -> None:
    """Say what is wrong; a mistake that all ranks of a node make is told once, by the first of them.

    The others wait, as a launcher ends all ranks when one has exited, maybe before the first one has told. Who is
    not ended meanwhile has made a mistake of its own, and tells it.
    """
    rank = ""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(TELLING_S)
        rank = f"rank {os.environ.get('RANK', os.environ['LOCAL_RANK'])}: "
    sys.stderr.write(f"hybridpar: {rank}{error}\n")


def _command(name: str) -> Callable[[Sequence[str]], int | None]:
    if name not in COMMANDS:
        hint = nearest(name, COMMANDS) or f"; there are {', '.join(COMMANDS)}"
        raise ConfigError(f"unknown command {name}{hint}")
    return COMMANDS[name]


def _check_sweep(command: str) -> None:
    if command != "plan":
        raise ConfigError(f"{command} -m: only plans are swept; start one {command} per combination")
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ConfigError("plan -m: a sweep needs one process; start it without torchrun")


def _configured(function: Callable[[Config], int | None]) -> Callable[[Sequence[str]], int | None]:
    """Return the command that composes the configuration from its arguments and calls ``function`` with it."""
    return lambda overrides: function(compose(overrides))


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

    _check_out(config)
    if config.pictures is not None:
        from hybridpar.report.figure import prepare_folder  # noqa: PLC0415

        prepare_folder(Path(config.pictures))
    subject = prepare(config, report=_note)
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
        _write(config.out, planned.plan.to_json() + "\n")
        _note(f"plan saved to {config.out}; use it with plan=from_file plan.path={config.out}")
    if config.pictures is not None:
        from hybridpar.report.pictures import FILES, draw  # noqa: PLC0415

        draw(planned.plan, subject.chain, subject.profile, subject.cluster, Path(config.pictures))
        _note(f"pictures saved to {config.pictures}: {', '.join(FILES)}")


def _front(config: Config, subject: Subject) -> None:
    """Print the front of throughput against memory, as a table or JSON; ``out`` gets the JSON."""
    from hybridpar.planner import make_front  # noqa: PLC0415
    from hybridpar.report import pareto  # noqa: PLC0415

    found = make_front(config, subject, _note)
    text = json.dumps(pareto.as_data(found), indent=2) + "\n"
    if config.format == "json":
        sys.stdout.write(text)
    else:
        pareto.show(found, _console())
    if config.out is not None:
        _write(config.out, text)
        _note(f"plans saved to {config.out}")
    if config.pictures is not None:
        pareto.draw(found, Path(config.pictures))
        _note(f"pictures saved to {config.pictures}: {', '.join(pareto.FILES)}")


def _explain(config: Config, subject: Subject, planned: Planned, other: Plan | None) -> None:
    """Print a plan, why it was chosen, and how it differs from another one."""
    from hybridpar.planning.difference import compare  # noqa: PLC0415
    from hybridpar.planning.explanation import explain  # noqa: PLC0415
    from hybridpar.planning.trial import Trials  # noqa: PLC0415
    from hybridpar.report import difference, dry_run  # noqa: PLC0415

    trials = Trials(subject.chain, subject.profile, subject.cluster)
    explanation = explain(planned, trials, full=config.explain)
    dry_run.show(planned, subject.chain, subject.profile, subject.cluster, _console(), explanation)
    _tell_compiled(config, planned.plan, subject.chain)
    if other is not None:
        difference.show(compare(planned.plan, other, trials), Path(str(config.diff)).name, _console())


def _tell_compiled(config: Config, plan: Plan, chain: Chain) -> None:
    """Print what of a plan is compiled, if anything is."""
    from hybridpar.report import dry_run  # noqa: PLC0415

    compiling = config.train.compiling
    if compiling is not None:
        _console().print(dry_run.compiled(plan, chain, compiling.stages, compiling.backend))


def plan_sweep(overrides: Sequence[str]) -> None:
    """Plan every combination and print one table, or JSON; ``out`` gets the JSON.

    Raises ConfigError where no combination has a plan.
    """
    from hybridpar import sweep  # noqa: PLC0415
    from hybridpar.report.sweep import as_data, show  # noqa: PLC0415

    wanted = expand(overrides)
    points = sweep.points(wanted)
    config = next(point.config for point in points if point.config is not None)
    _check_out(config)
    rows = sweep.run(wanted, points, _note)
    text = json.dumps(as_data(wanted.keys, rows), indent=2) + "\n"
    if config.format == "json":
        sys.stdout.write(text)
    else:
        show(wanted.keys, rows, _console())
    if config.out is not None:
        _write(config.out, text)
        _note(f"plans saved to {config.out}")
    if all(row.planned is None for row in rows):
        raise ConfigError(f"none of the {len(rows)} combinations has a plan; the first: {rows[0].error}")


def train(config: Config) -> int:
    """Plan on rank 0, then train on all ranks and print the summary; return 0 unless work is lost by SIGTERM."""
    from hybridpar.planner import load_model, make_plan, prepare  # noqa: PLC0415
    from hybridpar.report import difference, dry_run, summary  # noqa: PLC0415
    from hybridpar.report.basis import Basis  # noqa: PLC0415
    from hybridpar.runtime import checks, resume, trainer  # noqa: PLC0415
    from hybridpar.runtime.process import Process, check_world  # noqa: PLC0415

    config.refuse_for_training()
    process = Process(config.train.device, config.train.timeout_s)
    traced, source = load_model(config)
    basis: Basis | None = None

    def planned() -> Plan:
        nonlocal basis
        checks.check_config(config, process.place)
        subject = prepare(config, traced, process.world, _note)
        basis = Basis(subject.chain, subject.profile, subject.cluster)
        former = resume.former_plan(config, traced.chain.fingerprint, restarted=process.place.restarts > 0)
        kept = former if former is not None and former.world == process.world else None
        result = make_plan(config, subject, kept)
        check_world(result.plan, process.world)
        checks.check(config, result.plan, traced.chain, process.place)
        if config.train.mode != "quiet":
            dry_run.show(result, subject.chain, subject.profile, subject.cluster, _console())
            _tell_compiled(config, result.plan, subject.chain)
            if former is not None and kept is None:
                difference.show_replanned(result.plan, former, subject.chain, _console())
        return result.plan

    plan = process.agree(planned)
    outcome = trainer.train(config, plan, traced, source, process, basis=basis)
    if outcome is None:
        return 0 if config.checkpoint.every is not None else TERMINATED
    if process.rank == 0:
        summary.show(outcome, _console())
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
        result = make_plan(config, prepare(config, traced, process.world, _note)).plan
        check_world(result, process.world)
        verifying.check(config, result, traced)
        return result

    plan = process.agree(planned)
    if config.train.autocast is not None:
        _note(f"verified without train.autocast={config.train.autocast}, which rounds differently in every plan")
        scale = dataclasses.replace(config.train.loss_scale, enabled=plan.recipe.scaling)
        train = dataclasses.replace(config.train, autocast=None, loss_scale=scale)
        config = dataclasses.replace(config, train=train)
        traced, source = load_model(config)
        plan = dataclasses.replace(plan, chain=traced.chain.fingerprint)
    found = verifying.verify(config, plan, traced, source, process)
    if process.rank == 0:
        verification.show(found, _console())
    return 0 if found.first is None else 1


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
        _check_out(config)
    process = Process(config.train.device, config.train.timeout_s)
    traced, _ = load_model(config)
    shown = Progress(sys.stderr, quiet=not first)
    found = measured(config, traced, shown.note, process=process, progress=shown.update)
    if first:
        record = dataclasses.replace(found, described=traced.chain)
        _write(config.out, record.to_json() + "\n")
        shown.note(f"profile saved to {config.out}; use it with profile=from_file profile.path={config.out}")


def probe(config: Config) -> None:
    """Measure the cluster that this job runs on and write its description to ``probe.out``."""
    from hybridpar.prober import probed  # noqa: PLC0415
    from hybridpar.report import probe as table  # noqa: PLC0415

    if config.out is not None:
        raise ConfigError(
            f"out: {config.out} is of no effect on a probe; name its file with probe.out={config.out}"
        )
    result = probed(config, _note)
    if result is not None:
        table.show(result, _console())
        _note(
            f"cluster saved to {config.probe.out}; use it with cluster=from_file cluster.path={config.probe.out}"
        )


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
        _note(f"left out, as no layer uses them: {', '.join(done.unused)}")
    _note(f"{done.tensors} tensors of {done.checkpoint} (step {done.step}) saved to {outs[0]}")
    return 0


def report(arguments: Sequence[str]) -> None:
    """Lay predicted over measured: ``report RUN [RUN2 ...] [out=FILE.html] [pictures=FOLDER]``."""
    from hybridpar.report import run_text  # noqa: PLC0415
    from hybridpar.report.comparison import compare  # noqa: PLC0415
    from hybridpar.report.run import Run  # noqa: PLC0415

    options = dict(a.split("=", 1) for a in arguments if a.startswith(("out=", "pictures=")))
    folders = [Path(a).expanduser() for a in arguments if not a.startswith(("out=", "pictures="))]
    if not folders or any("=" in str(folder) and not folder.exists() for folder in folders):
        raise ConfigError(
            f"report {' '.join(arguments)}: takes the folders of one or more runs, out=FILE.html for a page, and "
            "pictures=FOLDER for pictures of one run's step"
        )
    compared = [(run, compare(run)) for run in map(Run.load, folders)]
    _report_files(compared, options.get("out"), options.get("pictures"))
    run_text.show(compared, _console())


def _report_files(runs: Sequence[tuple[Run, Comparison | None]], out: str | None, pictures: str | None) -> None:
    """Write the page and the pictures that are asked for."""
    from hybridpar.report.figure import require_matplotlib  # noqa: PLC0415
    from hybridpar.report.findings import missing  # noqa: PLC0415
    from hybridpar.report.overlay import FILES, draw  # noqa: PLC0415
    from hybridpar.report.page import page  # noqa: PLC0415

    if pictures is not None:
        (run, comparison), *others = runs
        if others:
            raise ConfigError(f"pictures={pictures}: are of one run's step; ask for them run by run")
        if comparison is None:
            raise ConfigError(f"pictures={pictures}: {missing(run)}")
        draw(comparison, Path(pictures))
        _note(f"pictures saved to {pictures}: {', '.join(FILES)}")
    if out is not None:
        require_matplotlib("out")
        _write(out, page(runs))
        _note(f"page saved to {out}")


def doctor(config: Config) -> int:
    """Tell what is installed and what a job of this configuration would run on; return 1 if anything is wrong."""
    from hybridpar.doctor.diagnose import diagnose  # noqa: PLC0415
    from hybridpar.report import doctor as report  # noqa: PLC0415

    found = diagnose(config)
    if os.environ.get("RANK", "0") == "0":
        if config.format == "json":
            sys.stdout.write(json.dumps(report.as_data(found), indent=2) + "\n")
        else:
            report.show(found, _console())
    return 1 if found.wrong else 0


def show_config(config: Config) -> None:
    """Print the resolved configuration as YAML."""
    sys.stdout.write(config.resolved)


COMMANDS: dict[str, Callable[[Sequence[str]], int | None]] = {
    "plan": plan,
    "train": _configured(train),
    "verify": _configured(verify),
    "profile": profile,
    "probe": _configured(probe),
    "export": export,
    "report": report,
    "doctor": _configured(doctor),
    "config": _configured(show_config),
}


def _console() -> Console:
    """Return a console; where no terminal sets the width, tables get enough."""
    from rich.console import Console  # noqa: PLC0415

    return Console(width=None if sys.stdout.isatty() else 160, highlight=False, soft_wrap=False)


def _note(text: str) -> None:
    sys.stderr.write(f"{text}\n")


def _check_out(config: Config) -> None:
    """Refuse, before any work is done, a file that could not be written after it."""
    if config.out is not None and not Path(config.out).resolve().parent.is_dir():
        raise ConfigError(f"out: {config.out} lies in no existing folder; make it first")


def _write(path: str, text: str) -> None:
    try:
        Path(path).write_text(text)
    except OSError as e:
        raise ConfigError(f"out: cannot write {path}: {e.strerror}; name a file in an existing folder") from e
