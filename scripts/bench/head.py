"""A head of very many classes: sharded over the ranks, beside DistributedDataParallel with the whole head on each.

And sharded with sampled classes. One command runs all three, each rank with the same memory to live in. What does
not fit is a result. In all cases an embedding of two layers stands before the head, the loss is ArcFace, and the
optimizer SGD with momentum.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import hybridpar
from hybridpar.cluster.limits import usable_memory_bytes
from hybridpar.model.deferred import defer
from hybridpar.planning.plan import Recipe
from hybridpar.planning.request import Pin
from hybridpar.runtime.margin import ArcFace, MarginCriterion
from hybridpar.runtime.memory import MemoryMeter
from scripts.bench.about import machine, software

WAYS = ("sharded", "sampled", "replicated")
TIMEOUT_S = 3600.0
LEARNING_RATE, MOMENTUM = 0.01, 0.9
Step = Callable[[torch.Tensor, torch.Tensor], Any]


def main() -> int:
    """Run all ways and print a table; 0 when done, 2 where a way failed for another reason than memory."""
    arguments = _arguments()
    if arguments.way:
        return _work(arguments)
    limit = arguments.memory_gib or usable_memory_bytes() / arguments.ranks / 2**30
    rows, failed = [], False
    for way in WAYS:
        row = _launch(arguments, way, limit)
        failed |= row is None
        rows.append(row or f"| {way} | failed | |")
    head = arguments.classes * arguments.features * 4 / 2**20
    lines = [
        f"- head: {arguments.classes:,} classes x {arguments.features} features, {head:,.0f} MiB of float32",
        f"- job: {arguments.ranks} ranks with {limit:.1f} GiB each, {arguments.batch} samples per step",
        f"- share of sampled classes: {arguments.share}",
        f"- taken: {time.strftime('%Y-%m-%d', time.gmtime())}, {arguments.steps} steps, {machine()}; {software()}",
        "",
        "| way | peak memory of a rank, MiB | median s per step |",
        "| --- | --- | --- |",
        *rows,
    ]
    sys.stdout.write("\n".join(lines) + "\n")
    return 2 if failed else 0


def _launch(arguments: argparse.Namespace, way: str, limit: float) -> str | None:
    """Run one way on all ranks and return its row; None where it failed."""
    with tempfile.TemporaryDirectory() as folder:
        options = {**vars(arguments), "memory_gib": limit, "way": way, "out": folder}
        given = [f"--{name.replace('_', '-')}={value}" for name, value in options.items() if value is not None]
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={arguments.ranks}"]
        command = [sys.executable, *launcher, "-m", "scripts.bench.head", *given]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
        found = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))]
    lacking = [f for f in found if f["lacking"]]
    if lacking:
        return f"| {way} | does not fit in {limit * 1024:,.0f}: {lacking[0]['lacking']} | |"
    if ran.returncode or len(found) < arguments.ranks:
        sys.stderr.write(ran.stderr[-4000:])
        return None
    memory = max(f["memory_bytes"] for f in found) / 2**20
    seconds = statistics.median(max(each) for each in zip(*(f["seconds"] for f in found), strict=True))
    return f"| {way} | {memory:,.0f} | {seconds:.4g} |"


def _work(arguments: argparse.Namespace) -> int:
    """Be one rank of one way and leave a file of what was seen."""
    rank = int(os.environ["RANK"])
    meter = MemoryMeter(torch.device("cpu"))
    _limit_memory(arguments.memory_gib)
    seconds: list[float] = []
    phase, lacking = "making the weights", ""
    try:
        step = (_replicated if arguments.way == "replicated" else _sharded)(arguments)
        phase = "training"
        for number in range(arguments.steps + 1):
            inputs, labels = _batch(arguments, number)
            began = time.perf_counter()
            step(inputs, labels)
            seconds.append(time.perf_counter() - began)
    except (MemoryError, RuntimeError) as e:
        if "allocate memory" not in f"{e} {e.__cause__}":
            raise
        lacking = phase
    found = {"memory_bytes": meter.peak_bytes(), "seconds": seconds[1:], "lacking": lacking}
    Path(arguments.out, f"{rank}.json").write_text(json.dumps(found))
    return int(bool(lacking))


def _limit_memory(gib: float) -> None:
    """Let allocations fail beyond so much more than the process has now."""
    status = Path("/proc/self/status").read_text()
    now = int(status.split("VmData:")[1].split()[0]) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (now + round(gib * 2**30),) * 2)


def _model(arguments: argparse.Namespace) -> nn.Module:
    width = arguments.features
    head = hybridpar.CosineLinear(width, arguments.classes)
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), head)


def _batch(arguments: argparse.Namespace, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    inputs = torch.randn(arguments.batch, arguments.features, generator=generator)
    return inputs, torch.randint(arguments.classes, (arguments.batch,), generator=generator)


def _sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=LEARNING_RATE, momentum=MOMENTUM, fused=True)


def _sharded(arguments: argparse.Namespace) -> Step:
    """Front and tail on all ranks: the embedding replicated, the head in shards, with all classes or some."""
    share = arguments.share if arguments.way == "sampled" else None
    source = defer(lambda: _model(arguments))
    ranks = tuple(range(arguments.ranks))
    pins = {"front": Pin(layers=(0, 3), ranks=ranks), "tail": Pin(ranks=ranks, micro_batch=arguments.batch)}
    shape = (arguments.features,)
    recipe = Recipe(sampling=share)
    plan = hybridpar.plan(
        source.module, shape, arguments.batch, shape="front_tail", pins=pins, replicas=1, recipe=recipe
    )
    loss = hybridpar.CrossEntropy(margin=hybridpar.ArcFace(), sampled=share)
    job = hybridpar.wrap(source.module, plan, _sgd, source=source, loss=loss)
    return lambda inputs, labels: job.step((inputs, labels))


def _replicated(arguments: argparse.Namespace) -> Step:
    """The whole model on every rank."""
    dist.init_process_group("gloo")
    model = DistributedDataParallel(_model(arguments), gradient_as_bucket_view=True)
    optimizer, criterion = _sgd(model.parameters()), MarginCriterion(ArcFace(), nn.CrossEntropyLoss())
    share = arguments.batch // arguments.ranks
    own = slice(dist.get_rank() * share, (dist.get_rank() + 1) * share)

    def step(inputs: torch.Tensor, labels: torch.Tensor) -> None:
        optimizer.zero_grad()
        criterion(model(inputs[own]), labels[own]).backward()
        optimizer.step()

    return step


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m scripts.bench.head", description=__doc__)
    parser.add_argument("--classes", type=int, default=1_000_000, help="default: %(default)s")
    parser.add_argument("--features", type=int, default=512, help="default: %(default)s")
    parser.add_argument("--ranks", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=64, help="samples per step; default: %(default)s")
    parser.add_argument("--share", type=float, default=0.1, help="of sampled classes; default: %(default)s")
    parser.add_argument("--steps", type=int, default=5, help="after one that is not timed; default: %(default)s")
    parser.add_argument(
        "--memory-gib", type=float, default=0.0, help="of every rank; default: its share of what this machine has"
    )
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
