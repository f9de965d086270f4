"""Random small planning problems, each with a few free dimensions of the space and all others fixed."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations, count, islice

from hybridpar.cluster.topology import Cluster, Device, Link, Node
from hybridpar.model.chain import Chain, Layer, Linear, Parameter
from hybridpar.planning.plan import KINDS, Kind, Plan, Recipe, Stage
from hybridpar.planning.request import SHAPES, STAGES_OF, Effort, Pin, Request, Space
from hybridpar.profiling.record import LayerProfile, Profile
from tests.support.enumerate import Groups, Question, plans

DIMENSIONS = (
    "cuts",
    "micro_batches",
    "placements",
    "segments",
    "replicas",
    "in_flight",
    "orders",
    "sharding",
    "recompute",
    "optimizer_sharding",
    "buckets",
)
PAIRS = tuple(combinations(DIMENSIONS, 2))
MOST_DIMENSIONS = 4
MOST_PLANS = 600
"""Over all shapes of an instance."""
PATIENCE = 25
MOST_LAYERS, MOST_RANKS = 6, 4
MOST_OF_MANY = 2
"""Segments, on the most ranks, where ranks of a tail are free too."""
Dice = random.Random


@dataclass(frozen=True)
class Instance:
    """The same problem as the enumerator and as the search are asked it."""

    seed: int
    free: frozenset[str]
    """Dimensions with several values."""
    question: Question
    space: Space
    pins: dict[Kind, Pin]

    def request(self, effort: Effort = "exact") -> Request:
        """The request for the planner."""
        recipe = Recipe(clipping=self.question.clipping)
        return Request(self.question.global_batch, recipe=recipe, pins=self.pins, space=self.space, effort=effort)


def dimensions(seed: int) -> frozenset[str]:
    """The dimensions to be free in a seed's instance: its pair, and by chance one or two more."""
    dice = Dice(seed)
    free = _whole(set(pair(seed)))
    wanted = dice.randint(len(free), MOST_DIMENSIONS)
    for more in dice.sample(DIMENSIONS, len(DIMENSIONS)):
        larger = _whole(free | {more})
        free = larger if len(larger) <= wanted else free
    return free


def _whole(free: set[str] | frozenset[str]) -> frozenset[str]:
    """Replicas need rank sets that are free too, as pinned ranks mean a single one."""
    return frozenset(free | {"placements"} if "replicas" in free else free)


def pair(seed: int) -> tuple[str, str]:
    """The two dimensions that are free in a seed's instance whatever else is."""
    return PAIRS[seed % len(PAIRS)]


def instance(seed: int, most_plans: int = MOST_PLANS) -> Instance:
    """The instance of a seed.

    Problems are drawn anew whose space is too large, whose pins no plan respects, or in which a free dimension has
    one value only. After some draws in vain only the seed's pair is free, and the space may be larger.
    """
    for attempt in count():
        in_vain = attempt >= PATIENCE
        free = _whole(set(pair(seed))) if in_vain else dimensions(seed)
        most = most_plans * (4 if in_vain else 1)
        drawn = _draw(seed, free, Dice(f"{seed} {attempt}"))
        every = (plan for shape in SHAPES[::-1] for plan in plans(drawn.question, STAGES_OF[shape]))
        first = list(islice(every, most + 1))
        if len(first) > most or not all(len(_values(first, name)) > 1 for name in free):
            continue
        if not drawn.pins or len(first[0].stages) == len(KINDS):
            return drawn
    raise AssertionError


def _values(every: list[Plan], dimension: str) -> set[object]:
    """Return what plans have chosen in a dimension."""
    of_stage: dict[str, Callable[[Stage], object]] = {
        "cuts": lambda s: tuple(x.layers for x in s.segments),
        "micro_batches": lambda s: s.micro_batch,
        "placements": lambda s: tuple(x.ranks for x in s.segments),
        "segments": lambda s: len(s.segments),
        "in_flight": lambda s: s.in_flight,
        "sharding": lambda s: s.sharding[:1],
        "recompute": lambda s: s.recompute,
    }
    of_plan: dict[str, Callable[[Plan], object]] = {
        "replicas": lambda p: p.replicas,
        "orders": lambda p: p.order,
        "optimizer_sharding": lambda p: p.recipe.sharding,
        "buckets": lambda p: p.bucket_bytes,
    }
    if dimension in of_plan:
        return {of_plan[dimension](plan) for plan in every}
    return {of_stage[dimension](stage) for plan in every for stage in plan.stages if stage.kind != "front"}


def _draw(seed: int, free: frozenset[str], dice: Dice) -> Instance:
    nodes = dice.choice(((2,), (3,), (4,), (1, 1), (2, 2), (1, 1, 1), (1, 2)))
    batch = dice.randint(3, 12)
    pinned = "placements" not in free
    segments = (
        dice.choice(((2, 3), (2, 4), (1, 2), (2, 3, 4))) if "segments" in free else (dice.choice((2, 2, 3)),)
    )
    tailed = pinned or "sharding" in free or dice.random() < 0.6
    if sum(nodes) == MOST_RANKS and not (pinned and "segments" not in free) and max(segments) > MOST_OF_MANY:
        # All rank sets of a tail besides so many segments are too many to write down.
        tailed = "sharding" in free or pinned
        segments = (1, 2) if tailed and "segments" in free else (2,) if tailed else segments
    chain = random_chain(dice, tailed=tailed)
    cluster = random_cluster(nodes, chain, dice)
    points = [c for c in range(1, len(chain.layers)) if chain.layers[c].parameters or c == chain.tail_start]
    few = points if "cuts" in free else sorted(dice.sample(points, min(len(points), max(segments) + 1)))
    ranks = _fixed_ranks(sum(nodes), free, segments, dice) if pinned else {}
    caps = tuple(dice.sample(range(1, batch + 1), 2))
    states = ("none", "zero1", "zero2") if "optimizer_sharding" in free else ("none",)
    question = Question(
        chain,
        random_profile(chain, dice),
        cluster,
        batch,
        tuple(few),
        tuple(sorted(dice.sample(range(1, batch + 1), 3 if "micro_batches" in free else 1))),
        segments,
        _replicas(sum(nodes), dice) if "replicas" in free else (1,),
        (None, *caps) if "in_flight" in free else dice.choice(((None,), (None,), (batch,))),
        ("one_forward_one_backward", "fill_drain")
        if "orders" in free
        else (dice.choice(("one_forward_one_backward", "fill_drain")),),
        ("column", "row") if "sharding" in free else (dice.choice(("column", "row")),),
        (False, True) if "recompute" in free else (dice.random() < 0.2,),
        states,
        ranks,
        (1, 700, 8 * 2**20) if "buckets" in free else (dice.choice((1, 700, 8 * 2**20)),),
        dice.random() < 0.2,
    )
    pins = {kind: Pin(ranks=tuple(r for g in own for r in g), degree=len(own)) for kind, own in ranks.items()}
    pins = {k: p if k == "middle" else Pin(ranks=p.ranks) for k, p in pins.items()}
    return Instance(seed, free, question, _space(question, free), pins)


def _space(question: Question, free: frozenset[str]) -> Space:
    return Space(
        cuts=question.cuts,
        micro_batches=question.micro_batches,
        in_flight=question.in_flight,
        orders=question.orders,
        sharding=question.sharding,  # type: ignore[arg-type]
        recompute=question.recompute,
        optimizer_sharding=question.optimizer_sharding,  # type: ignore[arg-type]
        replicas=question.replicas,
        placements="every" if free & {"placements", "segments"} else "families",
        segments=question.segments,
        buckets=question.buckets,
    )


def _replicas(world: int, dice: Dice) -> tuple[int, ...]:
    return dice.choice(((1, 2), (1, 2, 4))) if world % 2 == 0 else (1, world)


def _fixed_ranks(world: int, free: frozenset[str], segments: tuple[int, ...], dice: Dice) -> dict[Kind, Groups]:
    """Pin the ranks of every stage, but the middle's where its number of segments is free."""

    def some() -> tuple[int, ...]:
        return tuple(range(world)) if dice.random() < 0.7 else tuple(dice.sample(range(world), max(world - 1, 1)))

    ranks: dict[Kind, Groups] = {"front": (some(),), "tail": (some(),)}
    if "segments" not in free:
        degree = min(segments[0], world)
        each = dice.randint(1, world // degree)
        order = dice.sample(range(world), each * degree)
        ranks["middle"] = tuple(tuple(order[i * each : (i + 1) * each]) for i in range(degree))
    return ranks


# Chains, profiles and clusters


def random_chain(dice: Dice, *, tailed: bool) -> Chain:
    """Up to six layers: convolutions and linear layers, some with a ReLU behind; the last ones can be a tail."""
    layers: list[Layer] = []
    body, tail = dice.randint(2 if tailed else 1, 3), dice.randint(1, 2) if tailed else 0
    channels = dice.randint(2, 6)
    for i in range(body):
        grown = dice.randint(2, 6)
        weight = (Parameter(f"conv{i}.weight", (grown, channels, 3)),)
        flops = 6 * channels * grown
        layers.append(Layer(f"conv{i}", "Conv1d", (channels, 4), (grown, 4), flops, weight, saves_input=True))
        channels = grown
        if dice.random() < 0.4 and len(layers) + body - i + tail < MOST_LAYERS:
            layers.append(_relu(f"relu{i}", (channels, 4)))
    if not tail:
        return Chain("random", tuple(layers))
    layers.append(Layer("flatten", "Flatten", (channels, 4), (4 * channels,), 0, aliases_input=True))
    width = 4 * channels
    for i in range(tail):
        grown = dice.randint(4, 24)
        weight = (Parameter(f"fc{i}.weight", (grown, width)), Parameter(f"fc{i}.bias", (grown,)))
        shard = Linear(width, grown, bias=True)
        layers.append(
            Layer(
                f"fc{i}", "Linear", (width,), (grown,), 2 * width * grown, weight, saves_input=True, linear=shard
            )
        )
        width = grown
        if i + 1 < tail and len(layers) + tail - i - 1 < MOST_LAYERS:
            layers.append(_relu(f"relu-fc{i}", (width,)))
    return Chain("random", tuple(layers))


def _relu(name: str, shape: tuple[int, ...]) -> Layer:
    return Layer(name, "ReLU", shape, shape, shape[0], saves_output=True, channelwise=True)


def random_profile(chain: Chain, dice: Dice) -> Profile:
    """Times with an offset and a slope in samples, about a millisecond, different for every layer and pass."""
    sizes = (1, 4, 16)

    def row(least: float = 0.0) -> tuple[float, ...]:
        offset, slope = least + dice.random() * 1e-3 * dice.choice((0, 1, 4)), dice.random() * 1e-3
        return tuple(offset + slope * n for n in sizes)

    layers = []
    for layer in chain.layers:
        adding = dice.random() * 1e-4 if layer.parameters else 0.0
        layers.append(LayerProfile(layer.name, (row(),), (row(adding),), accumulate_s=adding))
    figures = [dice.random() * 1e-6 for _ in range(3)]
    return Profile(chain.fingerprint, "estimated", "dice", "float32", sizes, (1.0,), tuple(layers), *figures)


def random_cluster(nodes: tuple[int, ...], chain: Chain, dice: Dice) -> Cluster:
    """Slow or fast links, and now and then unequal speeds, tight memory, shared cores or contention."""
    unequal, tight, shared = dice.random() < 0.25, dice.random() < 0.4, dice.random() < 0.15
    within = Link(dice.random() * 1e-3 * dice.choice((0.01, 1)), 10 ** dice.uniform(4, 7))
    between = Link(dice.random() * 1e-2 * dice.choice((0.01, 1)), 10 ** dice.uniform(4, 7))
    if dice.random() < 0.1:
        within = Link(within.latency_s, within.bytes_per_s, contention=dice.random())
    parameters = sum(layer.parameter_count for layer in chain.layers)
    activations = sum(layer.out_elements for layer in chain.layers)
    enough = 4 * (3 * parameters + 12 * activations)
    memory = enough * dice.uniform(0.6, 1.5) if tight else 1e12
    device = Device("dice", memory, {"float32": 1e9}, 1e8, 0.0)

    def node(devices: int) -> Node:
        speed = tuple(dice.choice((0.5, 1.0, 1.0, 2.0)) for _ in range(devices)) if unequal else 1.0
        return Node(devices, cores=max(devices // 2, 1) if shared else None, speed=speed)

    return Cluster("random", device, tuple(node(n) for n in nodes), {"node": within, "rack": between})
