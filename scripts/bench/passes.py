"""What gradients that gather in place and fused optimizer steps save, each against PyTorch's default, in turns.

CPU seconds on one thread. `python -m scripts.bench.passes`; on a machine that does nothing else meanwhile.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from hybridpar.host import keep_freed_memory
from hybridpar.model.linear import GatheringLinear
from hybridpar.optimizer_section import OptimizerConfig
from hybridpar.runtime.optimizer import make_factory

ROUNDS = 7
FEATURES = 25_088, 4_096
"""Of VGG's first linear layer."""
SAMPLES = 1, 2, 4, 8, 16, 48
SHAPES = ((1024, 25_088), (1024, 4_096), *[(512, 512, 3, 3)] * 4)
"""Parameters of the timed optimizers: 157 MB."""
OPTIMIZERS = {
    "SGD, momentum": OptimizerConfig("SGD", 0.01, {"momentum": 0.9}),
    "SGD, momentum, weight decay": OptimizerConfig("SGD", 0.01, {"momentum": 0.9, "weight_decay": 1e-4}),
    "AdamW": OptimizerConfig("AdamW", 0.01, {}),
}


def ratio(ours: Callable[[], object], theirs: Callable[[], object]) -> tuple[float, float, float]:
    """Return the median seconds of both, and the median of the rounds' ratios; the first round warms up."""
    rounds = [(_seconds(ours), _seconds(theirs)) for _ in range(ROUNDS + 1)][1:]
    a, b = (statistics.median(column) for column in zip(*rounds, strict=True))
    return a, b, statistics.median(x / y for x, y in rounds)


def _seconds(run: Callable[[], object]) -> float:
    began = time.thread_time()
    run()
    return time.thread_time() - began


def linear(samples: int) -> tuple[float, float, float]:
    """Time forward and backward of a micro-batch that adds to gradients that are there."""
    plain = nn.Linear(*FEATURES)
    gathering = GatheringLinear(plain.weight, plain.bias)
    for parameter in plain.parameters():
        parameter.grad = torch.zeros_like(parameter)
    x, gradient = torch.randn(samples, FEATURES[0], requires_grad=True), torch.randn(samples, FEATURES[1])
    return ratio(lambda: gathering(x).backward(gradient), lambda: plain(x).backward(gradient))


def update(config: OptimizerConfig) -> tuple[float, float, float]:
    """Time an optimizer's step as the runtime takes it, and as torch does by default on a CPU."""
    steps = []
    for options in (config.options, {**config.options, "fused": False}):
        parameters = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        steps.append(make_factory(OptimizerConfig(config.name, config.lr, options))(parameters).step)
    return ratio(*steps)


def main() -> None:
    """Print one line per case."""
    torch.set_num_threads(1)
    keep_freed_memory()
    for samples in SAMPLES:
        a, b, r = linear(samples)
        print(f"linear {FEATURES[0]} x {FEATURES[1]}, {samples:2} samples  {a:.3f} s against {b:.3f} s: {r:.2f}")
    for name, config in OPTIMIZERS.items():
        a, b, r = update(config)
        print(f"{name:38}  {a:.3f} s against {b:.3f} s: {r:.2f}")


if __name__ == "__main__":
    main()
