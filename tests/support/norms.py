"""Models with batch norms, trained with statistics over all replicas, and what a single process makes of them."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from torch import nn

from hybridpar.model.deferred import defer
from hybridpar.model.keyed import KeyedDropout, Keys
from hybridpar.model.trace import trace
from hybridpar.planning.compile import compile as compile_program
from hybridpar.planning.plan import Plan, Stage
from hybridpar.runtime.communicators import Communicators
from hybridpar.runtime.modules import BlockModules
from hybridpar.runtime.step import Metrics
from tests.support.plans import make_plan
from tests.support.rendezvous import run_strictly
from tests.support.threads import run_ranks
from tests.support.training import (
    MOMENTUM,
    RATE,
    SEED,
    Case,
    Trained,
    assemble,
    make_executor,
    train_rank,
    whole_model,
)

BATCH, STEPS, RELATIVE, CLASSES = 14, 4, 1e-10, 5


def vgg_bn(dropout: float = 0.4) -> nn.Module:
    """Norms are layers of their own; the last one has a vector per sample."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 6, 3, padding=1),
        nn.BatchNorm2d(6, momentum=None),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 5, 3, padding=1),
        nn.BatchNorm2d(5, affine=False),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(20, 8),
        nn.BatchNorm1d(8, momentum=0.3),
        nn.ReLU(inplace=True),
        nn.Dropout(dropout),
        nn.Linear(8, CLASSES),
    )


class Residual(nn.Module):
    """A block with three norms, one of them in the branch that autograd goes through in between."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.down = None
        if stride > 1:
            self.down = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + (x if self.down is None else self.down(x)))


def resnet() -> nn.Module:
    """Norms are inside of layers, apart from the first."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        Residual(4, 4, 1),
        Residual(4, 6, 2),
        Residual(6, 6, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 7),
        nn.ReLU(),
        nn.Linear(7, CLASSES),
    )


BUILDERS = {"vgg_bn": vgg_bn, "resnet": resnet}


@cache
def case_of(
    name: str,
    samples: tuple[int, ...] = (BATCH,) * STEPS,
    max_norm: float | None = None,
    *,
    synchronised: bool = True,
    frozen: int = 0,
) -> Case:
    """Make a case whose first ``frozen`` modules are not trained."""

    def build() -> nn.Module:
        model = BUILDERS[name]()
        for module in list(model)[:frozen]:
            module.requires_grad_(False)
        return nn.SyncBatchNorm.convert_sync_batchnorm(model) if synchronised else model

    source = defer(build)
    return Case(source, trace(source.module, (2, 6, 6), name), len(samples), samples, max_norm)


def sets_of(plan: Plan, case: Case, samples: int, layer: int) -> list[tuple[int, list[int]]]:
    """Return the sets of samples that share the statistics of a layer in a step, written down anew.

    Each with the plan replica that has it. They are the chunks of a position; or, where every plan replica has all
    its samples of a full step in one, those of all replicas together.
    """
    full, programs = (
        [compile_program(plan, case.traced.chain, n, "train", k) for k in range(plan.replicas)]
        for n in (plan.global_batch, samples)
    )
    index = next(p.index for p in full[0].positions if p.layers[0] <= layer < p.layers[1])
    if plan.replicas > 1 and all(len(p.micro_batches[index]) == 1 for p in full):
        return [(0, list(range(samples)))]
    return [
        (p.replica, [p.first + n for interval in chunk for n in range(*interval)])
        for p in programs
        for chunk in p.micro_batches[index]
    ]


class Chunks:
    """A single process with torch's own batch norms, each run on one set of samples after the other.

    All other layers see whole batches. ``buffers`` are those of every plan replica.
    """

    def __init__(self, plan: Plan, case: Case, plain: Case) -> None:
        self.plan, self.case, self.plain = plan, case, plain
        whole = list(whole_model(plain))
        names = plain.traced.names
        self.parameters = {
            own[local]: p for layer, own in zip(whole, names, strict=True) for local, p in layer.named_parameters()
        }
        self.layers = [[_with_own_buffers(layer) for layer in whole] for _ in range(plan.replicas)]

    def train(self) -> Trained:
        """Run all steps of the case."""
        trained = {n: p for n, p in self.parameters.items() if p.requires_grad}
        optimizer = torch.optim.SGD(trained.values(), lr=RATE, momentum=MOMENTUM)
        losses, first = [], 0
        for step, (inputs, labels) in enumerate(self.case.data):
            optimizer.zero_grad()
            loss = self.case.criterion(self._logits(inputs, step, first), labels)
            loss.backward()
            if self.case.max_norm is not None:
                nn.utils.clip_grad_norm_(trained.values(), self.case.max_norm)
            optimizer.step()
            losses.append(loss.item())
            first += len(inputs)
        gradients = {n: p.grad.clone() for n, p in trained.items() if p.grad is not None}
        return Trained(losses, {n: p.detach() for n, p in self.parameters.items()}, gradients)

    def _logits(self, x: torch.Tensor, step: int, first: int) -> torch.Tensor:
        for index, layer in enumerate(self.layers[0]):
            for module in layer.modules():
                if isinstance(module, KeyedDropout):
                    module.keys = Keys(SEED, step, torch.arange(len(x)) + first)
            if not self.plain.traced.chain.layers[index].batch_norm:
                x = layer(x)
                continue
            sets = sets_of(self.plan, self.case, len(x), index)
            parts = [self.layers[replica][index](x[rows]) for replica, rows in sets]
            x = torch.cat(parts)[torch.tensor([n for _, rows in sets for n in rows]).argsort()]
        return x

    def buffers(self, layer: int, replica: int) -> dict[str, torch.Tensor]:
        """Return a layer's buffers by their names in the model, on a plan replica."""
        sets = sets_of(self.plan, self.case, self.plan.global_batch, layer)
        joint = self.plan.replicas > 1 and len(sets) == 1
        names = self.plain.traced.names[layer]
        return {names[n]: b for n, b in self.layers[0 if joint else replica][layer].named_buffers()}


def _with_own_buffers(layer: nn.Module) -> nn.Module:
    return copy.deepcopy(layer, {id(p): p for p in layer.parameters()})


def plan_for(case: Case, *stages: Stage, **fields: object) -> Plan:
    """A plan of the case's model on as many ranks as its stages name."""
    world = (1 + max(r for s in stages for r in s.ranks)) * int(fields.get("replicas", 1))  # type: ignore[call-overload]
    return make_plan(case.traced.chain, *stages, world=world, global_batch=BATCH, **fields)


def assert_chunks(plan: Plan, case: Case, plain: Case, *, gloo: bool = False) -> None:
    """Losses, last gradients, parameters and every rank's buffers are those of the single process."""
    chunks = Chunks(plan, case, plain)
    single = chunks.train()

    def body(rank: int, communicators: Communicators) -> tuple[list[Metrics], dict[int, BlockModules]]:
        executor = make_executor(case, plan, rank, communicators)
        return train_rank(case, plan, rank, executor), executor.blocks

    results = run_ranks(plan, body) if gloo else run_strictly(plan.world, body, plan.replica_world)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    for metrics, _ in results:  # type: ignore[misc]
        assert [m.loss for m in metrics] == pytest.approx(single.losses, rel=RELATIVE)
    owned = [[o for m in blocks.values() for o in m.owned] for _, blocks in results]  # type: ignore[misc]
    parameters = assemble(owned[: plan.replica_world])
    gradients = assemble(
        [[o for o in own if o.tensor.requires_grad] for own in owned[: plan.replica_world]], "gradient"
    )
    assert gradients.keys() == single.gradients.keys()
    for name, expected in single.parameters.items():
        assert near(parameters[name], expected), f"parameter {name}"
    for name, expected in single.gradients.items():
        # What comes before a norm has no gradient along its mean, so that a bias has none but rounding.
        assert near(gradients[name], expected, single.gradients), f"gradient of {name}"
    for rank, (_, blocks) in enumerate(results):  # type: ignore[misc]
        assert_buffers(chunks, blocks, rank, plan.locate(rank)[0])


def assert_buffers(chunks: Chunks, blocks: dict[int, BlockModules], rank: int, replica: int) -> None:
    """A rank's buffers are those of its plan replica in the single process."""
    for modules in blocks.values():
        for index, layer in zip(range(*modules.block.layers), modules.layers, strict=True):
            expected = chunks.buffers(index, replica)
            names = chunks.plain.traced.names[index]
            for local, buffer in layer.named_buffers():
                assert near(buffer, expected[names[local]]), f"{names[local]} on rank {rank}"


def near(actual: torch.Tensor, expected: torch.Tensor, among: dict[str, torch.Tensor] | None = None) -> bool:
    """Whether values agree, relative to the largest of them (or of all those ``among`` which they are)."""
    scale = max(float(t.abs().max()) for t in (among or {"": expected}).values())
    return float((actual - expected).abs().max()) <= RELATIVE * scale
