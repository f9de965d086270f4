"""The five lines of the Python API, as a user's own script; started from test_api.py, by torchrun or alone."""

from __future__ import annotations

import atexit
import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset

import hybridpar
from hybridpar.planning.request import Pin

SAMPLES, BATCH, EPOCHS = 90, 16, 8


class Blobs(Dataset):
    """Five classes around five points of the plane of 3 x 4 x 4 images. Labels are plain ints."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        self.labels = [i % 5 for i in range(SAMPLES)]
        centres = 2 * torch.randn(5, 3, 4, 4, generator=generator)
        self.images = centres[self.labels] + 0.3 * torch.randn(SAMPLES, 3, 4, 4, generator=generator)

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.images[index], self.labels[index]


def make_model() -> nn.Sequential:
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 12), nn.ReLU(), nn.Linear(12, 5),
    )  # fmt: skip


def write_threads(path: Path) -> None:
    """Write the names of this process's threads."""
    names = sorted(task.read_text().strip() for task in Path("/proc/self/task").glob("*/comm"))
    path.write_text(json.dumps(names))


def main() -> hybridpar.Job:
    shape, feeding, folder = sys.argv[1:]
    # The first to be registered is the last to be called.
    atexit.register(write_threads, Path(folder) / f"threads{os.environ.get('RANK', '0')}.json")
    dataset = Blobs()
    model = make_model()
    pins = {"tail": Pin(micro_batch=8)} if shape == "three_stage" else {}
    plan = hybridpar.plan(
        model,
        in_shape=(3, 4, 4),
        global_batch=BATCH,
        shape=shape,  # type: ignore[arg-type]
        pins=pins,
        precision="float64",
    )
    job = hybridpar.wrap(model, plan, lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9))
    run = Path(folder, "run")
    recording = (
        hybridpar.recording(job, run, timeline=(2, 5), trace=(6, 8)) if feeding == "recorded" else nullcontext()
    )
    with recording:
        losses = train(job, dataset, feeding)
    result = job.evaluate(job.loader(dataset, train=False))
    known = {"rank": job.rank, "losses": losses, "top1": result.top1, "samples": result.samples}
    known |= {"kinds": [s.kind for s in plan.stages], "world": plan.world, "parameters": sorted(job.parameters)}
    (Path(folder) / f"{job.rank}.json").write_text(json.dumps(known))
    return job


def train(job: hybridpar.Job, dataset: Blobs, feeding: str) -> list[float]:
    losses = []
    if feeding == "whole":
        x = dataset.images.double()
        y = torch.tensor(dataset.labels)
        for _ in range(EPOCHS):
            for start in range(0, SAMPLES, BATCH):
                batch = x[start : start + BATCH], y[start : start + BATCH]
                losses.append(job.step(batch, samples=len(batch[1])))
    else:
        loader = job.loader(dataset)
        for epoch in range(EPOCHS):
            loader.set_epoch(epoch)
            losses += [job.step(batch) for batch in loader]
    return losses


if __name__ == "__main__":
    job = main()  # as in a script without functions: nothing lets go of it before the end
