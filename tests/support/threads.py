"""Ranks as threads of one process, with gloo communicators over an in-memory store."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from hybridpar.planning.communicators import groups as groups_of
from hybridpar.planning.plan import Plan
from hybridpar.runtime.communicators import ProcessGroups

T = TypeVar("T")
_counter = itertools.count()


def in_threads(main: Callable[[int], None], world: int, timeout_s: float) -> None:
    """Run ``main(rank)`` in a thread per rank; torch adds none of its own meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        threads = [threading.Thread(target=main, args=(r,), daemon=True) for r in range(world)]
        for t in threads:
            t.start()
        for t in threads:
            t.join(timeout_s)
    finally:
        torch.set_num_threads(before)


def run_ranks(plan: Plan, body: Callable[[int, ProcessGroups], T], *, timeout_s: float = 60.0) -> list[T]:
    """Run ``body(rank, communicators)`` on every rank of the plan at once; re-raises the first failure."""
    store, number = dist.HashStore(), next(_counter)
    results: dict[int, T] = {}
    failures: list[BaseException] = []

    def main(rank: int) -> None:
        try:
            groups = {}
            for name, members in groups_of(plan):
                if rank in members:
                    prefix = dist.PrefixStore(f"{number}/{name}/{members[0]}", store)
                    group = dist.ProcessGroupGloo(
                        prefix, members.index(rank), len(members), timedelta(seconds=timeout_s)
                    )
                    groups[name] = (group, members)
            results[rank] = body(rank, ProcessGroups(groups, rank - plan.locate(rank)[1]))
        except BaseException as e:  # noqa: BLE001 - handed to the caller
            failures.append(e)

    in_threads(main, plan.world, timeout_s * 2)
    if failures:
        raise failures[0]
    assert len(results) == plan.world, "a rank did not finish"
    return [results[r] for r in range(plan.world)]
