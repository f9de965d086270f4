"""The log of a training, and the summary that is made of it."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from pathlib import Path

import torch

from hybridpar.config import Config
from hybridpar.errors import HybridparError
from hybridpar.monitor import summary as recording
from hybridpar.monitor.sampler import Monitor
from hybridpar.planning.plan import Plan
from hybridpar.report.history import warm_up
from hybridpar.report.summary import GpuUse, StageSummary, Summary
from hybridpar.runtime.evaluation import Evaluation


@dataclass
class Log:
    """What a summary needs from the steps and the evaluations of one process."""

    steps: list[tuple[int, float]] = field(default_factory=list)
    """Samples and seconds of every step under the present plan, also before this process began."""
    loss: float = 0.0
    skipped: int | None = None
    """Steps that left the parameters as they were; None: the loss is not scaled."""
    epochs: int = 0
    evaluation: Evaluation | None = None
    measured_since_s: float = 0.0
    """Seconds since the epoch, at the end of this process's warm-up."""
    total_s: float = 0.0
    """As in the summary."""
    stopped: bool = False
    """Whether a signal ended the training before its last step."""
    ended_early: str | None = None
    """What else ended it there."""

    def typical(self) -> tuple[int, float] | None:
        """Return the samples of a full step, and its median seconds after the warm-up; None: no step was made."""
        if not self.steps:
            return None
        full = max(samples for samples, _ in self.steps)
        times = [seconds for samples, seconds in self.steps if samples == full]
        return full, statistics.median(times[warm_up(len(times)) :])


def summarise(
    config: Config,
    plan: Plan,
    folder: Path,
    log: Log,
    steps: int,
    memory: list[int],
    monitor: Monitor,
    device: torch.device,
) -> Summary:
    """Return the summary of a run in ``folder`` after ``steps`` steps, and write it there.

    ``memory`` is the peak in bytes of every rank.
    """
    prediction = plan.prediction
    assert log.evaluation is not None
    typical = log.typical()
    cuda = device.type == "cuda"
    summary = Summary(
        model=config.model.name,
        data=config.data.name,
        run_dir=str(folder),
        seed=config.train.seed,
        precision=plan.precision,
        device=torch.cuda.get_device_name(device) if cuda else "cpu",
        world=plan.world,
        replicas=plan.replicas,
        global_batch=plan.global_batch,
        epochs=log.epochs,
        steps=steps,
        train_loss=log.loss,
        test_accuracy=log.evaluation.top1,
        test_top5=log.evaluation.top5,
        test_loss=log.evaluation.loss,
        test_samples=log.evaluation.samples,
        samples_per_s=typical[0] / typical[1] if typical else None,
        measured_step_s=typical[1] if typical else None,
        predicted_step_s=prediction.step_s if prediction else None,
        measured_memory_bytes=tuple(memory),
        predicted_memory_bytes=prediction.memory_bytes * plan.replicas if prediction else None,
        prediction_source=prediction.source if prediction else None,
        stages=tuple(StageSummary(s.kind, s.layers, s.degree, s.ranks, s.micro_batch) for s in plan.stages),
        gpu=_gpu_use(folder, log, monitor),
        total_s=log.total_s,
        ended_early=log.ended_early,
        skipped_steps=log.skipped,
    )
    summary.save(folder / "summary.json")
    return summary


def _gpu_use(folder: Path, log: Log, monitor: Monitor) -> GpuUse:
    try:
        seen = recording.summarise(*sorted(folder.glob("monitor*.jsonl")), since_s=log.measured_since_s)
    except HybridparError as e:  # a damaged recording must not take a whole training's summary along
        return GpuUse(reason=str(e))
    if seen is None or seen.total is None:
        return GpuUse(reason=monitor.reason or "the training was shorter than one sample of the monitor")
    total = seen.total
    return GpuUse(total.mean_utilisation, total.mean_occupancy, total.mean_occupancy_while_busy)
