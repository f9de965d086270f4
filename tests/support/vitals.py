"""A callback that notes what a long training must not gather: memory, files, threads."""

import gc
import json
import os
from pathlib import Path

import psutil
import torch

from hybridpar import Callback

EVERY = 50
"""Steps between two notes."""


class Vitals(Callback):
    """Writes a line every so many steps, one file per rank."""

    def on_start(self, job):
        self.own, self.path = psutil.Process(), Path(f"{os.environ['VITALS']}-{job.rank}.jsonl")

    def on_step(self, record):
        if (record.step + 1) % EVERY:
            return
        gc.collect()
        tensors = [o for o in gc.get_objects() if isinstance(o, torch.Tensor)]
        found = {
            "step": record.step + 1,
            "resident_bytes": self.own.memory_info().rss,
            "files": self.own.num_fds(),
            "threads": self.own.num_threads(),
            "tensors": len(tensors),
        }
        with self.path.open("a") as file:
            file.write(json.dumps(found) + "\n")
