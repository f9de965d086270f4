"""Training a small model under a plan and in a single process, for comparison."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from hybridpar.model.deferred import Source, defer
from hybridpar.model.keyed import KeyedDropout, Keys
from hybridpar.model.trace import Traced, trace
from hybridpar.models.gpt import gpt
from hybridpar.planning.blocks import blocks, positions
from hybridpar.planning.check import check
from hybridpar.planning.compile import compile as compile_program
from hybridpar.planning.plan import Plan
from hybridpar.planning.program import Program
from hybridpar.runtime.communicators import Communicators
from hybridpar.runtime.executor import Executor
from hybridpar.runtime.loss import Loss
from hybridpar.runtime.modules import ModuleFactory, Owned
from hybridpar.runtime.scaler import Scaler
from hybridpar.runtime.step import Metrics
from hybridpar.runtime.undo import Undo
from hybridpar.runtime.update import OptimizerFactory, Updater
from hybridpar.train_section import LossScale
from tests.support.rendezvous import Endpoint

SEED = 7
RATE, MOMENTUM = 0.05, 0.9
MOMENTUM_SGD = partial(torch.optim.SGD, lr=RATE, momentum=MOMENTUM)


@dataclass
class Case:
    """A model with random data."""

    source: Source
    traced: Traced
    steps: int
    samples: tuple[int, ...]
    """Samples of every step."""
    max_norm: float | None = None
    dtype: torch.dtype = torch.float64
    data: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    loss: Loss | None = None
    criterion: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = F.cross_entropy
    """What torch has for ``loss``."""
    scaling: LossScale | None = None
    """How the loss is scaled."""
    optimizer: OptimizerFactory = MOMENTUM_SGD

    def __post_init__(self) -> None:
        if self.data:  # given, or of the case that this one differs from
            return
        generator = torch.Generator().manual_seed(1)
        chain = self.traced.chain
        for n in self.samples:
            x = torch.randn(n, *chain.in_shape, generator=generator, dtype=self.dtype)
            if chain.input_dtype == "int":
                x = (x.abs() * chain.classes / 3).long().clamp(max=chain.classes - 1)
            self.data.append((x, torch.randint(chain.classes, (n, *chain.label_shape), generator=generator)))


def small_vgg(dropout: float = 0.0, classes: int = 7) -> nn.Module:
    """Three convolutions with pooling and three linears, narrow, as torchvision's VGG has them."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 5, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(5, 6, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(3),
        nn.Flatten(),
        nn.Linear(54, 11),
        nn.ReLU(inplace=True),
        nn.Dropout(dropout),
        nn.Linear(11, 9),
        nn.ReLU(inplace=True),
        nn.Dropout(dropout),
        nn.Linear(9, classes),
    )


def small_gpt() -> nn.Module:
    """Two blocks over 5 tokens of 11 kinds, with logits for each of them, and dropout."""
    return gpt(classes=11, in_shape=(5,), width=8, blocks=2, heads=2, dropout=0.3)


def per_token(
    criterion: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], logits: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Call a criterion with one row of logits per label."""
    return criterion(logits.flatten(0, 1), labels.flatten())


def make_case(
    *, dropout: float = 0.0, steps: int = 10, samples: tuple[int, ...] | int = 13, max_norm: float | None = None
) -> Case:
    """Trace the small VGG on 2x6x6 inputs."""
    source = defer(lambda: small_vgg(dropout))
    traced = trace(source.module, (2, 6, 6), "small")
    sizes = (samples,) * steps if isinstance(samples, int) else samples
    return Case(source, traced, len(sizes), sizes, max_norm)


@dataclass
class Trained:
    """What training left behind."""

    losses: list[float]
    parameters: dict[str, torch.Tensor]
    gradients: dict[str, torch.Tensor]
    """Of the last step, clipped if clipping is on."""


def train_single(case: Case) -> Trained:
    """Plain PyTorch: one forward and backward over the whole batch."""
    model = whole_model(case)
    dropouts = [m for m in model.modules() if isinstance(m, KeyedDropout)]
    optimizer = case.optimizer(model.parameters())
    losses, first = [], 0
    for step, (x, y) in enumerate(case.data):
        for d in dropouts:
            d.keys = Keys(SEED, step, torch.arange(len(x)) + first)
        optimizer.zero_grad()
        loss = case.criterion(model(x), y)
        loss.backward()
        if case.max_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), case.max_norm)
        optimizer.step()
        losses.append(loss.item())
        first += len(x)
    per_layer = zip(model, case.traced.names, strict=True)
    names = dict.fromkeys(names[local] for layer, names in per_layer for local, _ in layer.named_parameters())
    named = dict(zip(names, model.parameters(), strict=True))
    gradients = {n: p.grad.clone() for n, p in named.items() if p.grad is not None}
    return Trained(losses, {n: p.detach() for n, p in named.items()}, gradients)


def whole_model(case: Case) -> nn.Sequential:
    """The model with the initial values that all plans start from."""
    factory = ModuleFactory(case.traced, case.source, SEED, case.dtype, torch.device("cpu"))
    return nn.Sequential(*[factory._whole(i)[0] for i in range(len(case.traced.modules))])


def make_executor(
    case: Case, plan: Plan, rank: int, groups: Communicators, decay: float | None = None
) -> Executor:
    """Wire the executor of one of all ranks as the job does."""
    chain, (replica, rank) = case.traced.chain, plan.locate(rank)
    factory = ModuleFactory(case.traced, case.source, SEED, case.dtype, torch.device("cpu"))
    places = positions(plan)
    own = {
        b.index: factory.make(b, places[b.position], rank)
        for b in blocks(plan, chain)
        if rank in places[b.position].ranks
    }
    mine = tuple(p for p in places if rank in p.ranks)
    updater = Updater(
        rank,
        mine,
        own,
        case.optimizer,
        case.max_norm,
        replica=replica,
        decay=decay,
        scaler=Scaler(case.scaling) if case.scaling else None,
        compression=plan.recipe.compression,
        seed=SEED,
        undo=Undo(own.values(), chain) if case.scaling else None,
    )
    device = torch.device("cpu")
    return Executor(rank, own, groups, updater, seed=SEED, dtype=case.dtype, device=device, loss=case.loss)


def run_step(
    case: Case, program: Program, rank: int, executor: Executor, step: int = 0, first: int = 0
) -> Metrics:
    """Run a program on one rank, on the case's data of a step."""
    if isinstance(executor.communicators, Endpoint):
        executor.communicators.step = step
    x, y = case.data[step]
    parts = [torch.arange(a, b) for a, b in program.reads(rank)]
    index = torch.cat(parts) if parts else None
    inputs, labels = (x[index], y[index]) if index is not None else (None, None)
    return executor.run(program, step, first, inputs, labels)


def train_rank(case: Case, plan: Plan, rank: int, executor: Executor) -> list[Metrics]:
    """Run all steps of the case on one of all ranks."""
    metrics, first, (replica, place) = [], 0, plan.locate(rank)
    for step, (x, _) in enumerate(case.data):
        program = compile_program(plan, case.traced.chain, len(x), "train", replica)
        if step == 0 or len(x) != len(case.data[step - 1][0]):
            check(program)
        metrics.append(run_step(case, program, place, executor, step, first))
        first += len(x)
    return metrics


def assemble(per_rank: list[list[Owned]], take: str = "parameter") -> dict[str, torch.Tensor]:
    """Put the slices of all ranks together into whole tensors."""
    parts: dict[str, dict[int, tuple[int | None, torch.Tensor]]] = {}
    for owned in per_rank:
        for o in owned:
            value = o.tensor.detach() if take == "parameter" else o.tensor.grad
            assert value is not None
            parts.setdefault(o.name, {})[o.start] = (o.dim, value)
    result = {}
    for name, slices in parts.items():
        pieces = [slices[start][1] for start in sorted(slices)]
        dim = slices[min(slices)][0]
        result[name] = pieces[0] if dim is None else torch.cat(pieces, dim)
    return result
