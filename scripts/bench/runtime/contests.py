"""The contests: which rivals do the same work, on how many ranks, and our plan for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hybridpar.model.chain import Chain
from hybridpar.model.trace import trace
from hybridpar.planning.plan import Plan, Segment, Stage, validate
from scripts.bench.runtime.models import CHAIN_OF_LINEARS, IMAGE, IN_SHAPE, balanced, build
from scripts.bench.runtime.options import OF_REPLICAS, OPTIONS, variants
from scripts.bench.runtime.rivals import SCHEDULES, DataParallel, HandWritten, Loop, Ours, Pipelining, Rival


@dataclass(frozen=True)
class Setting:
    """What all rivals of a contest have in common."""

    contest: str
    model: str
    global_batch: int
    micro_batch: int
    """Of the pipelines, and of those that run alone."""
    bucket_mib: int
    """Of our plan; DistributedDataParallel has its own default."""
    segments: int = 2
    """Of our pipeline, per rank: interleaved where there are several."""
    options: tuple[str, ...] = ()
    """Those of ours that run beside our defaults, in the contest of options."""


@dataclass(frozen=True)
class Contest:
    """Ranks, the defaults of a setting, and who competes."""

    world: int
    model: str
    global_batch: int
    micro_batch: int
    stages: Callable[[Setting, Chain], tuple[Stage, ...]]
    others: Callable[[Setting], list[Rival]]


def _alone(setting: Setting, chain: Chain) -> tuple[Stage, ...]:
    return (Stage("front", setting.micro_batch, (Segment((0, len(chain.layers)), (0,)),)),)


def _front(setting: Setting, chain: Chain) -> tuple[Stage, ...]:
    return (Stage("front", setting.global_batch // 4, (Segment((0, len(chain.layers)), (0, 1, 2, 3)),)),)


def _middle(setting: Setting, chain: Chain) -> tuple[Stage, ...]:
    parts = balanced(chain, 4 * setting.segments)
    segments = tuple(Segment(layers, (number % 4,)) for number, layers in enumerate(parts))
    return (Stage("middle", setting.micro_batch, segments),)


def _front_tail(setting: Setting, chain: Chain) -> tuple[Stage, ...]:
    cut, last, ranks = chain.tail_start, len(chain.layers), (0, 1, 2, 3)
    front = Stage("front", setting.global_batch // 4, (Segment((0, cut), ranks),))
    ways = ("column", "row", "column")
    return front, Stage("tail", setting.global_batch, (Segment((cut, last), ranks),), ways)


def _loops(setting: Setting) -> list[Rival]:
    return [Loop(setting.model, setting.micro_batch)]


def _nobody(setting: Setting) -> list[Rival]:
    del setting
    return []


def _pipelines(setting: Setting) -> list[Rival]:
    count = setting.global_batch // setting.micro_batch
    return [Pipelining(setting.model, schedule, count) for schedule in SCHEDULES]


OF_OPTIONS = {
    "options": tuple(name for name in OPTIONS if name not in OF_REPLICAS),
    "compression": OF_REPLICAS,
}
"""The contests in which we have no rival but ourselves, with the options that take part."""
CONTESTS = {
    "alone": Contest(1, "resnet18", 32, 32, _alone, _loops),
    "actions": Contest(1, CHAIN_OF_LINEARS, 256, 1, _alone, _loops),
    "options": Contest(1, "resnet18", 32, 16, _alone, _nobody),
    "compression": Contest(4, "vgg11", 64, 16, _front, _nobody),
    "front": Contest(4, "resnet18", 64, 16, _front, lambda setting: [DataParallel(setting.model)]),
    "middle": Contest(4, "vgg11", 64, 8, _middle, _pipelines),
    "front_tail": Contest(4, "vgg11", 64, 16, _front_tail, lambda setting: [HandWritten(setting.model)]),
}


def rivals(setting: Setting) -> list[Rival]:
    """Return a contest's rivals on this rank, ours first; every rank calls it alike."""
    contest = CONTESTS[setting.contest]
    model = build(setting.model)
    chain = trace(model, IN_SHAPE.get(setting.model, IMAGE), type(model).__name__).chain
    plan = Plan(
        chain.model,
        chain.fingerprint,
        contest.world,
        setting.global_batch,
        "float32",
        contest.stages(setting, chain),
        "one_forward_one_backward",
        setting.bucket_mib * 2**20,
    )
    validate(plan, chain)
    own = variants(setting.model, plan, setting.options)
    return [Ours(setting.model, plan), *own, *contest.others(setting)]
