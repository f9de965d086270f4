"""The configuration: what comes out of it, and what is said about what cannot go in."""

from __future__ import annotations

import dataclasses
import inspect
import re
import subprocess
import sys

import pytest
import torch
import yaml

from hybridpar.config import compose, conf_dir
from hybridpar.errors import ConfigError, HybridparError, PlanError
from hybridpar.optimizer_section import OPTIMIZER_OPTIONS, OptimizerConfig, ParameterGroup, ScheduleConfig
from hybridpar.planning.compression import Compression
from hybridpar.planning.plan import SHARDINGS, Plan, Recipe, Segment, Stage
from hybridpar.planning.request import Pin
from hybridpar.runtime.checks import check_config, check_fits
from hybridpar.runtime.optimizer import make_factory, make_rate, state_count
from hybridpar.sections import LossConfig


def test_the_defaults_are_plain_frozen_objects() -> None:
    config = compose()
    assert config.model.name == "vgg16"
    assert config.model.in_shape == (3, 224, 224)
    assert config.plan.pins == {}
    assert type(config.model.options) is dict
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.train.epochs = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    "path", sorted(conf_dir().glob("*/[!_]*.yaml")), ids=lambda p: f"{p.parent.name}={p.stem}"
)
def test_every_choice_composes(path) -> None:
    needed = {
        "model/custom": ["model.builder=a:b", "model.in_shape=[3]", "model.classes=2"],
        "model/torchvision": ["model.name=alexnet"],
        "data/custom": ["data.function=a:b"],
        "optimizer/custom": ["optimizer.name=NAdam"],
    }
    key = f"{path.parent.name}/{path.stem}"
    more = [f"{path.parent.name}.path=x.json"] if path.stem == "from_file" else needed.get(key, [])
    compose([f"{path.parent.name}={path.stem}", *more])


def test_overrides_reach_the_planner_as_pins() -> None:
    config = compose(
        [
            "plan=three_stage",
            "plan.tail.micro_batch=64",
            "plan.front.ranks=[0,1]",
            "optimizer.clip=1",
            "train.global_batch=256",
        ]
    )
    request = config.request()
    assert request.shape == "three_stage"
    assert request.global_batch == 256
    assert request.pins == {"tail": Pin(micro_batch=64), "front": Pin(ranks=(0, 1))}
    assert request.recipe == Recipe(clipping=True, sharding="none", optimizer_states=1)


def test_every_choice_of_the_search_can_be_made_by_the_user() -> None:
    request = compose().request()
    assert (request.replicas, request.effort, request.optimizer_shardings) == (None, "normal", ("none",))
    config = compose(
        [
            "plan.replicas=2",
            "plan.effort=quick",
            "plan.front.recompute=true",
            "plan.tail.recompute=false",
            "optimizer.sharding=auto",
        ]
    )
    request = config.request()
    assert (request.replicas, request.effort) == (2, "quick")
    assert request.pins == {"front": Pin(recompute=True), "tail": Pin(recompute=False)}
    assert request.optimizer_shardings == ("none", "zero1", "zero2")
    assert request.recipe.sharding == "none"
    assert compose(["optimizer.sharding=zero1"]).request().optimizer_shardings == ("zero1",)


@pytest.mark.parametrize("override", ["optimizer.clip=1", "train.precision=float64"])
def test_an_optimizer_sharding_left_to_the_planner_excludes_nothing(override: str) -> None:
    """What sharded state does not go with only takes that choice from the planner."""
    compose(["optimizer.sharding=auto", override]).request()


def test_state_that_is_not_of_elements_is_sharded_by_no_plan() -> None:
    custom = ["optimizer=custom", "optimizer.name=Adafactor"]
    assert compose([*custom, "optimizer.sharding=auto"]).request().optimizer_shardings == ("none",)
    for sharding in ("zero1", "zero2"):
        with pytest.raises(
            ConfigError, match=r"optimizer\.sharding: Adafactor updates .* set optimizer\.sharding=none"
        ):
            check_config(compose([*custom, f"optimizer.sharding={sharding}"]))


def test_adagrad_with_groups_is_sharded_by_no_plan() -> None:
    """DeepSpeed would make it anew without them: refused before ranks connect, and no choice of the planner."""
    adagrad = ["optimizer=custom", "optimizer.name=Adagrad", "optimizer.lr=0.1"]
    groups = 'optimizer.groups=[{match: "*.bias", weight_decay: 0}]'
    assert compose([*adagrad, "optimizer.sharding=auto"]).request().optimizer_shardings == SHARDINGS
    assert compose([*adagrad, groups, "optimizer.sharding=auto"]).request().optimizer_shardings == ("none",)
    check_config(compose([*adagrad, groups]))
    for sharding in ("zero1", "zero2"):
        check_config(compose([*adagrad, f"optimizer.sharding={sharding}"]))
        with pytest.raises(ConfigError, match=r"optimizer\.groups: \*\.bias, but .* set optimizer\.sharding=none"):
            check_config(compose([*adagrad, groups, f"optimizer.sharding={sharding}"]))


def test_offloaded_state_is_sharded_and_has_a_host() -> None:
    assert compose(["optimizer.sharding=zero2", "optimizer.offload=true"]).recipe().offload
    for sharding in ("none", "auto"):
        with pytest.raises(
            ConfigError, match=r"optimizer\.offload: True needs optimizer\.sharding=zero1 or zero2"
        ):
            compose(["optimizer.offload=true", f"optimizer.sharding={sharding}"])


def test_the_demo_overlay_replaces_groups_and_can_be_overridden() -> None:
    config = compose(["experiment=demo", "train.epochs=3", "optimizer=adamw"])
    assert (config.model.name, config.plan.shape, config.cluster["world"]) == ("small_vgg", "three_stage", 4)
    assert (config.train.epochs, config.optimizer.name) == (3, "AdamW")


def test_the_resolved_text_is_the_whole_configuration() -> None:
    data = yaml.safe_load(compose(["train.seed=5"]).resolved)
    assert data["train"]["seed"] == 5
    assert data.keys() >= {"model", "profile", "cluster", "plan", "data", "optimizer", "train", "monitor", "run"}


def test_options_take_any_key_and_their_owner_checks_it() -> None:
    config = compose(["optimizer.options.dampening=0.1", "model.options.extra=3"])
    assert config.optimizer.options["dampening"] == 0.1
    assert config.model.options["extra"] == 3
    with pytest.raises(
        ConfigError, match=r"optimizer.options.momentm: SGD has no such option; did you mean momentum\?"
    ):
        compose(["optimizer.options.momentm=0.9"])
    custom = compose(["optimizer=custom", "optimizer.name=NAdam", "optimizer.options.momentum_decai=0.1"])
    with pytest.raises(ConfigError, match=r"NAdam has no such option; did you mean momentum_decay\?"):
        make_factory(custom.optimizer)


def test_autocast_needs_parameters_in_float32() -> None:
    assert compose(["train.autocast=bfloat16"]).train.autocast == "bfloat16"
    with pytest.raises(ConfigError, match=r"train\.autocast: bfloat16 needs parameters in float32"):
        compose(["train.autocast=bfloat16", "train.precision=float64"])


def test_compression_becomes_part_of_the_recipe() -> None:
    assert compose().recipe().compression is None
    given = ["optimizer.compression=power_sgd", "optimizer.power_sgd.rank=2", "optimizer.power_sgd.warmup_steps=5"]
    assert compose(given).recipe().compression == Compression("power_sgd", 2, True, 5, 2.0)
    for override, message in (
        ("rank=0", "rank: 0 must be at least 1"),
        ("warmup_steps=-1", "warmup_steps: -1 must be 0 or more"),
        ("min_rate=0", "min_rate: 0.0 must be above 0"),
    ):
        with pytest.raises(ConfigError, match=rf"optimizer\.power_sgd\.{message}"):
            compose([f"optimizer.power_sgd.{override}"])


POWER = "optimizer.compression=power_sgd"


@pytest.mark.parametrize(
    ("planned", "given", "message"),
    [
        (
            (POWER, "optimizer.power_sgd.min_rate=1.5"),
            (POWER,),
            "power_sgd.min_rate: 2.0, but the plan is for 1.5",
        ),
        ((POWER, "optimizer.power_sgd.rank=2"), (POWER,), "power_sgd.rank: 4, but the plan is for 2"),
        (
            (POWER, "optimizer.power_sgd.error_feedback=false"),
            (POWER,),
            "power_sgd.error_feedback: True, but the plan is for False",
        ),
        ((POWER,), (), "compression: none, but the plan is for power_sgd"),
        ((), (POWER,), "compression: power_sgd, but the plan is for none"),
        (("optimizer.compression=bfloat16",), (POWER,), "compression: power_sgd, but the plan is for bfloat16"),
    ],
    ids=str,
)
def test_a_plan_of_another_compression_is_refused_by_the_setting_that_differs(
    planned: tuple[str, ...], given: tuple[str, ...], message: str
) -> None:
    """The remedy is an override: with it, and with no other one, the plan fits."""
    made = compose(planned)
    segment = Segment((0, 1), (0, 1))
    stages, batch = (Stage("front", 1, (segment,)),), made.train.global_batch
    plan = Plan("small", "", 2, batch, made.train.precision, stages, recipe=made.recipe())
    check_fits(made, plan)
    with pytest.raises(ConfigError, match=rf"optimizer\.{message}; set .*, or plan again") as error:
        check_fits(compose(given), plan)
    name, value = re.findall(r"set (\S+) to (\S+),", str(error.value))[0]
    check_fits(compose([*given, f"{name}={value}"]), plan)


def test_parameter_groups_from_overrides() -> None:
    config = compose(['optimizer.groups=[{match: "features.*", lr: 0.01, weight_decay: 0}]', "optimizer.clip=1"])
    (group,) = config.optimizer.parameter_groups
    assert group == ParameterGroup("features.*", {"lr": 0.01, "weight_decay": 0})
    assert group.has("features.0.weight")
    assert not group.has("classifier.0.weight")


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ("{lr: 1}", r"optimizer\.groups\[0\]\.match: None must be a pattern"),
        ("{match: a}", r"optimizer\.groups: a sets nothing"),
        ("{match: a, lr: -1}", r"optimizer\.groups\.lr: -1 of a must be a number of 0 or more"),
        ("{match: a, fused: true}", r"optimizer\.groups\.fused: of a is for all"),
        ("{match: a, momentum: 0}", r"optimizer\.groups\.momentum: 0 of a is on or off for all"),
        ("{match: a, momentun: 0.5}", r"SGD has no such option; did you mean momentum\?"),
    ],
)
def test_parameter_groups_that_cannot_be_are_refused(group: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose([f"optimizer.groups=[{group}]"])


def test_parameter_groups_are_tried() -> None:
    with pytest.raises(ConfigError, match=r"SGD\(lr=0.05, .*nesterov=True.*\) cannot be used"):
        make_factory(compose(["optimizer.groups=[{match: a, nesterov: true, dampening: 0.5}]"]).optimizer)
    with pytest.raises(ConfigError, match=r"optimizer\.lr: 0.* must be above 0 for a schedule"):
        compose(["optimizer.groups=[{match: a, lr: 1}]", "optimizer.lr=0"])


def test_the_loss_is_torchs_by_default_and_takes_lists_and_files() -> None:
    assert compose().loss == LossConfig()
    loss = compose(["loss.label_smoothing=0.1", "loss.class_weights=[1,2.5]", "loss.ignore_index=255"]).loss
    assert loss == LossConfig(0.1, (1.0, 2.5), 255)
    assert compose(["loss.class_weights=weights.json"]).loss.class_weights == "weights.json"
    with pytest.raises(ConfigError, match=r"loss\.label_smoothing: 1\.5 must lie in \[0, 1\)"):
        compose(["loss.label_smoothing=1.5"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.global_bach=64"], "unknown override train.global_bach; did you mean train.global_batch?"),
        (["global_batch=64"], "unknown override global_batch; did you mean train.global_batch?"),
        (["cluster.devce.memory_bytes=1"], "did you mean cluster.device.memory_bytes?"),
        (["modle=vgg16"], "unknown override modle; did you mean model?"),
        (["zebra=1"], "unknown override zebra; there are "),
        (["model=vgg17"], "unknown model=vgg17; did you mean vgg1"),
        (["cluster=a/b.yaml"], "cluster=from_file cluster.path=a/b.yaml"),
        (["experiment=dmo"], "unknown experiment=dmo; did you mean demo?"),
        (["cluster=from_file"], "cluster.path: missing"),
        (["plan=from_file"], "plan.path: missing"),
        (["model=custom"], "model.builder: missing"),
        (["model.x=[1"], "cannot read override 'model.x=[1'"),
        (["train.epochs"], "cannot read override 'train.epochs'"),
        (["train.epochs=1,2"], "Ambiguous value for argument 'train.epochs=1,2'"),
        (["train.epochs=many"], "train.epochs: expected int, got 'many'"),
        (["train.epochs=0"], "train.epochs: 0 must be at least 1"),
        (["train.epochs=${nothing}"], "train.epochs: "),
        (["+train.more=1"], "train.more: unknown field"),
        (["~train"], "train: expected a mapping"),
        (["hydra.run.dir=x"], "set run.dir"),
        (["format=xml"], "format: 'xml' is not one of 'text', 'json'"),
        (["model.in_shape=[3,0]"], "model.in_shape: [3, 0] must be positive"),
        (["data.workers=-1"], "data.workers is -1"),
        (["optimizer.lr=-1"], "optimizer.lr: -1.0 must be 0 or more"),
        (["optimizer.clip=0"], "optimizer.clip: 0.0 must be above 0"),
        (["optimizer.schedule.minimum=2"], "optimizer.schedule.minimum: 2.0 must lie in 0..1"),
        (["monitor.interval_s=0.01"], "monitor.interval_s: 0.01 is not in 0.12..3600"),
        (["monitor.max_bytes=1"], "monitor.max_bytes: 1 is below 65536"),
        (["plan.path=x.json"], "unknown override plan.path; use plan=from_file plan.path=x.json"),
        (["profile.path=x"], "unknown override profile.path; use profile=from_file profile.path=x"),
        (["+profile.path=x"], "profile.path: x is read by profile=from_file only; use profile=from_file"),
        (["cluster.path=x"], "unknown override cluster.path; use cluster=from_file cluster.path=x"),
        (["+cluster.path=x"], "cluster.path: x is read by cluster=from_file only; use cluster=from_file"),
        (
            ["optimizer.sharding=zero3"],
            "optimizer.sharding: 'zero3' is not one of 'none', 'zero1', 'zero2', 'auto'",
        ),
        (
            ["plan.global_batch_range=[8,16]", "explain=true"],
            "explain=true: of no effect with plan.global_batch_range",
        ),
        (
            ["plan.global_batch_range=[8,16]", "diff=a.json"],
            "diff=a.json: of no effect with plan.global_batch_range",
        ),
        (["profile=measured", "profile.budget_s=0"], "profile.budget_s: 0.0 must be above 0 seconds"),
    ],
    ids=lambda v: v[0] if isinstance(v, list) else "",
)
def test_a_mistake_is_named_in_one_line(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose(overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("plan.tail.micro_batch=0", "plan.tail: micro_batch: 0 is below 1"),
        ("plan.front.degree=-1", "plan.front: degree: -1 is below 1"),
        ("plan.tail.sharding=[column,rwo]", r"plan.tail.sharding\[1\]: 'rwo'"),
        ("plan.bucket_bytes=0", "plan: bucket_bytes: 0 is below 1"),
        ("+plan.path=x.json", "plan: path: x.json is read by plan=from_file only; use plan=from_file plan.path"),
        ("plan.replicas=0", "plan: replicas: 0 is below 1"),
        ("plan.effort=fast", "plan.effort: 'fast' is not one of 'quick', 'normal', 'long', 'exact'"),
        ("plan.front.recompute=maybe", "plan.front.recompute: expected bool, got 'maybe'"),
        ("plan.global_batch_range=[16,8]", r"global_batch_range: \[16, 8\] must be \[least,most\]"),
        ("plan.global_batch_range=[0,8]", r"global_batch_range: \[0, 8\] must be \[least,most\]"),
        ("plan.global_batch_range=[8]", "plan.global_batch_range: expected 2 values, got 1"),
        (
            "plan=from_file plan.path=a.json +plan.global_batch_range=[8,16]",
            "global_batch_range: a plan from a file has one global batch",
        ),
        (
            "optimizer.sharding=zero1 optimizer.compression=bfloat16",
            "recipe.compression: bfloat16 does not work with sharding=zero1, .* set optimizer.compression=none",
        ),
        ("optimizer.sharding=zero1 train.precision=float64", "set train.precision=float32 or optimizer.sharding"),
    ],
)
def test_what_no_plan_can_be_is_a_plan_error(override: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        compose(override.split())


@pytest.mark.parametrize(
    "override", ["format=json", "out=plan.json", "explain=true", r"plan.global_batch_range=[8, 16]"]
)
def test_what_only_a_plan_is_printed_with_is_refused_for_a_training(override: str) -> None:
    compose().refuse_for_training()
    with pytest.raises(ConfigError, match=rf"{re.escape(override)}: of no effect on a training.*hybridpar plan"):
        compose([override]).refuse_for_training()


def test_a_plan_from_a_file_is_no_request() -> None:
    with pytest.raises(PlanError, match=r"plan.json"):
        compose(["plan=from_file", "plan.path=plan.json"]).request()


def test_composing_needs_no_torch() -> None:
    code = (
        "import sys; from hybridpar.config import compose; compose().request(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# Optimizers that configuration names


@pytest.mark.parametrize(
    "config",
    [
        OptimizerConfig("SGD"),
        OptimizerConfig("SGD", options={"momentum": 0.9}),
        OptimizerConfig("Adam", options={"amsgrad": True}),
        OptimizerConfig("AdamW"),
        OptimizerConfig("RMSprop", options={"momentum": 0.9, "centered": True}),
        OptimizerConfig("NAdam"),
    ],
    ids=lambda c: f"{c.name}-{'-'.join(c.options)}",
)
def test_optimizer_states_are_counted_right(config: OptimizerConfig) -> None:
    parameter = torch.nn.Parameter(torch.zeros(4, 4))
    parameter.grad = torch.ones(4, 4)
    optimizer = make_factory(config)([parameter])
    optimizer.step()
    tensors = [v for v in optimizer.state[parameter].values() if isinstance(v, torch.Tensor) and v.numel() == 16]
    assert state_count(config) == len(tensors)
    assert config.state_count in {None, len(tensors)}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (OptimizerConfig("SDG"), "torch.optim has no SDG; did you mean SGD"),
        (OptimizerConfig("LBFGS"), "LBFGS.* cannot be used: .*closure"),
        (OptimizerConfig("SGD", options={"momentum": -1}), "Invalid momentum value: -1"),
        (OptimizerConfig("AdamW", options={"betas": 3}), "betas=3"),
    ],
    ids=lambda v: v.name if isinstance(v, OptimizerConfig) else "",
)
def test_an_optimizer_that_cannot_be_used_is_refused(config: OptimizerConfig, message: str) -> None:
    with pytest.raises(HybridparError, match=message):
        make_factory(config)


def test_learning_rates() -> None:
    constant = make_rate(2.0, ScheduleConfig(warmup_steps=4), 100)
    assert [constant(i) for i in (0, 1, 3, 4, 99)] == [0.5, 1.0, 2.0, 2.0, 2.0]
    cosine = make_rate(2.0, ScheduleConfig("cosine", warmup_steps=10, minimum=0.1), 110)
    assert [cosine(i) for i in (10, 60, 110, 200)] == pytest.approx([2.0, 1.1, 0.2, 0.2])
    step = make_rate(1.0, ScheduleConfig("step", milestones=(0.5, 0.75), factor=0.1), 100)
    assert [step(i) for i in (49, 50, 75)] == pytest.approx([1.0, 0.1, 0.01])


def test_a_warm_up_that_never_ends_is_refused() -> None:
    """A short training once stayed in the warm-up to its end, with a rate far below the one that was asked for."""
    make_rate(1.0, ScheduleConfig(warmup_steps=9), 10)
    with pytest.raises(ConfigError, match=r"warmup_steps: 10, but the training has 10 steps"):
        make_rate(1.0, ScheduleConfig(warmup_steps=10), 10)


@pytest.mark.parametrize("name", OPTIMIZER_OPTIONS)
def test_known_options_are_those_of_torch(name: str) -> None:
    arguments = set(inspect.signature(getattr(torch.optim, name)).parameters)
    assert set(OPTIMIZER_OPTIONS[name]) == arguments - {"params", "lr"}


@pytest.mark.parametrize(
    ("name", "options", "fused"),
    [
        ("SGD", {"momentum": 0.9}, True),
        ("Adam", {}, True),
        ("AdamW", {"weight_decay": 0.1}, True),
        ("AdamW", {"fused": False}, False),
        ("SGD", {"foreach": True}, None),
        ("RMSprop", {}, None),
    ],
)
def test_an_optimizer_is_fused_where_the_options_leave_it_open(
    name: str, options: dict[str, object], fused: bool | None
) -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    assert make_factory(OptimizerConfig(name, 0.1, options))([parameter]).defaults.get("fused") is fused
