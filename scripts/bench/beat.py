"""How fast the machine is just now: a small fixed computation, timed again and again beside everything else.

A virtual machine's cores are not equally fast all the time: their host has other guests. The beat takes a few
hundredths of a core and is timed by its own CPU time, so that it tells the machine's speed and not its load.

Run as a script: ``beat.py FILE`` appends a line per beat, ``CLOCK<tab>SECONDS``, until it is ended.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

import torch
import torch.nn.functional as F

PAUSE_S = 0.04
"""Between beats."""
ROWS, IMAGE = 160, (1, 32, 28, 28)
"""Of a square product, and input of a convolution: a millisecond or two."""


class Beat:
    """The process that beats; a context manager."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> Beat:
        self._process = subprocess.Popen([sys.executable, str(Path(__file__).resolve()), str(self.path)])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        self._process.wait()

    def median_s(self, begin_s: float, end_s: float) -> float | None:
        """Return the median CPU seconds of the beats between two times of ``perf_counter``; None without any."""
        if not self.path.exists():
            return None
        pairs = (line.split("\t") for line in self.path.read_text().splitlines() if line.count("\t") == 1)
        found = [float(seconds) for clock, seconds in pairs if begin_s <= float(clock) <= end_s]
        return statistics.median(found) if found else None


def beat(path: Path) -> None:
    """Beat for ever."""
    torch.set_num_threads(1)
    matrix, image, weight = torch.ones(ROWS, ROWS), torch.ones(IMAGE), torch.ones(IMAGE[1], IMAGE[1], 3, 3)
    with path.open("a", buffering=1, encoding="utf-8") as out, torch.no_grad():
        while True:
            begin_s = time.thread_time()
            torch.mm(matrix, matrix)
            F.conv2d(image, weight, padding=1)
            out.write(f"{time.perf_counter():.3f}\t{time.thread_time() - begin_s:.6f}\n")
            time.sleep(PAUSE_S)


if __name__ == "__main__":
    beat(Path(sys.argv[1]))
