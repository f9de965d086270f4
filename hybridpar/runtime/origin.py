"""Where a value that is not finite first arose on a rank: noticed at the end of each block's forward."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from hybridpar.model.keyed import Keys
from hybridpar.model.shared_norm import Peers
from hybridpar.planning.layout import Interval
from hybridpar.planning.program import Program
from hybridpar.runtime.modules import BlockModules


@dataclass(frozen=True, order=True)
class Origin:
    """What gave infinity or not-a-number from finite values. Origins order as the model computes."""

    layer: int
    """In the chain; -1: the input data."""
    samples: Interval
    """Of the micro-batch, within the step."""
    rank: int
    """Of all ranks."""
    micro_batch: int
    stage: str
    """``front``, ``middle.0``, ..., ``tail``."""
    name: str
    """Of the layer, or of the first and last one of those among which it is."""
    weights: bool
    """The layer's own parameters are not finite."""

    def __str__(self) -> str:
        first, last = self.samples[0], self.samples[1] - 1
        where = f"{self.stage}, micro-batch {self.micro_batch} (samples {first}..{last}) on rank {self.rank}"
        if self.layer < 0:
            return f"the input data of {where} is not finite"
        text = f"it arose in layer {self.name} of {where}"
        return f"{text}, whose weights are not finite" if self.weights else text


class Watch:
    """Notices on one rank the first block of a step that gives what is not finite.

    Costs one sum over a block's output. On the CPU the block's layers then run again one by one, before any update
    has spoiled the weights; other devices do not wait for the sum, and the block's layers are named together.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._found: Origin | None = None
        self._sums: list[tuple[Origin, torch.Tensor]] = []

    def begin(self) -> None:
        """Forget the step before."""
        self._found = None
        self._sums.clear()

    @property
    def origin(self) -> Origin | None:
        """Where it arose on this rank in the last step; None: here all was finite, or had arrived as it was."""
        if self._found is None:
            self._found = next((o for o, total in self._sums if not math.isfinite(float(total))), None)
        return self._found

    def see(
        self,
        program: Program,
        modules: BlockModules,
        micro_batch: int,
        samples: Interval,
        values: tuple[torch.Tensor, torch.Tensor],
        keys: Keys | None,
        peers: Peers | None = None,
    ) -> None:
        """Look at (input, output) of a block's forward; ``keys`` and ``peers`` are what it needs to run again."""
        if self._found is not None:
            return
        x, y = values[0].detach(), values[1].detach()
        total = y.sum(dtype=torch.promote_types(y.dtype, torch.float32))
        if y.device.type != "cpu":
            self._sums.append((self._origin(program, modules, micro_batch, samples, None), total))
        elif not math.isfinite(total):
            self._found = self._search(program, modules, micro_batch, samples, x, keys, peers)

    def _search(
        self,
        program: Program,
        modules: BlockModules,
        micro_batch: int,
        samples: Interval,
        x: torch.Tensor,
        keys: Keys | None,
        peers: Peers | None,
    ) -> Origin | None:
        """Run the layers one by one; None where the input was not finite already, or only its sum overflowed."""
        if not _finite(x):
            if modules.block.index:
                return None
            return self._origin(program, modules, micro_batch, samples, -1)
        with torch.no_grad():
            for number, y in enumerate(modules.each(x, keys, peers)):
                if not _finite(y):
                    return self._origin(program, modules, micro_batch, samples, number)
        return None

    def _origin(
        self, program: Program, modules: BlockModules, micro_batch: int, samples: Interval, number: int | None
    ) -> Origin:
        """Describe layer ``number`` of a block; None: one of its layers, -1: its input."""
        (first, last), layers = modules.block.layers, program.chain.layers
        stage = program.positions[modules.block.position].name
        if number is None:
            name = f"{layers[first].name}..{layers[last - 1].name}"
            return Origin(first, samples, self._rank, micro_batch, stage, name, weights=False)
        if number < 0:
            return Origin(-1, samples, self._rank, micro_batch, stage, "", weights=False)
        weights = not all(_finite(p) for p in modules.layers[number].parameters())
        name = layers[first + number].name
        return Origin(first + number, samples, self._rank, micro_batch, stage, name, weights)


def _finite(x: torch.Tensor) -> bool:
    return bool(x.isfinite().all())
