"""What the planner chooses, what it refuses and why, and what becomes of a plan that somebody edited."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from hybridpar.cluster.describe import from_config
from hybridpar.cluster.topology import Cluster, Node
from hybridpar.config import compose
from hybridpar.errors import MemoryLimitError, PlanError, ProfileError
from hybridpar.model.build import build
from hybridpar.model.chain import Chain, Layer, Linear, Parameter
from hybridpar.model.deferred import defer
from hybridpar.model.trace import trace
from hybridpar.planning.bound import Bounds
from hybridpar.planning.check import check
from hybridpar.planning.compile import compile as compile_program
from hybridpar.planning.costs import Costs
from hybridpar.planning.draft import Drafting
from hybridpar.planning.explain import reason, verdicts
from hybridpar.planning.placement import placements
from hybridpar.planning.plan import Kind, Plan, Recipe, Stage, validate
from hybridpar.planning.request import BUCKET_BYTES, SHAPES, STAGES_OF, USUAL_BUCKET_BYTES, Pin, Request, Shape
from hybridpar.planning.resident import peak_per_rank
from hybridpar.planning.search import Planned, assess, search
from hybridpar.planning.simulate import predict, simulate
from hybridpar.profiling.analytic import estimate
from hybridpar.schema import to_data

BATCH = 48


@cache
def chain_of(model: str) -> Chain:
    """The chain of a configured model, traced on the meta device."""
    config = compose([f"model={model}"]).model
    builder = build(config.builder, config.options, classes=config.classes, in_shape=config.in_shape)
    return trace(defer(builder).module, config.in_shape, config.name).chain


@cache
def preset(name: str) -> Cluster:
    return from_config(compose([f"cluster={name}"]).cluster)


FOUR = preset("p100_4x1_40g")
CHAIN = chain_of("small_vgg")


def plan_for(
    shape: Shape = "auto", *, cluster: Cluster = FOUR, model: str = "small_vgg", **fields: Any
) -> Planned:
    chain = chain_of(model)
    request = Request(**{"global_batch": BATCH, "shape": shape, **fields})
    return search(chain, estimate(chain, cluster.device), cluster, request)


@cache
def planned(shape: Shape, model: str = "small_vgg") -> Planned:
    return plan_for(shape, model=model)


def small(nodes: int) -> Cluster:
    return replace(FOUR, nodes=(Node(1),) * nodes)


def with_memory(cluster: Cluster, size_bytes: float) -> Cluster:
    return replace(cluster, device=replace(cluster.device, memory_bytes=size_bytes))


def get(plan: Plan, kind: str) -> Stage:
    stage = plan.stage(kind)  # type: ignore[arg-type]
    assert stage is not None
    return stage


# Shapes


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_has_its_stages(shape: Shape) -> None:
    result = planned(shape)
    assert result.shape == shape
    assert tuple(s.kind for s in result.plan.stages) == STAGES_OF[shape]
    assert [c.shape for c in result.candidates] == list(SHAPES)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_plan_compiles_checks_and_is_predicted_truly(shape: Shape) -> None:
    plan = planned(shape).plan
    validate(plan, CHAIN)
    program = compile_program(plan, CHAIN, BATCH, "train")
    check(program)
    costs = Costs(estimate(CHAIN, FOUR.device), FOUR)
    assert plan.prediction == predict(program, costs)
    assert plan.prediction is not None
    assert plan.prediction.step_s == simulate(program, costs).period_s >= Bounds(CHAIN, costs).of(plan)
    assert plan.prediction.memory_bytes == peak_per_rank(program, costs.workspaces)
    assert {r for s in plan.stages for r in s.ranks} == set(range(4))


@pytest.mark.parametrize("model", ["small_vgg", "alexnet"])
def test_three_stages_are_parallel_each_in_its_way(model: str) -> None:
    plan = next(c.plan for c in planned("auto", model).candidates if c.shape == "three_stage")
    assert plan is not None
    assert [s.degree >= 2 for s in plan.stages] == [True] * 3
    tail = get(plan, "tail")
    assert len(tail.sharding) == sum(bool(x.linear) for x in chain_of(model).layers[slice(*tail.layers)])
    for segment in get(plan, "middle").segments:
        assert any(x.parameters for x in chain_of(model).layers[slice(*segment.layers)])


@pytest.mark.parametrize("nodes", [1, 2, 3, 5])
def test_three_stages_fit_on_any_number_of_ranks(nodes: int) -> None:
    plan = plan_for("three_stage", cluster=small(nodes)).plan
    assert plan.world == nodes
    assert [s.degree >= min(2, nodes) for s in plan.stages] == [True] * 3


@pytest.mark.parametrize("model", ["small_vgg", "alexnet"])
def test_auto_takes_the_fastest_shape(model: str) -> None:
    result = planned("auto", model)
    times = {c.shape: c.prediction.step_s for c in result.candidates if c.plan}
    assert times.keys() == set(SHAPES)
    assert times[result.shape] == pytest.approx(min(times.values()), rel=1e-9)
    assert result.plan == result.chosen.plan
    assert verdicts(result)[SHAPES.index(result.shape)] == "chosen"  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_shapes_that_auto_compares_are_those_that_can_be_asked_for(shape: Shape) -> None:
    assert planned(shape).chosen == planned("auto").candidates[SHAPES.index(shape)]


def test_one_rank_needs_no_stages() -> None:
    """Equally fast shapes once were told apart by rounding."""
    assert plan_for(cluster=small(1)).shape == "data_parallel"


def test_the_reason_names_winner_and_runner_up() -> None:
    for shape in ("auto", *SHAPES):
        result = planned(shape)  # type: ignore[arg-type]
        text = reason(result)
        assert result.shape in text
        assert re.search(r"is \d+\.\d\dx as fast as", text)


def test_two_equal_calls_give_equal_plans() -> None:
    assert plan_for("three_stage") == plan_for("three_stage")


def test_the_inputs_are_left_as_they_are() -> None:
    request = Request(BATCH, "front_tail", pins={"tail": Pin(micro_batch=8)})
    before = copy.deepcopy((request, FOUR))
    search(CHAIN, estimate(CHAIN, FOUR.device), FOUR, request)
    assert (request, FOUR) == before


def test_a_profile_of_another_model_is_refused() -> None:
    with pytest.raises(ProfileError, match="was made for chain"):
        search(CHAIN, estimate(chain_of("alexnet"), FOUR.device), FOUR, Request(BATCH))


# Pins


PINS: list[tuple[Shape, dict[str, Pin]]] = [
    ("three_stage", {"front": Pin(micro_batch=3), "middle": Pin(micro_batch=5), "tail": Pin(micro_batch=7)}),
    ("three_stage", {"front": Pin(ranks=(0, 1)), "middle": Pin(ranks=(2, 3)), "tail": Pin(ranks=(1, 0))}),
    ("three_stage", {"front": Pin(degree=3), "middle": Pin(degree=3), "tail": Pin(degree=2)}),
    ("three_stage", {"middle": Pin(ranks=(3, 2, 1, 0), degree=2)}),
    ("three_stage", {"front": Pin(layers=(0, 6)), "middle": Pin(layers=(6, 14))}),
    ("three_stage", {"middle": Pin(layers=(4, 17)), "tail": Pin(layers=(17, 24))}),
    ("three_stage", {"tail": Pin(layers=(17, 24), sharding=("row", "column", "row"))}),
    ("three_stage", {"tail": Pin(degree=1), "middle": Pin(degree=1)}),
    ("three_stage", {"front": Pin(in_flight=48), "middle": Pin(in_flight=48)}),
    ("three_stage", {"front": Pin(shares=(1.0, 2.0)), "tail": Pin(shares=(3.0, 1.0))}),
    ("data_parallel", {"front": Pin(ranks=(3, 1, 0, 2), shares=(1.0, 1.0, 2.0, 2.0), micro_batch=4)}),
    ("pipeline", {"middle": Pin(degree=4, micro_batch=6, in_flight=48)}),
    ("front_tail", {"front": Pin(degree=2), "tail": Pin(micro_batch=48, degree=4)}),
    ("auto", {"tail": Pin(micro_batch=9)}),
    ("auto", {"middle": Pin(degree=4)}),
    ("auto", {"front": Pin(micro_batch=2), "tail": Pin(degree=3)}),
]


@pytest.mark.parametrize(("shape", "pins"), PINS, ids=lambda v: v if isinstance(v, str) else "-".join(v))
def test_pins_are_respected(shape: Shape, pins: dict[str, Pin]) -> None:
    plan = plan_for(shape, pins=pins).plan
    for kind, pin in pins.items():
        stage = get(plan, kind)
        ranks = tuple(r for s in stage.segments for r in s.ranks)
        seen = {
            "layers": stage.layers,
            "degree": stage.degree,
            "ranks": ranks,
            "micro_batch": stage.micro_batch,
            "shares": stage.segments[0].shares,
            "sharding": stage.sharding,
            "in_flight": stage.in_flight,
        }
        for name, value in vars(pin).items():
            assert value is None or seen[name] == value, name


def test_the_rest_of_the_request_is_respected() -> None:
    recipe = Recipe(clipping=True, optimizer_states=2)
    fields: dict[str, Any] = {"order": "fill_drain", "bucket_bytes": 1 << 12, "precision": "float64"}
    plan = plan_for("front_tail", recipe=recipe, **fields).plan
    assert (plan.recipe, plan.order, plan.bucket_bytes, plan.precision) == (recipe, *fields.values())
    assert plan.global_batch == BATCH


def test_buckets_grow_where_every_message_is_dear_and_shrink_where_the_last_one_shows() -> None:
    """A pinned size stays; a free one is no slower than the usual one."""

    def chosen(latency_s: float, **fields: Any) -> Plan:
        link = replace(FOUR.links["rack"], latency_s=latency_s)
        dear = replace(FOUR, links={"node": link, "rack": link})
        return plan_for("data_parallel", model="vgg16", cluster=dear, **fields).plan

    for latency_s, larger in ((0.05, True), (0.0, False)):
        free, usual = chosen(latency_s), chosen(latency_s, bucket_bytes=USUAL_BUCKET_BYTES)
        assert usual.bucket_bytes == USUAL_BUCKET_BYTES
        assert (free.bucket_bytes > USUAL_BUCKET_BYTES) is larger
        assert free.prediction is not None
        assert usual.prediction is not None
        assert free.prediction.step_s < usual.prediction.step_s


def test_without_gradients_to_reduce_no_bucket_is_tried() -> None:
    request = Request(BATCH)
    drafting = Drafting(CHAIN, estimate(CHAIN, FOUR.device), FOUR, request)
    for shape in SHAPES:
        for placement in placements(STAGES_OF[shape], FOUR, request):
            reduced = any(
                len(ranks) > 1
                for kind, groups in zip(placement.kinds, placement.groups, strict=True)
                for ranks in groups
                if kind != "tail"
            )
            several = reduced or placement.replicas > 1
            assert drafting.buckets(placement) == (BUCKET_BYTES if several else (None,))


@pytest.mark.parametrize("batch", [12, 48, 96])
def test_stages_can_have_distinct_micro_batches(batch: int) -> None:
    plan = plan_for("three_stage", distinct=True, global_batch=batch).plan
    assert len({s.micro_batch for s in plan.stages}) == 3


IMPOSSIBLE: list[tuple[Shape, dict[str, Pin], str]] = [
    ("three_stage", {"front": Pin(degree=5)}, "plan.front.degree: 5 is above the 4 ranks"),
    (
        "data_parallel",
        {"front": Pin(degree=2)},
        "plan.front.degree: 2 leaves 2 of the cluster's 4 ranks without work",
    ),
    ("pipeline", {"middle": Pin(degree=3)}, "plan.middle.degree: 3 segments cannot share"),
    ("front_tail", {"front": Pin(ranks=(0, 1, 2, 3), degree=2)}, "plan.front.degree: 2 is not the number of"),
    ("three_stage", {"middle": Pin(ranks=(0, 1, 2), degree=2)}, "plan.middle.degree: 2 does not divide the 3"),
    ("three_stage", {"front": Pin(ranks=(0, 4))}, "plan.front.ranks: [0, 4] must lie in 0..3"),
    ("three_stage", {"front": Pin(ranks=())}, "plan.front.ranks: []"),
    ("three_stage", {"front": Pin(ranks=(1, 1))}, "plan.front.ranks: [1, 1] names a rank twice"),
    ("data_parallel", {"front": Pin(micro_batch=13)}, "plan.front.micro_batch: 13 is above the 12 samples"),
    ("three_stage", {"tail": Pin(micro_batch=49)}, "plan.tail.micro_batch: 49 is above the 48 samples"),
    ("data_parallel", {"front": Pin(layers=(0, 5))}, "plan.front.layers: [0, 5] must end at 24"),
    ("three_stage", {"front": Pin(layers=(1, 5))}, "plan.front.layers: [1, 5] must start at 0"),
    ("three_stage", {"tail": Pin(layers=(13, 20))}, "plan.tail.layers: [13, 20] must end at 24"),
    ("three_stage", {"tail": Pin(layers=(5, 24))}, "plan.tail.layers: [5, 24] must start at layer 13 or later"),
    ("three_stage", {"front": Pin(layers=(0, 30))}, "plan.front.layers: [0, 30] is no run of layers of small_vgg"),
    ("three_stage", {"front": Pin(layers=(4, 4))}, "plan.front.layers: [4, 4] is no run of layers"),
    (
        "three_stage",
        {"front": Pin(layers=(0, 6)), "middle": Pin(layers=(5, 13))},
        "plan.middle.layers: [5, 13] must start at 6, as plan.front.layers does",
    ),
    ("three_stage", {"middle": Pin(layers=(0, 13))}, "plan.middle.layers: [0, 13] leaves no layer"),
    ("three_stage", {"middle": Pin(shares=(1.0, 2.0))}, "plan.middle.shares: [1.0, 2.0] cannot be pinned"),
    ("three_stage", {"front": Pin(shares=(1.0, -1.0))}, "plan.front.shares: (1.0, -1.0) must be 2 positive"),
    ("three_stage", {"front": Pin(sharding=("row",))}, "plan.front.sharding: ['row'] belongs to the tail"),
    ("three_stage", {"tail": Pin(sharding=("row",) * 4)}, "plan.tail.sharding: "),
    ("three_stage", {"front": Pin(in_flight=0)}, "plan.front.in_flight: 0 is below 1"),
    ("three_stage", {"front": Pin(in_flight=1)}, "plan.front.in_flight: 1 samples are fewer than the next stage"),
    ("pipeline", {"front": Pin(degree=2)}, "plan.front: shape pipeline has no front"),
    ("auto", {"tail": Pin(degree=9)}, "front_tail: plan.tail.degree: 9 is above the 4 ranks"),
]


@pytest.mark.parametrize(("shape", "pins", "message"), IMPOSSIBLE, ids=[m for _, _, m in IMPOSSIBLE])
def test_impossible_pins_are_named(shape: Shape, pins: dict[str, Pin], message: str) -> None:
    with pytest.raises(PlanError) as caught:
        plan_for(shape, pins=pins)
    assert message in str(caught.value)
    assert not isinstance(caught.value, MemoryLimitError)


def test_too_few_samples_for_distinct_micro_batches() -> None:
    with pytest.raises(PlanError, match=r"micro-batches .* are not distinct"):
        plan_for("three_stage", distinct=True, global_batch=2)


@pytest.mark.parametrize(("field", "value"), [("micro_batch", 0), ("degree", -1)])
def test_a_pin_below_one_is_refused_at_once(field: str, value: int) -> None:
    with pytest.raises(PlanError, match=f"{field}: {value} is below 1"):
        Pin(**{field: value})


def test_a_global_batch_below_one_is_refused() -> None:
    with pytest.raises(PlanError, match=r"train\.global_batch: 0 is below 1"):
        Request(0)


@pytest.mark.parametrize("batch", [1, 3])
def test_fewer_samples_than_ranks_leave_ranks_idle(batch: int) -> None:
    for shape in SHAPES:
        check(compile_program(plan_for(shape, global_batch=batch).plan, CHAIN, batch, "train"))


# Models


@pytest.mark.parametrize("model", ["alexnet", "vgg16", "resnet18"])
def test_real_models_plan_on_the_talk_s_cluster(model: str) -> None:
    result = planned("auto", model)
    assert {c.shape for c in result.candidates if c.plan} == set(SHAPES)
    assert result.plan.model == model
    if model != "resnet18":
        # Nearly all parameters are in the linear layers, which data parallelism sends around.
        assert result.shape in {"front_tail", "three_stage"}


def convolutions(count: int) -> Chain:
    def layer(i: int) -> Layer:
        weight = Parameter(f"c{i}.weight", (4, 4, 3, 3))
        return Layer(f"c{i}", "Conv2d", (4, 8, 8), (4, 8, 8), 18432, (weight,), saves_input=True)

    return Chain("convolutions", tuple(layer(i) for i in range(count)))


def test_a_chain_without_linear_tail_says_so() -> None:
    chain = convolutions(6)
    profile = estimate(chain, FOUR.device)
    result = search(chain, profile, FOUR, Request(8))
    reasons = {c.shape: c.reason for c in result.candidates}
    assert reasons["data_parallel"] is reasons["pipeline"] is None
    assert reasons["three_stage"] == reasons["front_tail"]
    assert "does not end in linear layers" in str(reasons["front_tail"])
    assert any("does not end in linear layers" in v for v in verdicts(result))
    with pytest.raises(
        PlanError, match="no plan is possible: three_stage: the model does not end in linear layers"
    ):
        search(chain, profile, FOUR, Request(8, "three_stage"))


def test_a_middle_takes_linear_layers_where_it_needs_them() -> None:
    """Starting the tail as early as possible once left too little for two segments, and no plan."""
    convolution, *_ = convolutions(1).layers
    flat = Layer("flat", "Flatten", (4, 8, 8), (256,), 0, aliases_input=True, channelwise=True)
    linears = []
    for i, inputs in enumerate((256, 16, 16)):
        weight = Parameter(f"fc{i}.weight", (16, inputs))
        linears.append(
            Layer(
                f"fc{i}", "Linear", (inputs,), (16,), 32 * inputs, (weight,), linear=Linear(inputs, 16, bias=False)
            )
        )
    chain = Chain("shallow", (convolution, flat, *linears))
    plan = search(chain, estimate(chain, FOUR.device), FOUR, Request(8, "three_stage")).plan
    assert [s.layers for s in plan.stages] == [(0, 2), (2, 4), (4, 5)]


def test_a_chain_with_fewer_layers_than_stages_says_so() -> None:
    weight = Parameter("fc.weight", (4, 4))
    fc = Layer("fc", "Linear", (4,), (4,), 32, (weight,), linear=Linear(4, 4, bias=False))
    chain = Chain("one", (fc,))
    profile = estimate(chain, FOUR.device)
    assert search(chain, profile, FOUR, Request(8)).shape == "data_parallel"
    with pytest.raises(PlanError, match="three_stage: no placement on 4 ranks gives each stage a layer"):
        search(chain, profile, FOUR, Request(8, "three_stage"))


# Memory


def test_plans_stay_within_memory() -> None:
    free = max(planned("auto").chosen.prediction.memory_bytes)
    able = set()
    for share in (1.0, 0.8, 0.6):
        for candidate in plan_for(cluster=with_memory(FOUR, share * free)).candidates:
            if candidate.plan is None:
                assert re.match(r"rank \d needs .* more than the .* of P100", str(candidate.reason))
            else:
                able.add((candidate.shape, share))
                assert max(candidate.prediction.memory_bytes) <= share * free
    assert len(able) >= 4


def heavy_inputs() -> Chain:
    """A megabyte per sample enters, and hardly anything else needs memory."""

    def weighted(name: str, linear: Linear | None) -> Layer:
        weight = Parameter(f"{name}.weight", (8, 8))
        return Layer(name, "Linear", (8,), (8,), 128, (weight,), saves_input=True, linear=linear)

    crop = Layer("crop", "Crop", (2**18,), (8,), 8)
    mixing = (weighted(f"mix{i}", None) for i in range(4))
    tail = (weighted(f"fc{i}", Linear(8, 8, bias=False)) for i in range(3))
    return Chain("heavy", (crop, *mixing, *tail))


@pytest.mark.parametrize(
    ("shape", "pins", "limit_mib"),
    [
        ("auto", {}, 1.5),
        ("data_parallel", {}, 3.0),
        ("pipeline", {}, 1.5),
        ("three_stage", {}, 3.0),
        ("pipeline", {"middle": Pin(micro_batch=8)}, 3.0),
        ("front_tail", {"tail": Pin(micro_batch=2)}, 3.0),
        ("three_stage", {"tail": Pin(micro_batch=16, in_flight=16)}, 1.5),
    ],
    ids=["auto", "data_parallel", "pipeline", "three_stage", "pipeline-8", "front_tail-2", "three_stage-16"],
)
def test_what_is_said_to_fit_fits(shape: Shape, pins: dict[Kind, Pin], limit_mib: float) -> None:
    """A refusal names a rank, its excess, and the largest half, quarter, ... of the batch that really plans."""
    chain, cluster = heavy_inputs(), with_memory(FOUR, limit_mib * 2**20)
    profile = estimate(chain, cluster.device)
    request = Request(16, shape, pins=pins)
    with pytest.raises(MemoryLimitError) as caught:
        search(chain, profile, cluster, request)
    text = str(caught.value)
    found = re.search(r"rank \d needs ([\d.]+) MiB, ([\d.]+) MiB more than the ([\d.]+) MiB of P100", text)
    assert found
    needs, excess, has = map(float, found.groups())
    assert (needs, has) == (pytest.approx(has + excess, abs=0.11), limit_mib)
    advice = re.search(r"train\.global_batch=(\d+)( with no micro_batch and in_flight pinned)? would fit", text)
    assert advice
    freed: dict[Kind, Pin] = {k: replace(p, micro_batch=None, in_flight=None) for k, p in pins.items()}
    advised = replace(request, global_batch=int(advice[1]), pins=freed if advice[2] else pins)
    lean = search(chain, profile, cluster, advised)
    assert max(lean.chosen.prediction.memory_bytes) <= limit_mib * 2**20
    with pytest.raises(MemoryLimitError):
        search(chain, profile, cluster, replace(advised, global_batch=2 * advised.global_batch))


def test_where_nothing_helps_nothing_is_promised() -> None:
    with pytest.raises(MemoryLimitError, match="even a global batch of 1 does not fit; or use devices with more"):
        plan_for("data_parallel", cluster=with_memory(FOUR, 1e5))


def test_a_pin_that_takes_the_memory_is_named() -> None:
    """The advice once was a batch below the pinned micro-batch, which is refused."""
    cluster = with_memory(FOUR, 8e5)
    with pytest.raises(
        MemoryLimitError, match=r"global_batch=48 with no micro_batch and in_flight pinned would fit"
    ):
        plan_for("pipeline", cluster=cluster, pins={"middle": Pin(micro_batch=48)})
    assert plan_for("pipeline", cluster=cluster).shape == "pipeline"


def test_a_plan_that_fits_with_small_micro_batches_only_is_found() -> None:
    """The search once gave up on its way from middling micro-batches to those."""
    plan = plan_for("three_stage", cluster=with_memory(FOUR, 1e6)).plan
    assert plan.prediction is not None
    assert max(plan.prediction.memory_bytes) <= 1e6


# Assessment of a given plan


def test_assessing_gives_the_prediction_of_the_search() -> None:
    plan = planned("three_stage").plan
    bare = replace(plan, prediction=None)
    assert assess(bare, CHAIN, estimate(CHAIN, FOUR.device), FOUR) == plan


def test_assessing_on_too_few_devices() -> None:
    plan = planned("three_stage").plan
    with pytest.raises(PlanError, match=r"needs 4 ranks but cluster p100_4x1_40g has 3 devices"):
        assess(plan, CHAIN, estimate(CHAIN, FOUR.device), small(3))


def test_assessing_on_devices_with_too_little_memory() -> None:
    plan = planned("three_stage").plan
    assert plan.prediction is not None
    peaks = plan.prediction.memory_bytes
    worst = peaks.index(max(peaks))
    less = with_memory(FOUR, max(peaks) - 2**20)
    with pytest.raises(MemoryLimitError, match=rf"rank {worst} needs .* MiB, 1\.0 MiB more than .* of P100"):
        assess(plan, CHAIN, estimate(CHAIN, FOUR.device), less)


def test_assessing_a_plan_of_another_model() -> None:
    other = chain_of("alexnet")
    with pytest.raises(PlanError, match=r"plan\.chain: .* belongs to another model"):
        assess(planned("three_stage").plan, other, estimate(other, FOUR.device), FOUR)


def test_a_bigger_cluster_may_run_a_smaller_plan() -> None:
    plan = planned("pipeline").plan
    larger = replace(FOUR, nodes=(Node(1),) * 6)
    assert assess(plan, CHAIN, estimate(CHAIN, larger.device), larger) == plan


# The plan as JSON


@pytest.mark.parametrize("shape", SHAPES)
def test_a_plan_survives_its_file(shape: Shape, tmp_path: Path) -> None:
    plan = planned(shape).plan
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json", CHAIN) == plan
    assert Plan.from_data(json.loads(plan.to_json()), CHAIN) == plan


DELETE = object()
EDITS: list[tuple[str, Any, str]] = [
    ("schema", 2, "plan.schema: 2 must be 1"),
    ("chain", "0123456789abcdef", "plan.chain"),
    ("chain", 5, "plan.chain"),
    ("model", None, "plan.model"),
    ("model", DELETE, "plan.model: missing"),
    ("world", 5, "[4] are ranks without any stage"),
    ("world", 3, "plan.middle.segments[1].ranks: [2, 3] must lie in 0..2"),
    ("world", 0, "plan.world: 0"),
    ("world", "4", "plan.world: expected int"),
    ("world", True, "plan.world: expected int"),
    ("global_batch", 0, "plan.global_batch: 0"),
    ("global_batch", 4.0, "plan.global_batch: expected int"),
    ("global_batch", 10, "plan.front.micro_batch"),
    ("precision", "float16", "plan.precision"),
    ("order", "eager", "plan.order"),
    ("bucket_bytes", 0, "plan.bucket_bytes: 0"),
    ("recipe.clipping", 1, "plan.recipe.clipping: expected bool"),
    ("recipe.sharding", "zero3", "plan.recipe.sharding"),
    ("recipe.optimizer_states", 1.5, "plan.recipe.optimizer_states: expected int"),
    ("recipe.momentum", 0.9, "plan.recipe.momentum: unknown field"),
    ("prediction.step_s", "fast", "plan.prediction.step_s: expected float"),
    ("stages", [], "plan.stages"),
    ("stages", {}, "plan.stages: expected a list"),
    ("stages.0.kind", "head", "plan.stages[0].kind"),
    ("stages.0.kind", "tail", "plan.stages"),
    ("stages.0", DELETE, "plan.middle.segments[0].layers: "),
    ("stages.2", DELETE, "plan.stages: 23 must end at layer 24"),
    ("stages.0.micro_batch", 0, "plan.front.micro_batch: 0"),
    ("stages.0.micro_batch", 25, "plan.front.micro_batch: 25 is above the 24"),
    ("stages.1.micro_batch", 49, "plan.middle.segments[0].micro_batch: 49"),
    ("stages.2.micro_batch", 49, "plan.tail.micro_batch: 49 is above the 48"),
    ("stages.2.micro_batch", None, "plan.stages[2].micro_batch: expected int"),
    ("stages.0.in_flight", 0, "plan.front.in_flight: 0"),
    ("stages.0.colour", "red", "plan.stages[0].colour: unknown field"),
    ("stages.0.sharding", ["row"], "plan.front.sharding"),
    ("stages.2.sharding", [], "plan.tail.sharding"),
    ("stages.2.sharding", ["diagonal"], "plan.stages[2].sharding[0]: 'diagonal'"),
    ("stages.0.segments", [], "plan.front.segments"),
    ("stages.0.segments.0.layers", [0, 11], "plan.middle.segments[0].layers"),
    ("stages.0.segments.0.layers", [1, 10], "plan.front.segments[0].layers"),
    ("stages.0.segments.0.layers", [0], "plan.stages[0].segments[0].layers: expected 2 values"),
    ("stages.0.segments.0.layers.1", 0, "plan.front.segments[0].layers"),
    ("stages.2.segments.0.layers.1", 25, "plan.stages: 25 must end at layer 24"),
    ("stages.0.segments.0.ranks", [], "plan.front.ranks"),
    ("stages.0.segments.0.ranks", [0, 0], "plan.front.ranks: [0, 0] names a rank twice"),
    ("stages.0.segments.0.ranks", [0, 9], "plan.front.ranks: [0, 9] must lie in 0..3"),
    ("stages.0.segments.0.ranks", [-1, 0], "plan.front.ranks"),
    ("stages.0.segments.0.ranks.0", "a", "plan.stages[0].segments[0].ranks[0]: expected int"),
    ("stages.0.segments.0.shares", [1.0], "plan.front.shares"),
    ("stages.0.segments.0.shares", [1.0, 0.0], "plan.front.shares"),
    ("stages.0.segments.0.shares", [1.0, float("nan")], "plan.front.shares"),
    ("stages.1.segments.1.ranks", [7], "plan.middle.segments[1].ranks: [7]"),
    ("stages.1.segments.1.shares", [-1.0, 1.0], "plan.middle.segments[1].shares"),
    ("stages.2.segments.0.ranks", [3], "plan.tail.sharding"),
]


@pytest.mark.parametrize(("field", "value", "message"), EDITS, ids=[f"{f}={str(v)[:20]}" for f, v, _ in EDITS])
def test_an_edited_plan_is_refused_by_the_field(field: str, value: Any, message: str) -> None:
    data = json.loads(planned("three_stage").plan.to_json())
    *path, last = (int(p) if p.isdecimal() else p for p in field.split("."))
    holder = data
    for step in path:
        holder = holder[step]
    if value is DELETE:
        del holder[last]
    else:
        holder[last] = value
    with pytest.raises(PlanError) as caught:
        Plan.from_data(data, CHAIN)
    assert message in str(caught.value)


def test_an_unedited_plan_is_the_one_that_the_edits_start_from() -> None:
    """The messages above depend on it."""
    plan = planned("three_stage").plan
    assert [(s.kind, s.layers, s.degree) for s in plan.stages] == [
        ("front", (0, 10), 2),
        ("middle", (10, 23), 2),
        ("tail", (23, 24), 2),
    ]
    Plan.from_data(to_data(plan), CHAIN)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"plan"', "{}"])
def test_a_file_that_is_no_plan_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(PlanError, match=r"plan\.json"):
        Plan.load(path, CHAIN)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"cannot read .*nothing\.json: No such file"):
        Plan.load(tmp_path / "nothing.json", CHAIN)
