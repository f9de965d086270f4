"""The journal of a training: what rank 0 writes down and shows while it runs."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from hybridpar.config import Config
from hybridpar.errors import ConfigError
from hybridpar.runtime.boards import Board
from hybridpar.runtime.evaluation import Evaluation
from hybridpar.runtime.job import Job
from hybridpar.runtime.manifest import FOLDER, Position, complete
from hybridpar.schema import from_data

Mode = Literal["auto", "progress", "plain", "quiet"]
_LATEST = 50
"""Steps whose mean time tells how long the others will take."""


@dataclass(frozen=True)
class StepRecord:
    """One line of ``metrics.jsonl``."""

    step: int
    """From 0."""
    epoch: int | None
    """From 0; null: it is not known."""
    loss: float
    """null in the file where it is not finite."""
    lr: float | None
    samples: int
    step_s: float
    """From the end of the step before to the end of this one: reading, computing and updating."""
    samples_per_s: float
    time_s: float
    """Seconds since the epoch, at the end of the step."""
    plan: str = ""
    """Fingerprint of the plan that it ran under."""
    loss_scale: float | None = None
    """What the loss was scaled by for its gradients; null: it was not."""
    skipped: bool = False
    """The gradients were not all finite, so that the parameters stayed as they were."""


def step_record(
    job: Job, step: int, epoch: int | None, loss: float, rate: float | None, samples: int, step_s: float
) -> StepRecord:
    """Return what there is to note of a step that a job has just run."""
    scaler = job.scaler
    return StepRecord(
        step,
        epoch,
        loss,
        rate,
        samples,
        step_s,
        samples / step_s,
        time.time(),
        job.plan.fingerprint,
        loss_scale=scaler.used if scaler else None,
        skipped=scaler is not None and scaler.in_a_row > 0,
    )


class Journal:
    """Writes ``metrics.jsonl`` and ``evaluations.jsonl``, passes scalars on to boards, and shows progress.

    ``steps`` is the length of the whole training. A run that goes on from ``position`` keeps what was written
    before it, and loses what came after. Close it, or use it as a context manager.
    """

    def __init__(
        self,
        folder: Path,
        steps: int,
        mode: Mode = "auto",
        log_every: int = 10,
        position: Position | None = None,
        boards: Sequence[Board] = (),
    ) -> None:
        self.console = Console()
        if mode == "auto":
            mode = "progress" if self.console.is_terminal else "plain"
        self._mode, self._steps, self._log_every = mode, steps, log_every
        kept = _records(folder / "metrics.jsonl", position, "step")
        self.earlier = [_step_record(line) for line in kept]
        """The steps before this process began."""
        self._skipped = sum(record.skipped for record in self.earlier)
        evaluated = _records(folder / "evaluations.jsonl", position, "evaluation")
        self._metrics = _rewritten(folder / "metrics.jsonl", kept)
        self._evaluations = _rewritten(folder / "evaluations.jsonl", evaluated)
        self._boards = boards
        self._latest_s: deque[float] = deque(maxlen=_LATEST)
        self._progress: Progress | None = None
        if mode == "progress":
            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
            self._progress = Progress(*columns, console=self.console)
            self._task = self._progress.add_task("", total=steps, completed=position.step if position else 0)
            self._progress.start()

    def step(self, record: StepRecord) -> None:
        """Note a step."""
        _write(self._metrics, vars(record))
        scalars = {"lr": record.lr, "samples_per_s": record.samples_per_s, "loss_scale": record.loss_scale}
        self._scalars(record.step, loss=record.loss, **scalars)
        self._skipped += record.skipped
        rate = "" if record.lr is None else f"lr {record.lr:.3g}  "
        scale = "" if record.loss_scale is None else f"scale {record.loss_scale:g} ({self._skipped} skipped)  "
        speed = f"{record.samples_per_s:.1f} samples/s"
        epoch = "" if record.epoch is None else f"epoch {record.epoch + 1}  "
        text = f"{epoch}loss {record.loss:.4f}  {rate}{scale}{speed}"
        self._latest_s.append(record.step_s)
        if self._progress is not None:
            self._progress.update(self._task, advance=1, description=text)
        elif (record.step + 1) % self._log_every == 0 or record.step + 1 == self._steps:
            self.say(f"step {record.step + 1}/{self._steps}  {text}  {self._left(record.step + 1)} left")

    def evaluation(self, step: int, epoch: int, result: Evaluation) -> None:
        """Note an evaluation on the test split after ``step`` steps."""
        known = {name: value for name, value in vars(result).items() if name != "own"}
        _write(self._evaluations, {"step": step, "epoch": epoch, **known, **result.own})
        self._scalars(step, test_loss=result.loss, test_accuracy=result.top1, test_top5=result.top5)
        self._scalars(step, **{f"test_{name}": value for name, value in result.own.items()})
        own = "".join(f"{name} {value:.4f}  " for name, value in result.own.items())
        self.say(
            f"step {step}  epoch {epoch + 1}  test accuracy {result.top1:.4f}  top 5 {result.top5:.4f}  "
            f"loss {result.loss:.4f}  {own}({result.samples} samples)"
        )

    def say(self, text: str) -> None:
        """Print a line, unless the journal is quiet."""
        if self._mode != "quiet":
            self.console.print(text, highlight=False, soft_wrap=True)
            sys.stdout.flush()

    def close(self) -> None:
        """End the display and close the files."""
        if self._progress is not None:
            self._progress.stop()
        self._metrics.close()
        self._evaluations.close()
        for board in self._boards:
            board.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _scalars(self, step: int, **values: float | None) -> None:
        known = {name: value for name, value in values.items() if value is not None}
        for board in self._boards:
            board.scalars(step, known)

    def _left(self, done: int) -> timedelta:
        """Return the time that the steps after ``done`` take if they are as fast as the latest ones."""
        return timedelta(seconds=round((self._steps - done) * sum(self._latest_s) / len(self._latest_s)))


def check_run_dir(config: Config, *, restarted: bool = False) -> None:
    """Raise ConfigError where ``make_run_dir`` would, as far as a glance tells; makes nothing."""
    path = Path(config.run.dir or "runs").expanduser().absolute()
    continued = restarted or config.resume == "auto"
    if config.run.dir is not None and (path / "metrics.jsonl").exists() and not continued:
        raise ConfigError(
            f"run.dir: {path} holds a run already; give another folder, remove this one, or continue it with "
            "resume=auto"
        )
    finished = (path / "summary.json").exists() and not complete(path / FOLDER)
    if config.run.dir is not None and config.resume == "auto" and finished and not restarted:
        raise ConfigError(
            f"resume=auto: the run in {path} has ended and left no checkpoint to go on from, and its records "
            "would be lost; give another run.dir, and checkpoint.every=N to be able to continue"
        )
    there = next(p for p in (path, *path.parents) if p.exists())
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        raise ConfigError(f"run.dir: {path} cannot be made in {there}; give another one by run.dir=...")


def make_run_dir(config: Config, *, restarted: bool = False) -> Path:
    """Make the folder of a run and return its absolute path.

    Raises ConfigError where ``run.dir`` holds a run already (unless the job was ``restarted``, or ``resume=auto``
    continues it), or cannot be made.
    """
    check_run_dir(config, restarted=restarted)
    try:
        if config.run.dir is not None:
            path = Path(config.run.dir).expanduser().absolute()
            path.mkdir(parents=True, exist_ok=True)
            return path
        stem = f"{config.model.name}-{config.data.name}-{time.strftime('%Y%m%d-%H%M%S')}"
        number = 1
        while True:
            path = Path("runs", stem if number == 1 else f"{stem}-{number}").absolute()
            try:
                path.mkdir(parents=True)
            except FileExistsError:
                number += 1
            else:
                return path
    except OSError as e:
        raise ConfigError(f"run.dir: the run's folder cannot be made: {e}; give another one by run.dir=...") from e


def _records(path: Path, position: Position | None, kind: Literal["step", "evaluation"]) -> list[dict[str, Any]]:
    """Return the lines of a file that were written before ``position``; a kill may have cut the last one."""
    if position is None or not path.exists():
        return []
    result: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            data = json.loads(line)
        except ValueError:
            break
        before = data["step"] < position.step
        if before or (kind == "evaluation" and data["step"] == position.step):
            result.append(data)
    return result


def _step_record(data: dict[str, Any]) -> StepRecord:
    """Read a line of ``metrics.jsonl``."""
    return from_data(StepRecord, {**data, "loss": math.nan} if data["loss"] is None else data, "step", ConfigError)


def _rewritten(path: Path, lines: list[dict[str, Any]]) -> IO[str]:
    """Return a file that holds some lines, to be written on; the old one is there until the new one is whole."""
    new = path.with_name(f".{path.name}.partial")
    new.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    new.replace(path)
    return path.open("a", encoding="utf-8", buffering=1)


def _write(file: IO[str], data: dict[str, Any]) -> None:
    """Write a line of JSON, which has no word for infinity and not-a-number: they become null."""
    known = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in data.items()}
    file.write(json.dumps(known, allow_nan=False) + "\n")
