"""The contestants of the cluster's bench do the same work: their losses are those of one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from hybridpar.model.chain import Chain
from hybridpar.planning.plan import Plan, Segment, Stage, validate
from scripts.bench.cluster import parity
from scripts.bench.cluster.contestants import CONTESTANTS, find
from scripts.bench.cluster.contestants.contestant import Options
from scripts.bench.cluster.contestants.floor import Floor
from scripts.bench.cluster.setting import Setting
from scripts.bench.cluster.task import Seen, Task
from scripts.bench.cluster.training import comparable_work_of, work_of
from scripts.bench.cluster.worker import run
from tests.support.processes import spawn

ROOT = Path(__file__).resolve().parents[2]
VGG = Setting("small_vgg", images_per_rank=6, image=8, classes=10)
NORMED = Setting("resnet18", images_per_rank=8, image=32, classes=10, hosts=2)
CASES: dict[str, tuple[str, Setting, Options]] = {
    "floor": ("floor", VGG, {"micro_batch": 8, "channels_last": True, "update": "loop"}),
    "ddp": ("ddp", VGG, {"bucket_mb": 1}),
    "ddp, micro-batches": ("ddp", VGG, {"micro_batch": 3, "channels_last": True, "update": "foreach"}),
    "hybridpar": ("hybridpar", VGG, {"plan": "front_tail"}),
    "ddp_tensor_head": ("ddp_tensor_head", VGG, {"channels_last": True}),
    "torch_gpipe": ("torch_gpipe", VGG, {"micro_batch": 4}),
    "torch_1f1b": ("torch_1f1b", VGG, {"micro_batch": 4, "replicas": 2, "channels_last": True}),
    "torch_interleaved": ("torch_interleaved", VGG, {"micro_batch": 6, "balance": "counted"}),
    "ddp_bf16": ("ddp_bf16", VGG, {}),
    "fsdp2": ("fsdp2", VGG, {"unit_mb": 1, "reshard": True}),
    "fsdp2, whole": ("fsdp2", VGG, {"update": "foreach"}),
}
DEEPSPEED = Setting("small_vgg", images_per_rank=8, image=8, classes=10, hosts=2)
DEEPSPEED_CASES: dict[str, tuple[str, Setting, Options]] = {
    "deepspeed_zero1": ("deepspeed_zero1", DEEPSPEED, {}),
    "deepspeed_zero1, micro-batches": ("deepspeed_zero1", DEEPSPEED, {"overlap": False, "micro_batch": 4}),
    "deepspeed_zero2": ("deepspeed_zero2", DEEPSPEED, {"bucket_mb": 1}),
    "deepspeed_zero2, micro-batches": ("deepspeed_zero2", DEEPSPEED, {"micro_batch": 4, "update": "foreach"}),
    "deepspeed_pipeline": ("deepspeed_pipeline", DEEPSPEED, {"micro_batch": 2}),
}
NORMED_CASES: dict[str, tuple[str, Setting, Options]] = {
    "ddp": ("ddp", NORMED, {}),
    "torch_1f1b": ("torch_1f1b", NORMED, {"micro_batch": 4}),
    "ddp_tensor_head": ("ddp_tensor_head", NORMED, {}),
    "hybridpar": ("hybridpar", NORMED, {"plan": "pipeline"}),
}


def stages(kind: str, chain: Chain, world: int) -> tuple[Stage, ...]:
    everyone, last, cut = tuple(range(world)), len(chain.layers), chain.tail_start
    if kind == "front_tail":
        front = Stage("front", 3, (Segment((0, cut), everyone),))
        return front, Stage("tail", 8, (Segment((cut, last), everyone),), ("column", "row", "column"))
    bounds = [0, *(last * (k + 1) // world for k in range(world))]
    segments = tuple(Segment((bounds[k], bounds[k + 1]), (k,)) for k in everyone)
    return (Stage("middle", 4, segments),)


def write_plan(kind: str, setting: Setting, folder: Path) -> str:
    chain, path = work_of(setting).traced.chain, folder / f"{kind}.json"
    own = stages(kind, chain, setting.world)
    plan = Plan(chain.model, chain.fingerprint, setting.world, setting.global_batch, "float32", own)
    validate(plan, chain)
    plan.save(path)
    return str(path)


def task_of(contestant: str, setting: Setting, options: Options, folder: Path) -> Task:
    if "plan" in options:
        options = {**options, "plan": write_plan(options["plan"], setting, folder)}
    return Task(contestant, setting, options, str(folder), warm_up=0, steps=1, losses=parity.STEPS)


def trains_all(rank: int, tasks: dict[str, Task]) -> None:
    """Do one task after the other in the same processes, which take longer to start than to train."""
    for number, task in enumerate(tasks.values()):
        if not find(task.contestant).alone:
            seen = Seen()
            run(task, seen)
            seen.save(Path(task.out) / str(number), rank)


def difference(task: Task, losses: list[float]) -> float:
    """How far losses are from those of one process that normalises over the same samples."""
    single = parity.reference(task, task.out)
    assert single is not None
    work = comparable_work_of(single.setting)
    loop = Floor(work, **single.options)
    return parity.difference(losses, [loop.step(*work.samples(step)) for step in range(parity.STEPS)])


def train(cases: dict[str, tuple[str, Setting, Options]], folder: Path) -> dict[str, tuple[Task, list[Seen]]]:
    tasks = {name: task_of(*case, folder) for name, case in cases.items()}
    for number in range(len(tasks)):
        (folder / str(number)).mkdir()
    world = max(task.setting.world for task in tasks.values())
    spawn(world, trains_all, tasks)
    return {
        name: (task, [Seen.load(folder / str(number), rank) for rank in range(world)])
        for number, (name, task) in enumerate(tasks.items())
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Task, list[Seen]]]:
    return train({n: c for n, c in CASES.items() if n != "floor"}, tmp_path_factory.mktemp("vgg"))


@pytest.fixture(scope="module")
def deepspeed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Task, list[Seen]]]:
    return train(DEEPSPEED_CASES, tmp_path_factory.mktemp("deepspeed"))


@pytest.fixture(scope="module")
def normed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Task, list[Seen]]]:
    return train(NORMED_CASES, tmp_path_factory.mktemp("normed"))


def check(task: Task, seen: list[Seen]) -> None:
    assert not [s.error for s in seen if s.error]
    assert all(s.losses == seen[0].losses for s in seen)
    assert len(seen[0].losses) == parity.STEPS
    assert len(set(seen[0].losses)) == parity.STEPS
    if find(task.contestant).lossy:
        assert parity.AGREEMENT / 10 < difference(task, seen[0].losses) < 1e-3
    else:
        assert difference(task, seen[0].losses) < parity.AGREEMENT
    for s in seen:
        assert len(s.step_s) == len(s.cpu_s) == task.steps
        assert s.bytes["lo"][0] > 0
        assert s.peak_bytes > 0


@pytest.mark.parametrize("name", [n for n in CASES if n != "floor"])
def test_losses_are_those_of_one_process(name: str, trained: dict[str, tuple[Task, list[Seen]]]) -> None:
    check(*trained[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", DEEPSPEED_CASES)
def test_losses_under_deepspeed_are_those_of_one_process(
    name: str, deepspeed: dict[str, tuple[Task, list[Seen]]]
) -> None:
    check(*deepspeed[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", NORMED_CASES)
def test_batch_norms_see_the_samples_of_a_micro_batch(
    name: str, normed: dict[str, tuple[Task, list[Seen]]]
) -> None:
    check(*normed[name])


def test_a_loop_over_micro_batches_does_what_one_over_the_batch_does(tmp_path: Path) -> None:
    task = task_of(*CASES["floor"], tmp_path)
    work = comparable_work_of(VGG)
    loop = Floor(work, **task.options)
    losses = [loop.step(*work.samples(step)) for step in range(parity.STEPS)]
    single = replace(task, options={})
    assert difference(single, losses) < parity.AGREEMENT


def test_another_learning_rate_is_other_work(tmp_path: Path) -> None:
    """The agreement that is asked for sees an error of a tenth in the gradients."""
    work = comparable_work_of(VGG)
    loop = Floor(replace(work, rate=1.1 * work.rate))
    losses = [loop.step(*work.samples(step)) for step in range(parity.STEPS)]
    assert difference(task_of("floor", VGG, {}, tmp_path), losses) > 10 * parity.AGREEMENT


@pytest.mark.parametrize("name", CONTESTANTS)
def test_every_contestant_has_options_to_try(name: str) -> None:
    grid = find(name).grid(VGG)
    assert grid
    assert len({json.dumps(options, sort_keys=True) for options in grid}) == len(grid)


def test_a_contestant_that_fails_leaves_its_error(tmp_path: Path) -> None:
    """The worker as it is started on every rank, here alone."""
    good = replace(task_of("floor", VGG, {}, tmp_path), losses=0, warm_up=1)
    bad = replace(good, options={"bucket": 7})
    for task in (good, bad):
        task.save(tmp_path / "task.json")
        assert Task.load(tmp_path / "task.json") == task
        command = [sys.executable, "-m", "scripts.bench.cluster.worker", str(tmp_path / "task.json")]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        seen = Seen.load(tmp_path, 0)
        if task is bad:
            assert ran.returncode == 1
            assert seen.error is not None
            assert "unexpected keyword argument 'bucket'" in seen.error
        else:
            assert ran.returncode == 0, ran.stderr
            assert seen.error is None
            assert seen.losses == []
            assert len(seen.step_s) == 1


def test_a_rank_that_was_killed_has_an_error(tmp_path: Path) -> None:
    assert Seen.load(tmp_path, 3).error == "rank 3 was killed before it could tell anything"
