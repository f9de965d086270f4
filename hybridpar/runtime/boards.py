"""Where the scalars of a training are shown besides its own files: TensorBoard, Weights & Biases, MLflow."""

from __future__ import annotations

import importlib.util
import os
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import yaml

from hybridpar.errors import ConfigError
from hybridpar.train_section import Logger

_PROJECT = "hybridpar"
_BATCH, _BATCH_S = 300, 5.0
"""MLflow gets metrics in batches of so many at most, at least this often; it takes 1,000 at once."""
_PARAMETERS, _VALUE_CHARACTERS = 100, 500
"""MLflow takes so many parameters at once, and values of this length."""


class Board(Protocol):
    """Shows the scalars of one training."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Show named values of a step."""

    def close(self) -> None:
        """Write what is not written yet."""


def check_loggers(names: Sequence[Logger]) -> None:
    """Raise ConfigError where a package that ``train.loggers`` names is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"train.loggers: {name} is not installed; pip install {name}, or leave it out")


def open_boards(names: Sequence[Logger], folder: Path, settings: str, step: int | None) -> list[Board]:
    """Open the boards of a run in ``folder``, which goes on from ``step`` if that is not None.

    ``settings`` is the configuration as YAML.
    """
    return [_KINDS[name](folder, settings, step) for name in names]


class TensorBoard:
    """Event files in ``tensorboard/``; of a run that goes on, what came after the checkpoint is purged."""

    def __init__(self, folder: Path, settings: str, step: int | None) -> None:
        del settings
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - a second to import

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Show named values of a step."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is not written yet."""
        self._writer.close()


class WandB:
    """A run of Weights & Biases, in ``wandb/``; WANDB_MODE=offline, WANDB_PROJECT and the like are W&B's own."""

    def __init__(self, folder: Path, settings: str, step: int | None) -> None:
        import wandb  # noqa: PLC0415 - only where it is asked for

        known = folder / "wandb-id"
        if step is None or not known.exists():
            known.write_text(uuid.uuid4().hex[:8])
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            name=folder.name,
            id=known.read_text(),
            dir=str(folder),
            config=yaml.safe_load(settings),
            resume="allow",
        )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Show named values of a step."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Write what is not written yet."""
        self._run.finish()


class MLflow:
    """A run of MLflow: on the server that MLFLOW_TRACKING_URI names, else in the run's ``mlflow.db``."""

    def __init__(self, folder: Path, settings: str, step: int | None) -> None:
        from mlflow import MlflowClient  # noqa: PLC0415 - only where it is asked for
        from mlflow.entities import Metric  # noqa: PLC0415

        address = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder / 'mlflow.db'}"
        self._metric, self._client = Metric, MlflowClient(tracking_uri=address)
        known = folder / "mlflow-id"
        if step is None or not known.exists():
            known.write_text(self._begin(folder, settings))
        self._run = known.read_text()
        self._waiting: list[Any] = []
        self._flushed_s = time.monotonic()

    def _begin(self, folder: Path, settings: str) -> str:
        """Make a run with the settings as its parameters, and return its number."""
        from mlflow.entities import Param  # noqa: PLC0415

        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
        experiment = self._client.get_experiment_by_name(name)
        number = self._client.create_experiment(name) if experiment is None else experiment.experiment_id
        run = str(self._client.create_run(number, run_name=folder.name).info.run_id)
        parameters = [Param(key, value[:_VALUE_CHARACTERS]) for key, value in _flat(yaml.safe_load(settings))]
        for first in range(0, len(parameters), _PARAMETERS):
            self._client.log_batch(run, params=parameters[first : first + _PARAMETERS])
        return run

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Show named values of a step, in a few seconds."""
        now_ms = int(time.time() * 1e3)
        self._waiting += [self._metric(name, value, now_ms, step) for name, value in values.items()]
        if len(self._waiting) >= _BATCH or time.monotonic() - self._flushed_s >= _BATCH_S:
            self._flush()

    def close(self) -> None:
        """Write what is not written yet."""
        self._flush()
        self._client.set_terminated(self._run)

    def _flush(self) -> None:
        self._client.log_batch(self._run, metrics=self._waiting)
        self._waiting, self._flushed_s = [], time.monotonic()


def _flat(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield dotted keys with their values as text."""
    for key, value in data.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value)


_KINDS: Mapping[Logger, type[TensorBoard | WandB | MLflow]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "mlflow": MLflow,
}
