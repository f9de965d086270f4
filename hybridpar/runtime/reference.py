"""A single process with a plan's model, data and randomness: what a verification compares with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

from hybridpar.model.deferred import Source
from hybridpar.model.keyed import KeyedDropout, Keys
from hybridpar.model.trace import Traced
from hybridpar.optimizer_section import ParameterGroup
from hybridpar.planning.program import Program
from hybridpar.runtime.groups import grouped, relative_rates
from hybridpar.runtime.update import OptimizerFactory


class Reference:
    """The whole model in one process: one forward and backward over a step's samples, one optimizer.

    Needs memory for all parameters, gradients, optimizer state and activations of a step on ``device``. Layers
    with batch norm run as in the plan, as that is what they are documented to do: by micro-batch, with running
    statistics per replica, or where they are synchronised on all samples that share statistics. All other layers
    see all samples at once.

    Args:
        traced: the model's layers.
        source: initial values.
        optimizer: makes the optimizer of all parameters.
        programs: a step's program of every plan replica, by the step's samples.
        seed: of initial values and dropout.
        dtype: of all floating values.
        device: where it runs.
        max_norm: clips the gradients by their global norm; None: no clipping.
        rate: learning rate by step; None leaves it to the optimizer.
        criterion: torch's own loss of (logits, labels); by default the plain cross-entropy.
        groups: of parameters with options of their own.

    """

    def __init__(
        self,
        traced: Traced,
        source: Source,
        optimizer: OptimizerFactory,
        programs: Callable[[int], tuple[Program, ...]],
        *,
        seed: int,
        dtype: torch.dtype,
        device: torch.device,
        max_norm: float | None = None,
        rate: Callable[[int], float] | None = None,
        criterion: nn.Module | None = None,
        groups: Sequence[ParameterGroup] = (),
    ) -> None:
        self._criterion = (criterion or nn.CrossEntropyLoss()).to(device, dtype)
        self._programs, self._seed, self._dtype, self._device = programs, seed, dtype, device
        self._max_norm, self._rate, self._chain = max_norm, rate, traced.chain
        self._step = 0
        self.parameters: dict[str, nn.Parameter] = {}
        """By full name; a tied one once."""
        self.outputs: list[torch.Tensor] = []
        """Of every layer in the last step, (samples, ...)."""
        self.loss = 0.0
        self._layers: list[nn.Module] = []
        for module, names in zip(traced.modules, traced.names, strict=True):
            self._layers.append(self._made(module, names, source))
        self._replicas: dict[tuple[int, int], nn.Module] = {}
        trained = ((name, p) for name, p in self.parameters.items() if p.requires_grad)
        self._optimizer = optimizer(grouped(trained, groups))
        self._relative = relative_rates(self._optimizer)

    def _made(self, module: nn.Module, names: dict[str, str], source: Source) -> nn.Module:
        def value(name: str) -> torch.Tensor:
            return source.materialize(name, self._seed, self._dtype).to(self._device)

        memo: dict[int, object] = {}
        for local, parameter in module.named_parameters():
            name = names[local]
            if name not in self.parameters:
                self.parameters[name] = nn.Parameter(value(name), requires_grad=parameter.requires_grad)
            memo[id(parameter)] = self.parameters[name]
        for local, buffer in module.named_buffers():
            memo[id(buffer)] = value(names[local])
        return copy.deepcopy(module, memo).train()

    def replica(self, layer: int, rank: int) -> nn.Module:
        """Return a layer with the running statistics of one of all ranks."""
        if (layer, rank) not in self._replicas:
            whole = self._layers[layer]
            shared: dict[int, object] = {id(p): p for p in whole.parameters()}
            self._replicas[layer, rank] = copy.deepcopy(whole, shared)
        return self._replicas[layer, rank]

    def step(
        self, inputs: torch.Tensor, labels: torch.Tensor, first_sample: int, share: float | None = None
    ) -> None:
        """Train on a whole step: inputs (samples, ...), labels (samples, ...); sample ids count from the first's.

        ``share``: of each sample in its input, which is mixed with that of the sample before it.
        """
        if self._rate is not None:
            for group, relative in zip(self._optimizer.param_groups, self._relative, strict=True):
                group["lr"] = self._rate(self._step) * relative
        x = inputs.to(self._device)
        x = x.to(self._dtype) if x.is_floating_point() else x
        ids = torch.arange(first_sample, first_sample + len(x), device=self._device)
        self._optimizer.zero_grad()
        self.outputs = []
        for index in range(len(self._layers)):
            x = (
                self._by_micro_batch(index, x, ids)
                if self._chain.layers[index].batch_norm
                else self._run(self._layers[index], x, ids)
            )
            self.outputs.append(x.detach())
        labels = labels.to(self._device)
        loss = self._mean_loss(x, labels)
        if share is not None:
            loss = loss * share + self._mean_loss(x, labels.roll(1, 0)) * (1.0 - share)
        loss.backward()  # type: ignore[no-untyped-call]
        if self._max_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters.values(), self._max_norm)
        self._optimizer.step()
        self.loss = loss.item()
        self._step += 1

    def _mean_loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Call torch's loss, which takes one row of logits per label."""
        if labels.dim() > 1:
            logits, labels = logits.flatten(0, 1), labels.flatten()
        loss: torch.Tensor = self._criterion(logits, labels)
        return loss

    def _run(self, layer: nn.Module, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        for module in layer.modules():
            if isinstance(module, KeyedDropout):
                module.keys = Keys(self._seed, self._step, ids)
        y: torch.Tensor = layer(x)
        return y

    def _by_micro_batch(self, index: int, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Run a layer on each set of samples that share statistics by itself, on every replica in its order."""
        rows, outputs = [], []
        for rank, own in self._sets(index, len(x)):
            rows.append(own)
            outputs.append(self._run(self.replica(index, rank), x[own], ids[own]))
        return torch.cat(outputs)[torch.cat(rows).argsort()]

    def _sets(self, index: int, samples: int) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield a rank and the samples that share statistics of a layer there, for all such sets in the plan.

        Without synchronisation that is a micro-batch, else a chunk; or one of every plan replica.
        """
        sets: dict[tuple[int, int], list[torch.Tensor]] = {}
        for program in self._programs(samples):
            position = next(p for p in program.positions if p.layers[0] <= index < p.layers[1])
            width, together = program.plan.replica_world, position.meets and self._chain.layers[index].norms
            ranks = [program.replica * width + rank for rank in position.ranks]
            if together:
                replicas = range(program.plan.replicas) if position.joint else (program.replica,)
                self._share(index, members := [k * width + rank for k in replicas for rank in position.ranks])
            for micro_batch, intervals in enumerate(program.micro_batches[position.index]):
                for rank, (start, stop) in zip(ranks, intervals, strict=True):
                    own = torch.arange(program.first + start, program.first + stop, device=self._device)
                    if len(own):
                        sets.setdefault((members[0] if together else rank, micro_batch), []).append(own)
        for (rank, _), parts in sets.items():
            yield rank, torch.cat(parts)

    def _share(self, layer: int, ranks: Sequence[int]) -> None:
        """Let ranks have the same running statistics of a layer."""
        one = self.replica(layer, ranks[0])
        self._replicas.update(((layer, rank), one) for rank in ranks)
