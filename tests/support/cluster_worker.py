"""Stands for a contestant's rank in tests of the bench: sends bytes to the next host, tells what it saw."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from scripts.bench.cgroups import join_own

SENT_BYTES = 3_000_000
"""By every rank, to the rank of the same number on the next host."""
PORT = 6000


def main() -> None:
    """Do a task, whose options may say ``fail``, ``die`` (a rank) or ``hog`` (bytes)."""
    task = json.loads(Path(sys.argv[1]).read_text())
    rank, options = int(os.environ["RANK"]), task["options"]
    if rank == options.get("fail"):
        raise ValueError("told to fail")
    if rank == options.get("die"):
        os.kill(os.getpid(), signal.SIGKILL)
    hog = bytearray(options.get("hog", 0))
    before = Path("/proc/self/cgroup").read_text()
    join_own()
    counters = _counters()
    _meet(Path(task["out"]), rank, "ready")
    if int(os.environ["WORLD_SIZE"]) > 1:
        _exchange(rank)
    _meet(Path(task["out"]), rank, "through")
    moved = {name: [b - a for a, b in zip(counters[name], now, strict=True)] for name, now in _counters().items()}
    seen = {
        "step_s": [options["step_s"] + rank] * task["steps"],
        "cpu_s": [options["step_s"]] * task["steps"],
        "losses": [1.0 / (step + 1) for step in range(task["losses"])],
        "peak_bytes": len(hog),
        "bytes": moved,
        "error": None,
    }
    about = {
        "cgroups": [before, Path("/proc/self/cgroup").read_text()],
        "environment": {k: os.environ[k] for k in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK")},
    }
    (Path(task["out"]) / f"about{rank}.json").write_text(json.dumps(about))
    (Path(task["out"]) / f"rank{rank}.json").write_text(json.dumps(seen))


def _exchange(rank: int) -> None:
    """Send to the next host and receive from the one before."""
    world, local = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
    other = (rank + local) % world
    network = os.environ["MASTER_ADDR"].rpartition(".")[0]
    server = socket.create_server(("", PORT + rank))
    sender = threading.Thread(target=_send, args=(f"{network}.{other // local + 1}", PORT + other))
    sender.start()
    connection, _ = server.accept()
    left = SENT_BYTES
    while left:
        left -= len(connection.recv(2**16))
    sender.join()


def _meet(folder: Path, rank: int, word: str) -> None:
    """Wait for all ranks: a host's counters have the bytes of them all."""
    (folder / f"{word}{rank}").touch()
    while len(list(folder.glob(f"{word}*"))) < int(os.environ["WORLD_SIZE"]):
        time.sleep(0.01)


def _send(address: str, port: int) -> None:
    for _ in range(100):
        with suppress(ConnectionRefusedError), socket.create_connection((address, port)) as connection:
            connection.sendall(bytes(SENT_BYTES))
            return
        time.sleep(0.1)


def _counters() -> dict[str, list[int]]:
    lines = [line.split(":") for line in Path("/proc/self/net/dev").read_text().splitlines() if ":" in line]
    return {name.strip(): [int(rest.split()[0]), int(rest.split()[8])] for name, rest in lines}


if __name__ == "__main__":
    main()
