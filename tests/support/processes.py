"""Ranks as processes, with a store that is there before them: no other process could take its port."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist
import torch.multiprocessing as mp


def spawn(world: int, body: Callable[..., None], *arguments: Any) -> None:
    """Run ``body(rank, *arguments)`` in a process per rank, whose environment is that of a launcher."""
    store = dist.TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=60), wait_for_workers=False)
    mp.spawn(_run, (world, store.port, body, arguments), nprocs=world)


def _run(rank: int, world: int, port: int, body: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True")
    body(rank, *arguments)
