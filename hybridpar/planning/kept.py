"""What a block's forward keeps for its backward, by storage, and which layer makes and needs what."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

from hybridpar.model.chain import LOWERED_BYTES, Chain
from hybridpar.planning.blocks import Block
from hybridpar.planning.layout import Interval, length


@dataclass(frozen=True)
class Use:
    """One layer's part: storages by their number in the block, of which 0 is the block's input."""

    source: int
    result: int
    """The source's number where the layer gives a view or works in place."""
    saved: tuple[int, ...]
    extra: tuple[int, int, int, int]
    """What it keeps beyond input and output: elements per sample, bytes per sample, elements, bytes."""
    parameters: tuple[int, ...]
    """Elements of each parameter on this shard."""
    trained: tuple[int, ...]
    """Likewise, of those that are trained."""
    gathers: bool
    """The gradient of the first parameter has its place from step to step, and no backward makes another."""

    @property
    def made(self) -> tuple[int, ...]:
        """Elements of the parameters whose gradients a backward makes before it adds them."""
        return self.trained[self.gathers :]


@dataclass(frozen=True, eq=False)
class Kept:
    """A block on one of its ranks."""

    uses: tuple[Use, ...]
    sizes: tuple[int, ...]
    """Elements per sample of every storage."""
    lowered: tuple[bool, ...]
    """Which storages are of the chain's autocast dtype."""
    saved: frozenset[int]
    """The input's storage, and those that a layer saves."""
    first_saver: dict[int, int]
    """By storage the earliest layer that saves it, after whose backward it is free."""

    def bytes(self, storage: int, itemsize: int) -> int:
        """Return the bytes per sample of a storage, if an element of the parameters has ``itemsize``."""
        return self.sizes[storage] * (LOWERED_BYTES if self.lowered[storage] else itemsize)

    @property
    def output(self) -> int:
        """Number of the output's storage."""
        return self.uses[-1].result if self.uses else 0

    @property
    def output_kept(self) -> bool:
        """Whether the output's storage is among what is kept (or is the input's)."""
        return self.output in self.saved

    @property
    def output_is_input(self) -> bool:
        """Whether the block changes its input in place or not at all."""
        return self.output == 0

    @property
    def parameters(self) -> tuple[int, ...]:
        """Elements of each parameter of all layers."""
        return tuple(count for use in self.uses for count in use.parameters)

    @cached_property
    def gathered(self) -> tuple[int, ...]:
        """Elements of each weight whose gradient has its place from step to step."""
        return tuple(use.parameters[0] for use in self.uses if use.gathers)

    def inside(self, samples: int, itemsize: int) -> list[int]:
        """Return the bytes of every storage kept, apart from the input's and the output's."""
        found = [self.bytes(s, itemsize) * samples for s in self.saved if s not in (0, self.output)]
        return found + [extra_bytes(use, samples, itemsize) for use in self.uses]


def extra_bytes(use: Use, samples: int, itemsize: int) -> int:
    """Return the bytes that a layer keeps beyond its input and output."""
    elements, own_bytes, constant, constant_bytes = use.extra
    return (elements * samples + constant) * itemsize + own_bytes * samples + constant_bytes


def kept(block: Block, shard: int, chain: Chain) -> Kept:
    """Follow the storages through a block: views share one, and what is saved twice counts once."""
    return _sharded(block, shard, chain) if block.spans else _whole(block.layers, chain)


@lru_cache(maxsize=4096)
def _whole(layers: Interval, chain: Chain) -> Kept:
    """Return what a block keeps that is not sharded, whatever its place in the plan."""
    return _followed(Block(0, 0, layers), 0, chain)


@lru_cache(maxsize=4096)
def _sharded(block: Block, shard: int, chain: Chain) -> Kept:
    return _followed(block, shard, chain)


def _followed(block: Block, shard: int, chain: Chain) -> Kept:
    entering = length(block.features(chain, shard, "in")) * block.trailing(chain, "in")
    current, sizes, uses, first_saver = 0, [entering], list[Use](), dict[int, int]()
    lowered = [block.layers[0] > 0 and chain.layers[block.layers[0] - 1].lowered]
    for offset, layer in enumerate(chain.layers[slice(*block.layers)]):
        index = block.layers[0] + offset
        share = length(block.spans[shard][offset].outputs) / chain.width(index + 1) if block.spans else 1.0
        source = current
        if not layer.aliases_input:
            current = len(sizes)
            sizes.append(round(layer.out_elements * share))
            lowered.append(layer.lowered)
        saved = dict.fromkeys([source] * layer.saves_input + [current] * layer.saves_output)
        for storage in saved:
            first_saver.setdefault(storage, offset)
        own = layer.saved
        extra = (
            round(own.elements_per_sample * share),
            round(own.bytes_per_sample * share),
            own.elements,
            own.bytes,
        )
        fraction = block.fraction(chain, shard, index)
        parameters = tuple(round(p.count * fraction) for p in layer.parameters)
        frozen = set(chain.frozen)
        own_trained = zip(layer.parameters, parameters, strict=True)
        trained = tuple(count for p, count in own_trained if p.name not in frozen)
        gathers = chain.gathered[index] > 0
        uses.append(Use(source, current, tuple(saved), extra, parameters, trained, gathers))
    return Kept(tuple(uses), tuple(sizes), tuple(lowered), frozenset(first_saver) | {0}, first_saver)
