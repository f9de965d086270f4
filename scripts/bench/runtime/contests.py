"""The contests: which rivals do the same work, on how many ranks, and our plan for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hybridpar.model.chain import Chain
from hybridpar.planning.plan import Plan, Segment, Stage, validate
from scripts.bench.balance import balanced
from scripts.bench.cluster.contestants.ddp import DataParallel
from scripts.bench.cluster.contestants.floor import Floor
from scripts.bench.cluster.contestants.tensor_head import TensorHead
from scripts.bench.cluster.contestants.torch_pipeline import GPipe, Interleaved, OneForwardOneBackward
from scripts.bench.runtime.models import CHAIN_OF_LINEARS, work_of
from scripts.bench.runtime.options import OF_REPLICAS, OPTIONS, variants
from scripts.bench.runtime.rivals import Ours, Rival
from scripts.bench.work import Work


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
    others: Callable[[Setting, Work], list[Rival]]


def _alone(setting: Setting, chain: Chain) -> tuple[Stage, ...]:
    return (Stage("front", setting.micro_batch, (Segment((0, len(chain.layers)), (0,)),)),)


def _front(setting: Setting, chain: Chain) -> tuple[Stage, ...]:
    return (Stage("front", setting.global_batch // 4, (Segment((0, len(chain.layers)), (0, 1, 2, 3)),)),)


def _middle(setting: Setting, chain: Chain) -> tuple[Stage, ...]:
    parts = balanced([layer.flops_per_sample for layer in chain.layers], 4 * setting.segments)
    segments = tuple(Segment(layers, (number % 4,)) for number, layers in enumerate(parts))
    return (Stage("middle", setting.micro_batch, segments),)


def _front_tail(setting: Setting, chain: Chain) -> tuple[Stage, ...]:
    cut, last, ranks = chain.tail_start, len(chain.layers), (0, 1, 2, 3)
    front = Stage("front", setting.global_batch // 4, (Segment((0, cut), ranks),))
    ways = ("column", "row", "column")
    return front, Stage("tail", setting.global_batch, (Segment((cut, last), ranks),), ways)


def _loops(setting: Setting, work: Work) -> list[Rival]:
    return [Rival("plain loop", Floor(work, setting.micro_batch))]


def _nobody(setting: Setting, work: Work) -> list[Rival]:
    del setting, work
    return []


def _data_parallel(setting: Setting, work: Work) -> list[Rival]:
    del setting
    return [Rival("DistributedDataParallel", DataParallel(work))]


def _pipelines(setting: Setting, work: Work) -> list[Rival]:
    schedules = {"GPipe": GPipe, "1F1B": OneForwardOneBackward, "interleaved 1F1B": Interleaved}
    return [
        Rival(f"pipelining, {name}", schedule(work, setting.micro_batch, balance="counted"))
        for name, schedule in schedules.items()
    ]


def _hand_written(setting: Setting, work: Work) -> list[Rival]:
    del setting
    return [Rival("by hand", TensorHead(work))]


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
    "front": Contest(4, "resnet18", 64, 16, _front, _data_parallel),
    "middle": Contest(4, "vgg11", 64, 8, _middle, _pipelines),
    "front_tail": Contest(4, "vgg11", 64, 16, _front_tail, _hand_written),
}


def rivals(setting: Setting) -> list[Rival]:
    """Return a contest's rivals on this rank, ours first; every rank calls it alike."""
    contest = CONTESTS[setting.contest]
    work = work_of(setting.model, setting.global_batch)
    chain = work.traced.chain
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
    return [Rival(Ours.name, Ours(work, plan)), *own, *contest.others(setting, work)]
