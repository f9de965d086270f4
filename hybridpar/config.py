"""The configuration of a job: Hydra at the edge, plain frozen objects inside.

This is the only module that knows Hydra. ``compose`` reads the groups below ``conf/``, applies overrides, and
converts the result once into the sections of ``hybridpar.sections`` and its neighbours.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

import yaml

from hybridpar.data.spec import DataSpec
from hybridpar.errors import ConfigError, PlanError
from hybridpar.names import nearest
from hybridpar.optimizer_section import OptimizerConfig, ScheduleConfig
from hybridpar.planning.plan import SHARDINGS, OptimizerSharding, Recipe, validate_recipe
from hybridpar.planning.request import Request, Space
from hybridpar.schema import from_data
from hybridpar.sections import (
    CheckpointConfig,
    LossConfig,
    ModelConfig,
    MonitorConfig,
    PlanConfig,
    ProbeConfig,
    ProfileConfig,
    RunConfig,
    VerifyConfig,
)
from hybridpar.train_section import TrainConfig

__all__ = [
    "CheckpointConfig",
    "Config",
    "LossConfig",
    "ModelConfig",
    "MonitorConfig",
    "OptimizerConfig",
    "PlanConfig",
    "ProbeConfig",
    "ProfileConfig",
    "RunConfig",
    "ScheduleConfig",
    "Sweep",
    "TrainConfig",
    "VerifyConfig",
    "compose",
    "conf_dir",
    "expand",
    "load",
]

T = TypeVar("T")

_OPEN = re.compile(r"^((model|optimizer)\.options\.|metrics[.=])")
"""Mappings that take any key: their sections or whoever gets the options check the names."""


class _FieldError(ConfigError):
    """A value of the wrong type; keeps the messages of the sections themselves as they are."""


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
    loss: LossConfig
    metrics: dict[str, str]
    """Own figures of evaluations: ``module:name`` by their names."""
    train: TrainConfig
    monitor: MonitorConfig
    run: RunConfig
    probe: ProbeConfig
    checkpoint: CheckpointConfig
    resume: str | None
    """``auto``: the latest checkpoint of ``run.dir``, if it has one; a path; None."""
    verify: VerifyConfig
    format: Literal["text", "json"]
    out: str | None
    explain: bool
    diff: str | None
    pictures: str | None
    """Folder for the plan's pictures."""
    resolved: str
    """All of it as YAML."""

    def __post_init__(self) -> None:
        if self.diff is not None and self.format == "json":
            raise ConfigError(
                f"diff={self.diff}: of no effect with format=json, which is the plan alone; drop one"
            )
        clipping, scaling = self.optimizer.clip is not None, self.train.scaling is not None
        asked = Recipe(
            clipping,
            self._sharding,
            scaling=scaling,
            compression=self.optimizer.compressed,
            offload=self.optimizer.offload,
        )
        validate_recipe(asked, self.train.precision)
        if self.train.memory_format is not None and self.optimizer.sharding != "none":
            raise ConfigError(
                f"train.memory_format: {self.train.memory_format} does not go with optimizer.sharding="
                f"{self.optimizer.sharding}, which takes parameters apart in their usual order; drop one"
            )
        if self.resume == "auto" and self.run.dir is None:
            raise ConfigError("resume=auto: continues the run in run.dir, which is missing; give run.dir=...")
        self._check_front()
        path = self.cluster.get("path")
        if path is not None and self.cluster.get("kind") != "from_file":
            remedy = _from_file("cluster", path)
            raise ConfigError(f"cluster.path: {path} is read by cluster=from_file only; {remedy}")

    @property
    def _sharding(self) -> OptimizerSharding:
        """The optimizer sharding of a recipe before the planner's choice."""
        return "none" if self.optimizer.sharding == "auto" else self.optimizer.sharding

    def _check_front(self) -> None:
        """Raise ConfigError for what a table of several plans takes no notice of."""
        idle = "explain=true" if self.explain else None if self.diff is None else f"diff={self.diff}"
        if self.plan.global_batch_range is not None and idle:
            raise ConfigError(
                f"{idle}: of no effect with plan.global_batch_range, which prints a table of plans; drop it, or "
                "plan one of them alone"
            )

    def refuse_for_training(self) -> None:
        """Raise ConfigError where a key is set that a training would take no notice of."""
        batches = self.plan.global_batch_range
        given = {
            "plan.global_batch_range": None if batches is None else list(batches),
            "format": self.format,
            "out": self.out,
            "explain": str(self.explain).lower(),
            "diff": self.diff,
            "pictures": self.pictures,
        }
        without = {"format": "text", "explain": "false"}
        idle = [f"{key}={value}" for key, value in given.items() if value != without.get(key)]
        if idle:
            raise ConfigError(
                f"{' '.join(idle)}: of no effect on a training, which writes to run.dir, nor on its verification; "
                "leave it out, or see the plan with `hybridpar plan`"
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
            replicas=self.plan.replicas,
            bucket_bytes=self.plan.bucket_bytes,
            distinct=self.plan.distinct,
            least_micro_batch=self.plan.least_micro_batch,
            space=Space(optimizer_sharding=self._shardings()),
            effort=self.plan.effort,
        )

    def _shardings(self) -> tuple[OptimizerSharding, ...] | None:
        """Return what the planner may choose from; None where the user has chosen."""
        if self.optimizer.sharding != "auto":
            return None
        if self.optimizer.elementwise is None:
            from hybridpar.runtime.elementwise import is_elementwise  # noqa: PLC0415 - torch takes seconds to import
            from hybridpar.runtime.optimizer import make_factory  # noqa: PLC0415
            from hybridpar.runtime.zero import keeps_groups  # noqa: PLC0415

            factory = make_factory(self.optimizer)
            fits = is_elementwise(factory) and keeps_groups(factory, self.optimizer.parameter_groups)
            return SHARDINGS if fits else ("none",)
        return SHARDINGS

    def recipe(self) -> Recipe:
        """Return what the training asks of every step. Raises ConfigError for an unknown optimizer."""
        states = self.optimizer.state_count
        if states is None:
            from hybridpar.runtime.optimizer import state_count  # noqa: PLC0415 - torch takes seconds to import

            states = state_count(self.optimizer)
        asked, average, scaling = self.optimizer, self.train.ema is not None, self.train.scaling is not None
        clipping = asked.clip is not None
        compression, offload = asked.compressed, asked.offload
        return Recipe(
            clipping,
            self._sharding,
            states,
            average,
            scaling,
            compression,
            offload=offload,
            sampling=self.loss.sampled,
        )


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
    return _from_data(*_load([_open(o) for o in overrides]))


def load(path: Path) -> Config:
    """Read the resolved configuration that a training wrote to ``config.yaml``.

    Raises ConfigError (PlanError below ``plan``) where there is none, or none of this version.
    """
    try:
        text = path.read_text(encoding="utf-8")
        data = yaml.safe_load(text)
    except (OSError, yaml.YAMLError) as e:
        raise ConfigError(f"{path} cannot be read: {_first_line(e)}; train again to have one") from e
    if not isinstance(data, dict):
        raise ConfigError(f"{path} is no configuration; train again to have one")
    return _from_data(data, text)


def _from_data(data: dict[str, Any], text: str) -> Config:
    """Return the sections of a resolved configuration, given as plain data and as YAML."""
    rest = {key: data[key] for key in ("format", "out", "explain", "diff", "pictures", "resume") if key in data}
    output = from_data(_Output, rest, "config", _FieldError)
    return Config(
        model=from_data(ModelConfig, data.get("model"), "model", _FieldError),
        profile=from_data(ProfileConfig, data.get("profile"), "profile", _FieldError),
        cluster=from_data(dict[str, Any], data.get("cluster"), "cluster", _FieldError),
        plan=from_data(PlanConfig, data.get("plan"), "plan", PlanError),
        data=from_data(DataSpec, data.get("data"), "data", _FieldError),
        optimizer=from_data(OptimizerConfig, data.get("optimizer"), "optimizer", _FieldError),
        loss=from_data(LossConfig, data.get("loss"), "loss", _FieldError),
        metrics=from_data(dict[str, str], data.get("metrics"), "metrics", _FieldError),
        train=from_data(TrainConfig, data.get("train"), "train", _FieldError),
        monitor=from_data(MonitorConfig, data.get("monitor"), "monitor", _FieldError),
        run=from_data(RunConfig, data.get("run"), "run", _FieldError),
        probe=from_data(ProbeConfig, data.get("probe"), "probe", _FieldError),
        checkpoint=from_data(CheckpointConfig, data.get("checkpoint"), "checkpoint", _FieldError),
        resume=output.resume,
        verify=from_data(VerifyConfig, data.get("verify"), "verify", _FieldError),
        format=output.format,
        out=output.out,
        explain=output.explain,
        diff=output.diff,
        pictures=output.pictures,
        resolved=text,
    )


@dataclass(frozen=True)
class _Output:
    """The keys without a group."""

    format: Literal["text", "json"] = "text"
    out: str | None = None
    explain: bool = False
    diff: str | None = None
    pictures: str | None = None
    resume: str | None = None


@dataclass(frozen=True)
class Sweep:
    """The combinations that overrides with several values stand for."""

    keys: tuple[str, ...]
    """What is varied, in the order of the overrides."""
    points: tuple[tuple[str, ...], ...]
    """One value per key; the last key varies fastest."""
    fixed: tuple[str, ...]
    """The other overrides."""

    def overrides(self, point: Sequence[str]) -> tuple[str, ...]:
        """Return the overrides of one combination."""
        return (*self.fixed, *(f"{key}={value}" for key, value in zip(self.keys, point, strict=True)))


def expand(overrides: Sequence[str]) -> Sweep:
    """Expand overrides in Hydra's sweep syntax: ``key=a,b``, ``key=range(1,4)``, ``group=glob(*)``.

    Raises ConfigError for a malformed override, for one that is given twice, and where nothing is varied.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser  # noqa: PLC0415
    from hydra.errors import HydraException  # noqa: PLC0415

    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
        varied = {o.get_key_element(): _values(o) for o in parsed if o.is_sweep_override()}
    except HydraException as e:
        _unreadable(overrides, e)
    fixed = tuple(str(o.input_line) for o in parsed if not o.is_sweep_override())
    names = [o.get_key_element() for o in parsed]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"{twice}: given twice; write its values as {twice}=a,b")
    if not varied:
        raise ConfigError("-m varies nothing; give a key several values, as in train.global_batch=64,128")
    for name in names:
        if name in {"explain", "diff", "pictures", "plan.global_batch_range"} or (
            name in varied and name in {"format", "out"}
        ):
            raise ConfigError(f"{name}: of no use with -m, which prints one table; plan that combination alone")
    return Sweep(tuple(varied), tuple(product(*varied.values())), fixed)


def _values(override: Any) -> list[str]:
    """Return the values of a parsed override in the syntax of overrides."""
    from hydra.core.override_parser.types import Glob  # noqa: PLC0415

    chosen = override.value()
    if isinstance(chosen, Glob):
        values = chosen.filter(_choices(conf_dir() / override.key_or_group))
    elif override.is_discrete_sweep():
        values = list(override.sweep_string_iterator())
    else:
        values = []
    if not values:
        raise ConfigError(
            f"override {override.input_line!r} has no values to go through; write {override.key_or_group}=a,b"
        )
    return values


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
            name, equals, value = override.partition("=")
            if not equals:
                break
            raise ConfigError(f"unknown override {name}{_hint(key, value, overrides)}") from cause
    text = getattr(cause, "override", None)
    named = f"override {text!r}" if text else "the overrides"
    raise ConfigError(
        f"cannot read {named}: {_first_line(cause)}; write key=value, a list as key=[a,b], and quote other text"
    ) from cause


def _hint(key: str, value: str, overrides: Sequence[str]) -> str:
    """Return what the user of an unknown key may have meant."""
    group, _, field = key.partition(".")
    if field == "path" and "from_file" in _choices(conf_dir() / group):
        return f"; {_from_file(group, value)}"
    known = _known(overrides)
    return nearest(key, known) or f"; there are {', '.join(k for k in known if '.' not in k)}"


def _from_file(group: str, path: str) -> str:
    return f"use {group}=from_file {group}.path={path}"


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
