"""One rank of a contest: rivals take turns; rank 0 writes what each turn took."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

from scripts.bench.cgroups import join_own
from scripts.bench.runtime.contests import Setting, rivals
from scripts.bench.runtime.models import work_of
from scripts.bench.runtime.rivals import Ours, Rival
from scripts.bench.turns import Turn, order

AGREEING_STEPS = 3
"""So many first steps of all rivals must have losses that hardly differ."""


def main() -> None:
    """Read the setting, run the rounds, write the turns."""
    setting, out = Setting(**json.loads(sys.argv[1])), Path(sys.argv[4])
    rounds, steps = int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    known = {rival.name: rival for rival in rivals(setting)}
    x, y = work_of(setting.model, setting.global_batch).samples(0)
    losses = {name: [_mean_loss(rival, x, y) for _ in range(AGREEING_STEPS)] for name, rival in known.items()}
    _require_agreement(losses, {name: rival.agreement for name, rival in known.items()})
    join_own()
    turns: dict[str, list[Turn]] = {name: [] for name in known}
    for number in range(rounds + 1):
        for name in order(list(known), number):
            turns[name].append(_turn(known[name], x, y, steps))
    ours = known[Ours.name].trains
    assert isinstance(ours, Ours)
    actions = max(len(actions) for actions in ours.job.program().actions)
    if _rank() == 0:
        kept = {name: [asdict(turn) for turn in own[1:]] for name, own in turns.items()}  # the first warms up
        out.write_text(json.dumps({"turns": kept, "losses": losses, "actions": actions}, indent=1))


def _turn(rival: Rival, x: torch.Tensor, y: torch.Tensor, steps: int) -> Turn:
    """Run some steps, from all ranks' being ready to the last one's end."""
    if _world() > 1:
        dist.barrier()
    began_s, began_cpu_s = time.perf_counter(), time.process_time()
    for _ in range(steps):
        rival.trains.step(x, y)
    own = time.perf_counter() - began_s, time.process_time() - began_cpu_s
    everyone: list[tuple[float, float]] = [own] * _world()
    if _world() > 1:
        dist.all_gather_object(everyone, own)
    return Turn(max(wall for wall, _ in everyone) / steps, sum(cpu for _, cpu in everyone) / steps)


def _mean_loss(rival: Rival, x: torch.Tensor, y: torch.Tensor) -> float:
    """Run a step and return its mean loss over all samples, of which every rank is told a share."""
    share = rival.trains.step(x, y)
    shares = [share] * _world()
    if _world() > 1:
        dist.all_gather_object(shares, share)
    return sum(shares)


def _require_agreement(losses: dict[str, list[float]], agreement: dict[str, float]) -> None:
    """Raise RuntimeError unless all rivals did the same work."""
    ours = losses[Ours.name]
    for name, theirs in losses.items():
        if any(abs(a - b) > agreement[name] * abs(a) for a, b in zip(ours, theirs, strict=True)):
            raise RuntimeError(f"{name} does other work than {Ours.name}: losses {theirs}, ours {ours}")


def _world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


if __name__ == "__main__":
    main()
