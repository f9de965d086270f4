"""Who takes part in a setting: every peer with its best options, and our plans."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from hybridpar.errors import ConfigError, HybridparError
from hybridpar.schema import read_json, to_data
from scripts.bench.children import LaunchFailedError
from scripts.bench.cluster.cell import Conditions, Entry
from scripts.bench.cluster.folder import Folder
from scripts.bench.cluster.plans import Planner, Predictions
from scripts.bench.cluster.runner import Runner, Steps
from scripts.bench.cluster.setting import Setting
from scripts.bench.cluster.tuning import Options, Try, Tuning, tried, tune
from scripts.bench.files import digest, write_json

OURS = "hybridpar"


class Kind(Protocol):
    """What a contestant's class tells."""

    lossy: bool
    alone: bool

    def grid(self, setting: Setting) -> list[Options]:
        """Return the options to try."""
        ...


@dataclass(frozen=True)
class Field:
    """Makes the entries of settings.

    Args:
        names: of the contestants.
        candidates: whether our best plan of every shape runs beside the chosen one.
        budget_s: of each contestant's tuning.
        find: gives a contestant's class; may raise ImportError.

    """

    folder: Folder
    planner: Planner
    runner: Runner
    conditions: Conditions
    names: Sequence[str]
    candidates: bool
    budget_s: float
    find: Callable[[str], Any]
    say: Callable[[str], None]

    def entries(self, setting: Setting, tuned_at: Setting) -> list[Entry]:
        """Return who runs in a setting, tuning at another one what was not tuned there yet."""
        found: list[Entry] = []
        for name in self.names:
            try:
                best = self._tuned(name, tuned_at)
                found += self._ours(setting, best) if name == OURS else [Entry(name, name, best)]
            except (ImportError, HybridparError, LaunchFailedError, _UntunableError) as e:
                found.append(Entry(name, name, problem=f"{type(e).__name__}: {e}"))
                self.say(f"{name} cannot run: {e}")
        return found

    def _ours(self, setting: Setting, options: Options) -> list[Entry]:
        """Return the planner's choice and, where they are wanted, the best plans of the other shapes."""
        out, predictions = self.planner.predict(setting, _format(options))
        others = [p.shape for p in predictions.plans if p.plan_sha256 and p.shape != predictions.chosen]
        chosen = _entry(OURS, out, predictions, predictions.chosen, options)
        return [chosen] + [
            _entry(f"{OURS}, {shape}", out, predictions, shape, options) for shape in others if self.candidates
        ]

    def _tuned(self, name: str, setting: Setting) -> Options:
        path = self.folder.tuning(setting, name)
        known = read_json(Tuning, path, ConfigError) if path.exists() else None
        if known is None or not known.conditions.same(self.conditions) or known.budget_s != self.budget_s:
            grid = self.find(name).grid(setting)
            known = tune(name, grid, self.budget_s, self.conditions, lambda o, n: self._try(name, setting, o, n))
            write_json(path, to_data(known))
        if known.best is None:
            raise _UntunableError(known.error)
        return known.best

    def _try(self, name: str, setting: Setting, options: Options, number: int) -> Try:
        entry = self._ours(setting, options)[0] if name == OURS else Entry(name, name, options)
        taken = self.runner.run(f"tuning-{setting.name}-{name}-{number}", setting, entry, Steps())
        result = tried(options, taken, alone=self.find(name).alone)
        self.say(f"tuning {name} at {setting.name}: {options} {result.error or f'{result.cost_s:.3f} s'}")
        return result


class _UntunableError(Exception):
    """All tries of a contestant failed."""


def _entry(name: str, out: Path, predictions: Predictions, shape: str, options: Options) -> Entry:
    sha256 = digest(out / "predictions.json")
    entry = Entry(name, OURS, {**options, "plan": str(out / f"{shape}.json")}, shape)
    return replace(entry, predicted_s=predictions.of(shape).step_s, predictions_sha256=sha256)


def _format(options: Options) -> str:
    return "channels_last" if options.get("channels_last") else "contiguous"
