"""One rank of a training of the small VGG under a plan made by hand; as a script, or as a function."""

from __future__ import annotations

import itertools
import os
import signal
import sys
import time
from typing import Any

from rich.console import Console

from hybridpar.config import Config, compose
from hybridpar.errors import HybridparError
from hybridpar.model.build import build
from hybridpar.model.chain import Chain
from hybridpar.model.deferred import defer
from hybridpar.model.trace import trace
from hybridpar.planning.plan import Plan, Segment, Stage, validate
from hybridpar.report.summary import show
from hybridpar.runtime import checks, trainer
from hybridpar.runtime.executor import Executor
from hybridpar.runtime.process import Process


def make_plan(shape: str, config: Config, chain: Chain) -> Plan:
    last, cut = len(chain.layers), chain.tail_start
    if shape == "three_stage":
        world, middle = 4, Stage("middle", 6, (Segment((5, 9), (2,)), Segment((9, cut), (3,))))
        tail = Stage("tail", 16, (Segment((cut, last), (0, 1)),), ("column", "row", "column"))
        stages: tuple[Stage, ...] = (Stage("front", 8, (Segment((0, 5), (0, 1)),)), middle, tail)
    elif shape == "replicas":
        tail = Stage("tail", 6, (Segment((cut, last), (1, 0)),), ("column", "row", "column"))
        world, stages = 4, (Stage("front", 4, (Segment((0, cut), (0, 1)),), recompute=True), tail)
    elif shape == "front_tail":
        tail = Stage("tail", 16, (Segment((cut, last), (0, 1)),), ("column", "row", "column"))
        world, stages = 2, (Stage("front", 8, (Segment((0, cut), (0, 1)),)), tail)
    elif shape == "data_parallel":
        world, stages = 2, (Stage("front", 8, (Segment((0, last), (0, 1)),)),)
    else:
        world, stages = 1, (Stage("front", 8, (Segment((0, last), (0,)),)),)
    train = config.train
    plan = Plan(
        chain.model,
        chain.fingerprint,
        world,
        train.global_batch,
        train.precision,
        stages,
        recipe=config.recipe(),
        replicas=2 if shape == "replicas" else 1,
        replica_shares=(2.0, 1.0) if shape == "replicas" else None,
    )
    validate(plan, chain)
    return plan


def break_rank(rank: int) -> None:
    """Let every forward of this rank fail, unless the job was restarted."""

    def fail(*_: object) -> None:
        raise ZeroDivisionError("broken on purpose")

    if os.environ.get("RANK") == str(rank) and os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0":
        Executor._forward = fail  # type: ignore[method-assign]


def halt_rank(rank: int, how: str) -> None:
    """Stop this rank's process, or let it sleep, in its fourth forward; its number goes to standard error."""
    forward, calls = Executor._forward, itertools.count()

    def halting(*arguments: Any) -> None:
        if next(calls) == 3:
            sys.stderr.write(f"halted {os.getpid()}\n")
            sys.stderr.flush()
            if how == "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(90)
        forward(*arguments)

    if os.environ.get("RANK") == str(rank):
        Executor._forward = halting  # type: ignore[method-assign]


def main() -> None:
    """Train as ``sys.argv`` says; exit as a command does for a user's mistake."""
    try:
        _train(*sys.argv[1:])
    except HybridparError as e:
        sys.stderr.write(f"hybridpar: {e}\n")
        raise SystemExit(2) from None


def _train(shape: str, *overrides: str) -> None:
    if "BREAK_RANK" in os.environ:
        break_rank(int(os.environ["BREAK_RANK"]))
    if "HALT_RANK" in os.environ:
        halt_rank(int(os.environ["HALT_RANK"]), os.environ["HALT_BY"])
    config = compose(["model=small_vgg", "data=digits", "train.global_batch=48", *overrides])
    model = config.model
    source = defer(build(model.builder, model.options, classes=model.classes, in_shape=model.in_shape))
    traced = trace(source.module, model.in_shape, model.name)
    process = Process(config.train.device, config.train.timeout_s)

    def planned() -> Plan:
        plan = make_plan(shape, config, traced.chain)
        checks.check(config, plan, traced.chain)
        return plan

    plan = process.agree(planned)
    summary = trainer.train(config, plan, traced, source, process)
    if process.rank == 0 and summary is not None:
        show(summary, Console())


if __name__ == "__main__":
    main()
