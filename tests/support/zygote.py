"""A process that has imported what ranks need and becomes them by forking: imports cost more than most jobs here.

It takes one job after the other from its standard input, each as a line of JSON, runs its ranks, and answers with
a line of their exit codes. Like torchrun it ends the others when one has failed.
"""

from __future__ import annotations

import base64
import importlib
import json
import os
import pickle
import signal
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

PATIENCE_S = 10.0
"""After the first rank has failed, the others may end by themselves for so long."""


@dataclass(frozen=True)
class Request:
    """A job: what every rank runs, and where."""

    task: str
    """A pickled callable with its arguments, in base64."""
    path: list[str]
    """Where its module is looked for."""
    argv: list[str]
    environments: list[dict[str, str]]
    """Of each rank."""
    outputs: list[str]
    """Files for what all ranks print to standard output and to standard error."""
    imports: list[str]
    """Modules to be imported before, for this job and later ones."""


def main() -> None:
    """Serve; in every rank, which comes out of it as another process, run the task."""
    rank = _serve()
    if rank is not None:
        _become(*rank)


def _serve() -> tuple[Request, int] | None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever an import prints is no answer
    for line in sys.stdin:
        request = Request(**json.loads(line))
        for module in request.imports:
            importlib.import_module(module)
        ranks: dict[int, int] = {}
        for rank in range(len(request.environments)):
            if (pid := os.fork()) == 0:
                return request, rank
            ranks[pid] = rank
        answers.write(json.dumps(_codes(ranks)) + "\n")
        answers.flush()
    return None


def _codes(ranks: dict[int, int]) -> list[int]:
    """Wait for all ranks and return their exit codes."""
    codes: dict[int, int] = {}
    deadline_s: float | None = None
    while len(codes) < len(ranks):
        pid, status = os.waitpid(-1, 0 if deadline_s is None else os.WNOHANG)
        if pid:
            codes[ranks[pid]] = os.waitstatus_to_exitcode(status)
            if codes[ranks[pid]] and deadline_s is None:
                deadline_s = time.monotonic() + PATIENCE_S
        elif deadline_s is not None and time.monotonic() > deadline_s:
            for other, rank in ranks.items():
                if rank not in codes:
                    os.kill(other, signal.SIGKILL)
        else:
            time.sleep(0.01)
    return [codes[rank] for rank in range(len(ranks))]


def _become(request: Request, rank: int) -> None:
    """Be a rank: its environment, its output, its task."""
    os.environ.clear()
    os.environ.update(request.environments[rank])
    sys.path[:], sys.argv[:] = request.path, request.argv
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for target, name in enumerate(request.outputs, 1):
        os.dup2(os.open(name, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), target)
    function, arguments = pickle.loads(base64.b64decode(request.task))  # noqa: S301 - of the test that asks
    function(*arguments)


def as_line(request: Request) -> str:
    """Return what is written to the process for a job."""
    return json.dumps(asdict(request)) + "\n"


def packed(function: Any, *arguments: Any) -> str:
    """Return a task for a request."""
    return base64.b64encode(pickle.dumps((function, arguments))).decode()


if __name__ == "__main__":
    main()
