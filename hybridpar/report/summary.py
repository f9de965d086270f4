"""The summary of a training job: one record, written as ``summary.json`` and shown at the end."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from hybridpar.errors import HybridparError
from hybridpar.schema import read_json, to_data

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class StageSummary:
    """A stage as it ran."""

    kind: Literal["front", "middle", "tail"]
    layers: tuple[int, int]
    """Half-open interval of layer indices."""
    degree: int
    ranks: tuple[int, ...]
    micro_batch: int


@dataclass(frozen=True)
class GpuUse:
    """Means over all GPUs and the time of the training; None is unknown, and ``reason`` says why."""

    utilisation: float | None = None
    """Share of the time in which any kernel ran."""
    occupancy: float | None = None
    """Active warps over the most that fit."""
    occupancy_while_busy: float | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Summary:
    """What a training job did."""

    model: str
    data: str
    run_dir: str
    seed: int
    precision: str
    device: str
    world: int
    global_batch: int
    epochs: int
    """Begun, the last one perhaps not to its end."""
    steps: int
    train_loss: float
    """Of the last step."""
    test_accuracy: float
    """Share of the test samples whose class has the largest logit."""
    test_top5: float
    test_loss: float
    test_samples: int
    samples_per_s: float | None
    """Of a full step of median duration."""
    measured_step_s: float | None
    """Median over the full steps under this plan after the warm-up; None where a run only evaluated under it."""
    predicted_step_s: float | None
    measured_memory_bytes: tuple[int, ...]
    """Peak per rank."""
    predicted_memory_bytes: tuple[int, ...] | None
    prediction_source: Literal["measured", "estimated"] | None
    """Of the profile behind the prediction."""
    stages: tuple[StageSummary, ...]
    gpu: GpuUse
    total_s: float
    """From the first step to the last evaluation; of what came before a restart, the steps alone."""
    replicas: int = 1
    """Of the plan. The stages stand on the ranks of the first one, and in each of the others alike."""
    ended_early: str | None = None
    """Why the training had fewer steps than it was to have; None: it had all."""
    skipped_steps: int | None = None
    """Those whose gradients were not all finite; None: the loss was not scaled."""
    schema: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        if self.schema != SCHEMA_VERSION:
            raise HybridparError(f"schema {self.schema} is not {SCHEMA_VERSION}; train again with this version")

    def save(self, path: Path) -> None:
        """Write the summary as JSON, all of it or nothing."""
        part = path.with_suffix(".part")
        part.write_text(json.dumps(to_data(self), indent=2) + "\n")
        part.replace(path)

    @staticmethod
    def load(path: Path) -> Summary:
        """Read a summary from JSON; raises HybridparError naming the field."""
        return read_json(Summary, path, HybridparError)


def show(summary: Summary, console: Console) -> None:
    """Print the summary: colours on a terminal, plain text otherwise."""
    console.print(Group(_results(summary), Text(""), _stages(summary), Text(""), _memory(summary)))
    console.print(
        f"Run directory: {summary.run_dir} (hybridpar report shows more of it)", highlight=False, soft_wrap=True
    )


def _results(s: Summary) -> Table:
    table = Table.grid(padding=(0, 2))
    replicas = f", {s.replicas} plan replicas" if s.replicas > 1 else ""
    skipped = f" ({s.skipped_steps} skipped)" if s.skipped_steps else ""
    rows = {
        "Model, data": f"{s.model} on {s.data}, seed {s.seed}, {s.precision}, {s.world} x {s.device}{replicas}",
        "Training": f"{s.steps} steps{skipped} of {s.global_batch} samples in {s.epochs} epochs, "
        f"{s.total_s:.1f} s",
        "Test accuracy": f"{s.test_accuracy:.4f} (top 5 {s.test_top5:.4f}, loss {s.test_loss:.4f}) "
        f"on {s.test_samples} samples",
        "Throughput": "unknown" if s.samples_per_s is None else f"{s.samples_per_s:.1f} samples/s",
        "Step time": f"{_measured(s)}, {_predicted(s)}",
        "GPU": _gpu(s.gpu),
    }
    if s.ended_early is not None:
        rows["Ended early"] = s.ended_early
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _measured(s: Summary) -> str:
    return "no step" if s.measured_step_s is None else f"{_milliseconds(s.measured_step_s)} measured"


def _predicted(s: Summary) -> str:
    if s.predicted_step_s is None:
        return "no prediction"
    error = "" if s.measured_step_s is None else f"{s.predicted_step_s / s.measured_step_s - 1:+.0%}, "
    return f"{_milliseconds(s.predicted_step_s)} predicted ({error}{s.prediction_source} profile)"


def _gpu(use: GpuUse) -> str:
    if use.reason is not None:
        return f"no data: {use.reason}"
    parts = [
        f"{name} {'unknown' if value is None else f'{value:.0%}'}"
        for name, value in (
            ("utilisation", use.utilisation),
            ("occupancy", use.occupancy),
            ("occupancy while busy", use.occupancy_while_busy),
        )
    ]
    return ", ".join(parts)


def _stages(s: Summary) -> Table:
    table = Table("stage", "layers", "degree", "ranks", "micro-batch", box=None, pad_edge=False)
    for stage in s.stages:
        layers = f"{stage.layers[0]}..{stage.layers[1] - 1}"
        ranks = ",".join(map(str, stage.ranks))
        table.add_row(stage.kind, layers, str(stage.degree), ranks, str(stage.micro_batch))
    return table


def _memory(s: Summary) -> Table:
    table = Table("memory", "measured", "predicted", box=None, pad_edge=False)
    predicted = s.predicted_memory_bytes or (None,) * len(s.measured_memory_bytes)
    for rank, (measured, expected) in enumerate(zip(s.measured_memory_bytes, predicted, strict=True)):
        table.add_row(
            f"rank {rank}", _mebibytes(measured), "unknown" if expected is None else _mebibytes(expected)
        )
    return table


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"


def _mebibytes(size_bytes: int | None) -> str:
    return "unknown" if size_bytes is None else f"{size_bytes / 2**20:.1f} MiB"
