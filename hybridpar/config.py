"""The configuration of a job: Hydra at the edge, plain frozen objects inside.

This is the only module that knows Hydra. ``compose`` reads the groups below ``conf/``, applies overrides, and
converts the result once.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

from hybridpar.data.spec import DataSpec
from hybridpar.errors import ConfigError, PlanError
from hybridpar.planning.plan import Kind, OrderRule, Precision, Recipe
from hybridpar.planning.request import Pin, Request, Shape
from hybridpar.schema import from_data

T = TypeVar("T")

_OPEN = re.compile(r"^(model|optimizer)\.options\.")
"""Mappings that take any key: whoever gets the options checks their names."""


class _FieldError(ConfigError):
    """A value of the wrong type; keeps the messages of the sections themselves as they are."""


def _require(condition: bool, name: str, value: object, remedy: str) -> None:
    if not condition:
        raise ConfigError(f"{name}: {value} {remedy}")


@dataclass(frozen=True)
class ModelConfig:
    """Which model. Raises ConfigError for a value out of range."""

    name: str
    builder: str
    """``module:function``, resolved by ``hybridpar.model.build``."""
    in_shape: tuple[int, ...]
    """Of one input sample."""
    classes: int
    options: dict[str, Any] = field(default_factory=dict)
    """Further keyword arguments of the builder."""

    def __post_init__(self) -> None:
        fits = bool(self.in_shape) and min(self.in_shape) >= 1
        _require(fits, "model.in_shape", list(self.in_shape), "must be positive sizes, as in [3,224,224]")
        _require(self.classes >= 1, "model.classes", self.classes, "must be at least 1")


@dataclass(frozen=True)
class ProfileConfig:
    """Where the layers' times come from."""

    kind: Literal["analytic", "measured", "from_file"]
    path: str | None = None
    micro_batches: tuple[int, ...] = ()
    """Samples per timed forward, of a measured profile."""
    budget_s: float = 60.0
    cache: bool = True

    def __post_init__(self) -> None:
        least = min(self.micro_batches, default=1)
        _require(least >= 1, "profile.micro_batches", list(self.micro_batches), "must be positive")
        _require(self.budget_s > 0, "profile.budget_s", self.budget_s, "must be above 0 seconds")


@dataclass(frozen=True)
class PlanConfig:
    """What the planner is asked for; the fields of the stages are pins."""

    shape: Literal[Shape, "from_file"]
    path: str | None = None
    """The plan's file, of ``from_file``."""
    front: Pin = field(default_factory=Pin)
    middle: Pin = field(default_factory=Pin)
    tail: Pin = field(default_factory=Pin)
    order: OrderRule | None = None
    bucket_bytes: int = 8 * 2**20
    distinct: bool = False
    """Only plans whose stages all have different micro-batch sizes."""

    def __post_init__(self) -> None:
        if self.bucket_bytes < 1:
            raise PlanError(f"bucket_bytes: {self.bucket_bytes} is below 1")

    @property
    def pins(self) -> dict[Kind, Pin]:
        """The pins of the stages that have any."""
        given: dict[Kind, Pin] = {"front": self.front, "middle": self.middle, "tail": self.tail}
        return {kind: pin for kind, pin in given.items() if pin != Pin()}


@dataclass(frozen=True)
class ScheduleConfig:
    """How the learning rate goes over the steps."""

    name: Literal["constant", "cosine", "step"] = "constant"
    warmup_steps: int = 0
    """Steps of linear growth before the schedule proper."""
    minimum: float = 0.0
    """Where the cosine ends, as a share of the learning rate."""
    milestones: tuple[float, ...] = (0.5, 0.75)
    """Shares of the training at which ``step`` multiplies by ``factor``."""
    factor: float = 0.1

    def __post_init__(self) -> None:
        where = "optimizer.schedule"
        _require(self.warmup_steps >= 0, f"{where}.warmup_steps", self.warmup_steps, "must be 0 or more")
        _require(0 <= self.minimum <= 1, f"{where}.minimum", self.minimum, "must lie in 0..1")
        inside = all(0 < m < 1 for m in self.milestones)
        _require(inside, f"{where}.milestones", list(self.milestones), "must lie between 0 and 1")
        _require(self.factor > 0, f"{where}.factor", self.factor, "must be above 0")


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer. Raises ConfigError for values that are out of range or do not go together."""

    name: str = "SGD"
    """A class of ``torch.optim``."""
    lr: float = 0.01
    options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the class."""
    sharding: Literal["none", "zero1"] = "none"
    clip: float | None = None
    """Largest global norm of the gradients; None: no clipping."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)

    def __post_init__(self) -> None:
        _require(self.lr >= 0, "optimizer.lr", self.lr, "must be 0 or more")
        _require(self.clip is None or self.clip > 0, "optimizer.clip", self.clip, "must be above 0, or null")
        if self.clip is not None and self.sharding == "zero1":
            raise ConfigError(
                f"optimizer.clip={self.clip} does not work with optimizer.sharding=zero1, which never has whole "
                "gradients to take the global norm of; set optimizer.clip=null or optimizer.sharding=none"
            )

    @property
    def state_count(self) -> int | None:
        """Tensors of a parameter's size that the optimizer keeps; None: ``runtime.optimizer`` can measure it."""
        on = {name for name, value in self.options.items() if value}
        if self.name == "SGD":
            return int("momentum" in on)
        if self.name in {"Adam", "AdamW"}:
            return 2 + ("amsgrad" in on)
        if self.name == "RMSprop":
            return 1 + ("momentum" in on) + ("centered" in on)
        return None


@dataclass(frozen=True)
class TrainConfig:
    """The training itself."""

    global_batch: int = 64
    epochs: int = 1
    steps: int | None = None
    """End after this many; None: all steps of the epochs."""
    drop_last: bool = False
    seed: int = 0
    precision: Precision = "float32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    eval_every: int | None = 1
    """Epochs between evaluations; None: only at the end."""
    log_every: int = 10
    mode: Literal["auto", "progress", "plain", "quiet"] = "auto"
    timeout_s: float = 300.0
    """Of one communication."""

    def __post_init__(self) -> None:
        for name in ("global_batch", "epochs", "steps", "eval_every", "log_every"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"train.{name}", value, "must be at least 1")
        _require(0 <= self.seed < 2**63, "train.seed", self.seed, "must lie in 0..2**63-1")
        _require(self.timeout_s > 0, "train.timeout_s", self.timeout_s, "must be above 0 seconds")


@dataclass(frozen=True)
class MonitorConfig:
    """Sampling of the GPUs; ``hybridpar.monitor`` checks the ranges."""

    mode: Literal["auto", "off", "required"] = "auto"
    interval_s: float = 0.5
    max_bytes: int = 32 * 2**20


@dataclass(frozen=True)
class RunConfig:
    """Where a training job writes."""

    dir: str | None = None
    """None: ``runs/<model>-<data>-<time>``."""


@dataclass(frozen=True)
class Config:
    """Everything a command needs to know."""

    model: ModelConfig
    profile: ProfileConfig
    cluster: dict[str, Any]
    """Data for ``hybridpar.cluster.describe.from_config``."""
    plan: PlanConfig
    data: DataSpec
    optimizer: OptimizerConfig
    train: TrainConfig
    monitor: MonitorConfig
    run: RunConfig
    format: Literal["text", "json"]
    out: str | None
    explain: bool
    resolved: str
    """All of it as YAML."""

    def __post_init__(self) -> None:
        if self.optimizer.sharding == "zero1" and self.train.precision != "float32":
            raise ConfigError(
                f"optimizer.sharding=zero1 keeps float32 state, but train.precision={self.train.precision}; "
                "set train.precision=float32 or optimizer.sharding=none"
            )

    def request(self) -> Request:
        """Return the planning problem. Raises ConfigError (unknown optimizer), PlanError (``from_file``)."""
        if self.plan.shape == "from_file":
            raise PlanError(f"plan=from_file takes the plan from {self.plan.path} and asks the planner for none")
        return Request(
            global_batch=self.train.global_batch,
            shape=self.plan.shape,
            precision=self.train.precision,
            recipe=self.recipe(),
            pins=self.plan.pins,
            order=self.plan.order,
            bucket_bytes=self.plan.bucket_bytes,
            distinct=self.plan.distinct,
        )

    def recipe(self) -> Recipe:
        """Return what the training asks of every step. Raises ConfigError for an unknown optimizer."""
        states = self.optimizer.state_count
        if states is None:
            from hybridpar.runtime.optimizer import state_count  # noqa: PLC0415 - torch takes seconds to import

            states = state_count(self.optimizer)
        return Recipe(self.optimizer.clip is not None, self.optimizer.sharding, states)


def conf_dir() -> Path:
    """Return the folder of the config groups: inside an installed package, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def compose(overrides: Sequence[str] = ()) -> Config:
    """Compose the configuration from ``conf/`` and ``overrides`` (``train.epochs=5``, ``model=resnet50``, ...).

    Raises ConfigError (PlanError below ``plan``) in one line that names the key, and the nearest one where it is
    unknown.
    """
    data, text = _load([_open(o) for o in overrides])
    rest = {key: data[key] for key in ("format", "out", "explain") if key in data}
    output = from_data(_Output, rest, "config", _FieldError)
    return Config(
        model=from_data(ModelConfig, data.get("model"), "model", _FieldError),
        profile=from_data(ProfileConfig, data.get("profile"), "profile", _FieldError),
        cluster=from_data(dict[str, Any], data.get("cluster"), "cluster", _FieldError),
        plan=from_data(PlanConfig, data.get("plan"), "plan", PlanError),
        data=from_data(DataSpec, data.get("data"), "data", _FieldError),
        optimizer=from_data(OptimizerConfig, data.get("optimizer"), "optimizer", _FieldError),
        train=from_data(TrainConfig, data.get("train"), "train", _FieldError),
        monitor=from_data(MonitorConfig, data.get("monitor"), "monitor", _FieldError),
        run=from_data(RunConfig, data.get("run"), "run", _FieldError),
        format=output.format,
        out=output.out,
        explain=output.explain,
        resolved=text,
    )


@dataclass(frozen=True)
class _Output:
    """The keys without a group."""

    format: Literal["text", "json"] = "text"
    out: str | None = None
    explain: bool = False


def _open(override: str) -> str:
    return f"++{override}" if _OPEN.match(override) else override


def _load(overrides: Sequence[str]) -> tuple[dict[str, Any], str]:
    """Return the composed configuration as plain data and as YAML."""
    from hydra.errors import HydraException, MissingConfigException  # noqa: PLC0415 - only where it is needed
    from omegaconf import OmegaConf  # noqa: PLC0415
    from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException  # noqa: PLC0415

    for override in overrides:
        if _key(override).split(".", maxsplit=1)[0] == "hydra":
            raise ConfigError(f"override {override} has no effect here; set run.dir for the run's directory")
    try:
        composed = _composed(overrides)
        data: Any = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
        return data, OmegaConf.to_yaml(composed, resolve=True)
    except MissingMandatoryValue as e:
        name = str(e.full_key or "a value")
        raise ConfigError(f"{name}: missing; give it as {name}=...") from e
    except MissingConfigException as e:
        _unknown_choice(overrides, e)
    except HydraException as e:
        _unreadable(overrides, e)
    except OmegaConfBaseException as e:
        raise ConfigError(f"{e.full_key or 'config'}: {_first_line(e)}") from e


def _composed(overrides: Sequence[str]) -> Any:
    from hydra import compose as hydra_compose  # noqa: PLC0415 - a tenth of a second
    from hydra import initialize_config_dir  # noqa: PLC0415

    with initialize_config_dir(config_dir=str(conf_dir()), version_base="1.3"):
        return hydra_compose(config_name="config", overrides=list(overrides))


def _unknown_choice(overrides: Sequence[str], cause: Exception) -> NoReturn:
    for override in overrides:
        group, _, choice = override.partition("=")
        folder = conf_dir() / group.lstrip("+~")
        choices = _choices(folder)
        if folder.is_dir() and choice not in choices:
            hint = nearest(choice, choices)
            if "from_file" in choices and Path(choice).suffix:
                hint = f"; for a file: {group}=from_file {group}.path={choice}"
            raise ConfigError(f"unknown {group}={choice}{hint} (choices: {', '.join(choices)})") from cause
    raise ConfigError(_first_line(cause)) from cause


def _unreadable(overrides: Sequence[str], cause: Exception) -> NoReturn:
    """Say which override is unknown or malformed."""
    full_key = getattr(cause.__cause__, "full_key", None)
    for override in overrides:
        key = _key(override)
        if (full_key and (key == full_key or key.startswith(f"{full_key}."))) or f"'{key}'" in str(cause):
            name = override.split("=", maxsplit=1)[0]
            if "=" not in override:
                break
            known = _known(overrides)
            hint = nearest(key, known) or f"; there are {', '.join(k for k in known if '.' not in k)}"
            raise ConfigError(f"unknown override {name}{hint}") from cause
    text = getattr(cause, "override", None)
    named = f"override {text!r}" if text else "the overrides"
    raise ConfigError(
        f"cannot read {named}: {_first_line(cause)}; write key=value, a list as key=[a,b], and quote other text"
    ) from cause


def _known(overrides: Sequence[str]) -> list[str]:
    """Return all keys that there are with the chosen groups."""
    from omegaconf import OmegaConf  # noqa: PLC0415 - only on the way to an error

    groups = [o for o in overrides if o.partition("=")[2] in _choices(conf_dir() / o.partition("=")[0])]
    data: Any = OmegaConf.to_container(_composed(groups), throw_on_missing=False)
    return [*_flat(data), "experiment"]


def _flat(data: Mapping[str, Any], prefix: str = "") -> Iterable[str]:
    for key, value in data.items():
        yield f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")


def _choices(folder: Path) -> list[str]:
    return sorted(p.stem for p in folder.glob("*.yaml") if not p.stem.startswith("_"))


def _key(override: str) -> str:
    return override.split("=", maxsplit=1)[0].lstrip("+~")


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def nearest(name: str, known: Sequence[str]) -> str:
    """Return ``; did you mean ...?`` with the known name nearest to ``name``, or nothing where none is near."""
    leaf = name.rsplit(".", maxsplit=1)[-1]
    same = [k for k in known if k.rsplit(".", maxsplit=1)[-1].lower() == leaf.lower()]
    near = same[:1] or difflib.get_close_matches(name, known, n=1)
    if not near:
        leaves = {k.rsplit(".", maxsplit=1)[-1]: k for k in reversed(known)}
        near = [leaves[m] for m in difflib.get_close_matches(leaf, leaves, n=1)]
    return f"; did you mean {near[0]}?" if near else ""
