"""The command: profile, probe, draw, predict, measure, compare; resumes where it was stopped."""

from __future__ import annotations

import argparse
import dataclasses
import json
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from hybridpar.errors import ConfigError, HybridparError
from hybridpar.planning.plan import Plan
from hybridpar.profiling.record import Profile
from hybridpar.schema import read_json
from scripts.bench.about import machine, software
from scripts.bench.accuracy.draw import CLOSE
from scripts.bench.accuracy.experiment import MODELS, Experiment, Folder
from scripts.bench.accuracy.launch import on_ranks
from scripts.bench.accuracy.measure import measure_all, read_results
from scripts.bench.accuracy.predict import Predictions, draw_and_predict
from scripts.bench.accuracy.summary import Row, drift, rows, verdicts
from scripts.bench.accuracy.table import render, render_actions
from scripts.bench.beat import Beat
from scripts.bench.cgroups import CgroupError, Cgroups
from scripts.bench.children import ROOT, LaunchFailedError
from scripts.bench.files import digest, insert, write_json

PROBE_LIMIT_S = 600.0
PROFILE_PATIENCE_S = 600.0
"""What a profile may take beyond its budget: imports, tracing, and the last of its measurements."""


def main() -> int:
    """Run what is not done yet; 0 when all of the requirement holds, 1 when not, 2 for a mistake or a failure."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leave by way of the clean-up of cgroups
    experiment, folder, document = _arguments()
    try:
        return _run(experiment, folder, document)
    except (HybridparError, CgroupError, LaunchFailedError) as e:
        sys.stderr.write(f"accuracy: {e}\n")
        return 2


def _run(experiment: Experiment, folder: Folder, document: Path | None) -> int:
    folder.open(experiment)
    Cgroups([experiment.cores] * experiment.world).close()  # refused before any work is done
    with Beat(folder.beats) as beat:
        _profile(experiment, folder, beat)
        _probe(experiment, folder)
        if not folder.predictions.exists():
            _say("drawing and predicting plans")
            draw_and_predict(experiment, folder)
        measure_all(experiment, folder, beat, _say)
    predictions = read_json(Predictions, folder.predictions, ConfigError)
    profile_beat_s = json.loads(folder.profile_beat.read_text())
    table = rows(predictions, read_results(folder, predictions, experiment.rounds), profile_beat_s)
    held = verdicts(table, predictions.best_s)
    chain = Profile.load(folder.profile).described
    assert chain is not None
    plans = {r.predicted.name: Plan.load(folder.plan(r.predicted.name), chain) for r in table}
    text = render(table, held, plans, _about(experiment, folder, predictions, table))
    sys.stdout.write(f"{text}\n")
    actions = f"\n{render_actions(table)}\n" if experiment.actions else ""
    (folder.path / "table.md").write_text(f"{text}\n{actions}")
    if document is not None:
        insert(document, f"accuracy:{experiment.model}", text)
    return int(not all(v.holds for v in held))


def _profile(experiment: Experiment, folder: Folder, beat: Beat) -> None:
    """Measure the layers on all ranks at once, so that they contend as in a run."""
    if folder.profile.exists():
        return
    _say("profiling")
    part, budget_s = folder.path / "profile.part.json", experiment.profile_budget_s
    wanted = ["profile=measured", "profile.cache=false", f"profile.budget_s={budget_s}", f"out={part}"]
    began_s = time.perf_counter()
    _command(["profile", *experiment.overrides, *wanted], experiment, folder, PROFILE_PATIENCE_S + budget_s)
    write_json(folder.profile_beat, beat.median_s(began_s, time.perf_counter()))
    part.replace(folder.profile)


def _probe(experiment: Experiment, folder: Folder) -> None:
    """Measure the links between the ranks."""
    if folder.cluster.exists():
        return
    _say("probing")
    part = folder.path / "cluster.part.yaml"
    _command(["probe", "train.device=cpu", f"probe.out={part}"], experiment, folder, PROBE_LIMIT_S)
    part.replace(folder.cluster)


def _command(arguments: list[str], experiment: Experiment, folder: Folder, limit_s: float) -> None:
    """Run a command of hybridpar on all ranks."""
    cores, log = [experiment.cores] * experiment.world, folder.log(arguments[0])
    on_ranks(["-m", "hybridpar", *arguments], cores, log, limit_s)


def _about(
    experiment: Experiment, folder: Folder, predictions: Predictions, table: Sequence[Row]
) -> dict[str, str]:
    """Return when, where and how the table was made."""
    close = sum(p.step_s <= predictions.best_s * (1 + CLOSE) for p in predictions.plans)
    fields = dataclasses.asdict(experiment)
    return {
        "date": f"{time.strftime('%Y-%m-%d', time.gmtime())} (predictions written {predictions.date} UTC, "
        f"SHA-256 {digest(folder.predictions)[:16]})",
        "machine": machine(),
        "software": software(),
        "experiment": ", ".join(f"{key} {value}" for key, value in fields.items()),
        "plans": f"{len(predictions.plans)} drawn, {close} of them within {CLOSE:.0%} of the best predicted",
        "machine's speed": drift(table) or "not known",
    }


def _say(text: str) -> None:
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {text}\n")


def _arguments() -> tuple[Experiment, Folder, Path | None]:
    parser = argparse.ArgumentParser(prog="python -m scripts.bench.accuracy", description=__doc__)
    parser.add_argument("model", choices=sorted(MODELS))
    parser.add_argument("--out", type=Path, help="folder of the experiment; default: runs/accuracy-MODEL")
    parser.add_argument("--docs", type=Path, help="document that takes the table between its markers")
    for field in dataclasses.fields(Experiment)[1:]:
        option = "--" + field.name.replace("_", "-")
        if isinstance(field.default, bool):
            parser.add_argument(option, action="store_true")
        else:
            parser.add_argument(
                option, type=type(field.default), default=field.default, help="default: %(default)s"
            )
    given = vars(parser.parse_args())
    out, document = given.pop("out"), given.pop("docs")
    try:
        experiment = Experiment(**given)
    except ConfigError as e:
        parser.error(str(e))
    return experiment, Folder((out or ROOT / "runs" / f"accuracy-{experiment.model}").resolve()), document


if __name__ == "__main__":
    sys.exit(main())
