"""Ranks as processes, with a store that is there before them: no other process could take its port.

They are forked from one process that has imported torch and hybridpar already (``zygote``).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tests.support.zygote import Request, as_line, packed

ROOT = Path(__file__).resolve().parents[2]
COMMON_IMPORTS = (
    "hybridpar.commands.training",
    "hybridpar.planner",
    "hybridpar.report.basis",
    "hybridpar.report.dry_run",
    "tests.support.trainer_worker",
    "hydra.core.override_parser.overrides_parser",  # the rest is imported when a training begins
    "torch._dynamo",
    "torch.utils.tensorboard",
)
_zygotes: list[subprocess.Popen[str]] = []


def launch(
    world: int,
    body: Callable[..., Any],
    *arguments: Any,
    argv: Sequence[str] = (),
    imports: Sequence[str] = (),
    timeout_s: float = 120,
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    """Run ``body(*arguments)`` on ranks whose environment is that of a launcher; of one alone that of the test.

    The exit code is the first one that is not 0. A job that hangs is killed, and raises TimeoutExpired. ``argv``
    is ``sys.argv`` there, ``imports`` are modules that are worth keeping for later jobs.
    """
    store = dist.TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=60), wait_for_workers=False)
    places = [_place(rank, world, store.port) for rank in range(world)] if world > 1 else [{}]
    mine = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT), **environment}
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        request = Request(
            packed(body, *arguments),
            [str(ROOT), *sys.path],
            [str(a) for a in argv],
            [mine | place for place in places],
            [str(out), str(err)],
            [*COMMON_IMPORTS, *imports],
        )
        codes = _answer(request, timeout_s)
        texts = [file.read_text() for file in (out, err)]
    return subprocess.CompletedProcess(list(argv), next((c for c in codes if c), 0), *texts)


def spawn(world: int, body: Callable[..., None], *arguments: Any) -> None:
    """Run ``body(rank, *arguments)`` in a process per rank, whose environment is that of a launcher."""
    done = launch(world, _of_rank, body, arguments, timeout_s=240)
    assert done.returncode == 0, done.stderr


def _of_rank(body: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    body(int(os.environ["RANK"]), *arguments)


def _place(rank: int, world: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


def _answer(request: Request, timeout_s: float) -> list[int]:
    """Hand a job to the zygote and return the exit codes of its ranks. Raises TimeoutExpired."""
    zygote = _zygote()
    assert zygote.stdin is not None
    assert zygote.stdout is not None
    late = threading.Timer(timeout_s, os.killpg, (zygote.pid, signal.SIGKILL))
    late.start()
    try:
        zygote.stdin.write(as_line(request))
        zygote.stdin.flush()
        line = zygote.stdout.readline()
    finally:
        late.cancel()
    if not line:
        _zygotes.clear()
        raise subprocess.TimeoutExpired(request.argv or request.task[:40], timeout_s)
    codes: list[int] = json.loads(line)
    return codes


def _zygote() -> subprocess.Popen[str]:
    """Return the process that ranks are forked from; it ends with this one."""
    if not _zygotes:
        _zygotes.append(
            subprocess.Popen(
                [sys.executable, "-m", "tests.support.zygote"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd=ROOT,
                env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
                start_new_session=True,
            )
        )
    return _zygotes[0]
