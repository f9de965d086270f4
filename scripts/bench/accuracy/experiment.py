"""What one accuracy experiment is, and where its folder keeps what."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hybridpar.errors import ConfigError
from hybridpar.schema import read_json, to_data
from scripts.bench.files import write_json

MODELS: dict[str, tuple[str, ...]] = {
    "vgg16": ("model=vgg16", "model.in_shape=[3,64,64]"),
    "resnet50": ("model=resnet50", "model.in_shape=[3,64,64]"),
    "resnet18": ("model=resnet18", "model.in_shape=[3,64,64]"),
    "small_vgg": (
        "model=small_vgg",
        "model.in_shape=[1,32,32]",
        "model.options.width=24",
        "model.options.classifier_width=512",
    ),
}
"""Overrides by the name of an experiment. VGG16 keeps all its 138 million parameters at any size of image."""


@dataclass(frozen=True)
class Experiment:
    """Everything that decides what is drawn and how it is measured; a folder holds one experiment."""

    model: str
    world: int = 4
    cores: float = 0.45
    """Of one rank: what its cgroup grants it."""
    global_batch: int = 64
    seed: int = 0
    """Of the draws and of the order of the measurements."""
    plans: int = 14
    close: int = 6
    """Of the drawn plans: how many are within 15 % of the best predicted, the planner's choice apart."""
    warm_up: int = 2
    """Steps before the timed ones."""
    steps: int = 8
    """Timed steps of a measurement."""
    rounds: int = 1
    """Measurements of every plan; all plans are measured once before any is measured again."""
    actions: bool = False
    """Measure also what every kind of action takes, in the first round."""
    profile_budget_s: float = 180.0

    def __post_init__(self) -> None:
        if self.model not in MODELS:
            raise ConfigError(f"model: {self.model} is none of {', '.join(MODELS)}")
        if not 0 < self.close < self.plans:
            raise ConfigError(f"close: {self.close} must lie between 1 and the {self.plans} plans less one")
        for name in ("world", "global_batch", "steps", "rounds"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: {getattr(self, name)} is below 1")
        if self.warm_up < 1:
            raise ConfigError(f"warm_up: {self.warm_up} is below 1; a step time needs the end of the step before")

    @property
    def overrides(self) -> list[str]:
        """The job, as the command line of hybridpar takes it."""
        return [
            *MODELS[self.model],
            "data=synthetic",
            "optimizer=sgd",
            "monitor=off",
            "train.device=cpu",
            f"train.global_batch={self.global_batch}",
        ]


@dataclass(frozen=True)
class Folder:
    """The files of an experiment. What is there is not done again."""

    path: Path

    @property
    def profile(self) -> Path:
        """Measured layer times."""
        return self.path / "profile.json"

    @property
    def cluster(self) -> Path:
        """Measured links."""
        return self.path / "cluster.yaml"

    @property
    def draws(self) -> Path:
        """Every draw with what became of it."""
        return self.path / "draws.json"

    @property
    def beats(self) -> Path:
        """When the beat was how fast."""
        return self.path / "beats.tsv"

    @property
    def profile_beat(self) -> Path:
        """How fast it was while the profile was taken."""
        return self.path / "profile-beat.json"

    @property
    def predictions(self) -> Path:
        """What is predicted for every plan, written before any is measured."""
        return self.path / "predictions.json"

    def plan(self, name: str) -> Path:
        """A drawn plan."""
        return self.path / "plans" / f"{name}.json"

    def result(self, name: str, turn: int) -> Path:
        """A plan's measurement, of one round."""
        return self.path / "results" / f"{name}-round{turn}.json"

    def log(self, name: str) -> Path:
        """What a command printed."""
        return self.path / "logs" / f"{name}.log"

    def open(self, experiment: Experiment) -> None:
        """Make the folder, or check that it holds the same experiment. Raises ConfigError."""
        for part in ("plans", "results", "logs"):
            (self.path / part).mkdir(parents=True, exist_ok=True)
        note = self.path / "experiment.json"
        if note.exists():
            known = read_json(Experiment, note, ConfigError)
            if known != experiment:
                raise ConfigError(f"{self.path} holds another experiment, {known}; give another folder by --out")
            return
        write_json(note, to_data(experiment))
