"""One stage of a placement in the estimates: arrays over micro-batch sizes and cuts, whatever its ranks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from hybridpar.planning.plan import Kind
from hybridpar.planning.tables import Array, Tables


@dataclass(frozen=True, eq=False)
class Choices:
    """Choices of the cuts between stages."""

    cuts: list[tuple[int, ...]]
    """One tuple of layer indices per choice."""
    layers: int
    """Of the chain."""

    @cached_property
    def edges(self) -> npt.NDArray[np.int64]:
        """Layer indices [choice, edge], with the first layer and the end."""
        return np.array([(0, *c, self.layers) for c in self.cuts])


@dataclass(frozen=True, eq=False)
class Part:
    """A stage over all its sizes and cuts: arrays with an axis per stage for sizes, and the last one for cuts."""

    tables: Tables
    choices: Choices
    kind: Kind
    stage: int
    stages: int
    degree: int
    """Segments."""
    width: int
    """Most ranks of a segment."""
    sizes: tuple[int, ...]
    samples: int
    """Per step, of the plan replica."""
    recompute: bool

    @cached_property
    def tail(self) -> bool:
        """Whether its ranks are shards."""
        return self.kind == "tail"

    @cached_property
    def start(self) -> npt.NDArray[np.int64]:
        """First layer, by choice of cuts."""
        return self.choices.edges[:, self.stage]

    @cached_property
    def stop(self) -> npt.NDArray[np.int64]:
        """Layer behind the last, by choice of cuts."""
        return self.choices.edges[:, self.stage + 1]

    def _axis(self, values: Array) -> Array:
        shape = [1] * (self.stages + 1)
        shape[self.stage] = len(values)
        return values.reshape(shape)

    @cached_property
    def size(self) -> Array:
        """Micro-batch sizes, along the stage's axis."""
        return self._axis(np.array(self.sizes, dtype=float))

    @cached_property
    def per_rank(self) -> float:
        """Samples of a rank."""
        return float(self.samples if self.tail else -(-self.samples // self.width))

    @cached_property
    def calls(self) -> Array:
        """Micro-batches of a rank."""
        return np.ceil(self.per_rank / self.size)

    @cached_property
    def chunk(self) -> Array:
        """Samples of the micro-batches that the replicas work on side by side."""
        return self.size * (1 if self.tail else self.width)

    def _pass(self, *, backward: bool) -> Array:
        """Seconds of one chunk through the slowest segment."""
        fraction = 1.0 / self.width if self.tail else 1.0
        rows = []
        for size in self.sizes:
            total = self.tables.times(size, fraction, backward=backward)
            rows.append(total[self.stop] - total[self.start])
        shape = [1] * (self.stages + 1)
        shape[self.stage], shape[-1] = len(self.sizes), len(self.start)
        return np.array(rows).reshape(shape) / self.degree

    @cached_property
    def forward(self) -> Array:
        """Seconds of a chunk's forward through a segment."""
        return self._pass(backward=False)

    @cached_property
    def backward(self) -> Array:
        """Seconds of a chunk's backward through a segment."""
        own = self._pass(backward=True)
        return own + self.forward if self.recompute else own

    @cached_property
    def both(self) -> Array:
        """Seconds of a chunk's two passes."""
        return self.forward + self.backward

    @cached_property
    def held(self) -> Array:
        """Parameter bytes of one rank of a segment, by choice of cuts."""
        held = self.tables.parameters[self.stop] - self.tables.parameters[self.start]
        return np.asarray(held / (self.width if self.tail else self.degree))

    @cached_property
    def bytes(self) -> Array:
        """Likewise, of the parameters that are trained."""
        trained = self.tables.trained[self.stop] - self.tables.trained[self.start]
        return np.asarray(trained / (self.width if self.tail else self.degree))

    @cached_property
    def summed(self) -> Array:
        """Likewise, of what the sums of their gradients take."""
        summed = self.tables.summed[self.stop] - self.tables.summed[self.start]
        return np.asarray(summed / (self.width if self.tail else self.degree))

    @cached_property
    def norms(self) -> Array:
        """Synchronised batch norms of a segment, by choice of cuts."""
        return np.asarray((self.tables.norms[self.stop] - self.tables.norms[self.start]) / self.degree)

    @cached_property
    def figures(self) -> Array:
        """Bytes that they tell each other in a pass, likewise."""
        return np.asarray((self.tables.figures[self.stop] - self.tables.figures[self.start]) / self.degree)

    @cached_property
    def saved(self) -> Array:
        """Bytes per sample that one rank of a segment keeps for its backward, by choice of cuts."""
        held = self.tables.saved[self.stop] - self.tables.saved[self.start]
        return np.asarray(held / (self.width if self.tail else self.degree))

    @cached_property
    def work(self) -> Array:
        """Seconds of all passes of a rank, and of its update."""
        return self.calls * self.both + self.bytes * self.tables.profile.update_s_per_byte

    @cached_property
    def leaving(self) -> Array:
        """Bytes per sample that cross behind the stage, by choice of cuts."""
        return self.tables.crossing[self.stop]

    def least(self, held: int, *, spread: bool) -> Array:
        """Return the least seconds, by choice of cuts, of a rank that holds so many of its segments.

        Those of no segment are a chunk's way through all of them. ``spread``: segments wait for each other.
        """
        key = (held, spread and held > 0)
        if key not in self._least:
            seconds = held * self.work if held else self.degree * self.both
            if held and spread:
                seconds = seconds + (self.degree - 1) * self.both
            self._least[key] = np.asarray(seconds.min(axis=self.stage)).reshape(-1)
        return self._least[key]

    @cached_property
    def _least(self) -> dict[tuple[int, bool], Array]:
        return {}

    @cached_property
    def longest_backward(self) -> Array:
        """Seconds of the longest backward of any size, by choice of cuts."""
        return np.asarray(self.backward.max(axis=self.stage)).reshape(-1)
