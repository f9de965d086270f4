"""The chain: a model as a list of layers with one tensor crossing between neighbours.

This module describes; it imports no torch, so that planning runs from a saved chain alone.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from hybridpar.errors import ModelError
from hybridpar.schema import to_data

SCHEMA_VERSION = 1

Autocast = Literal["bfloat16", "float16"]
"""What layers compute in where their parameters stay float32, as ``torch.autocast`` has it."""
MemoryFormat = Literal["channels_last"]
"""Order in memory of images and of the weights that make them; by default that of their dims."""
LOWERED_BYTES = 2
"""Per element in one of these."""
DRAWN_ELEMENTS = 2**20
"""Initial values of a parameter that has more are drawn in blocks of so many, each from a key of its own."""
MADE_ELEMENTS = 4 * DRAWN_ELEMENTS
"""Of such a parameter so many, or one row, are made at a time."""


@dataclass(frozen=True)
class Parameter:
    """One parameter of a layer, by its full name in the model."""

    name: str
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Linear:
    """The linear map of a layer that can be sharded by columns or rows."""

    in_features: int
    out_features: int
    bias: bool
    normalized: bool = False
    """It divides its input, and its weight per output, by their lengths: only by columns can it be sharded."""


@dataclass(frozen=True)
class Norm:
    """A batch norm that takes its statistics over all replicas' samples, as a layer's forward calls it."""

    module: str
    """Its path in the layer's module; empty: the layer itself."""
    channels: int
    answers: bool
    """Its backward gives the gradient of its input, for which sums over the replicas are needed."""

    @property
    def figures(self) -> int:
        """Elements of what replicas tell each other: two per channel and a count."""
        return 2 * self.channels + 1


@dataclass(frozen=True)
class Saved:
    """What a layer's forward keeps for its backward, apart from its input, its output and its parameters.

    Counted by distinct storage. ``elements`` have the training's floating dtype, ``bytes`` a dtype of their own
    (indices, masks). The total for b samples is affine in b.
    """

    elements_per_sample: int = 0
    bytes_per_sample: int = 0
    elements: int = 0
    bytes: int = 0

    def total_bytes(self, samples: int, itemsize: int) -> int:
        """Bytes kept for a micro-batch of ``samples`` with ``itemsize`` bytes per floating element."""
        elements = self.elements_per_sample * samples + self.elements
        return elements * itemsize + self.bytes_per_sample * samples + self.bytes


@dataclass(frozen=True)
class Layer:
    """What lies between two neighbouring points of the model where exactly one tensor crosses.

    Shapes leave out dim 0, which is samples.
    """

    name: str
    kind: str
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    flops_per_sample: int
    """Floating point operations of the forward per sample (a multiply-add counts two)."""
    parameters: tuple[Parameter, ...] = ()
    buffer_bytes: int = 0
    saved: Saved = Saved()
    saves_input: bool = False
    """The backward needs the layer's input."""
    saves_output: bool = False
    """The backward needs the layer's output."""
    aliases_input: bool = False
    """The output is a view of the input (flatten, identity)."""
    linear: Linear | None = None
    """Set when the layer is a single linear map over the last dim of its input."""
    channelwise: bool = False
    """Each feature of dim 1 is worked on by itself, so the layer runs on a slice of features unchanged."""
    pointwise: bool = False
    """Each element is worked on by itself (apart from where it stands), so features may lie along any dim."""
    random: Literal["none", "keyed", "unkeyed"] = "none"
    batch_norm: bool = False
    norms: tuple[Norm, ...] = ()
    """Synchronised batch norms, in the order of their calls."""
    lowered: bool = False
    """The output is of the chain's autocast dtype, not of the parameters'."""
    channels_last: bool = False
    """The output lies in memory as (samples, height, width, channels)."""

    @property
    def compilable(self) -> bool:
        """Whether a compiler may see the layer.

        Linear maps gather gradients by themselves, dropout needs keys, synchronised norms communicate.
        """
        return self.linear is None and self.random == "none" and not self.norms

    @cached_property
    def parameter_count(self) -> int:
        """Number of parameter elements."""
        return sum(p.count for p in self.parameters)

    @property
    def in_elements(self) -> int:
        """Elements of the input per sample."""
        return math.prod(self.in_shape)

    @property
    def out_elements(self) -> int:
        """Elements of the output per sample."""
        return math.prod(self.out_shape)


InputKind = Literal["float", "int", "bool"]


@dataclass(frozen=True)
class Input:
    """One of several tensors that a model takes."""

    name: str
    """Of its argument."""
    shape: tuple[int, ...]
    """Of one sample."""
    kind: InputKind = "float"

    @property
    def elements(self) -> int:
        """Elements per sample."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Chain:
    """A model's layers in order. ``tied`` lists parameters that several layers share: (name, layer indices)."""

    model: str
    layers: tuple[Layer, ...]
    tied: tuple[tuple[str, tuple[int, ...]], ...] = ()
    input_dtype: Literal["float", "int"] = "float"
    """Integer inputs (token ids) have 8 bytes per element and need no gradient."""
    frozen: tuple[str, ...] = ()
    """Parameters that are not trained, by their names: they have neither gradients nor optimizer state."""
    autocast: Autocast | None = None
    """The layers compute under ``torch.autocast`` in this dtype, and were described so."""
    inputs: tuple[Input, ...] = ()
    """Of a model that takes several tensors. A sample's lie one after the other in a row of one tensor, which the
    first layer takes; so ``in_shape`` is (elements,)."""
    memory_format: MemoryFormat | None = None
    """The layers' weights lie in this order, and the layers were described so."""
    schema: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        if self.schema != SCHEMA_VERSION:
            raise ModelError(f"chain schema {self.schema} is not {SCHEMA_VERSION}; trace the model again")
        if not self.layers:
            raise ModelError(f"model {self.model} has no layers")
        for a, b in zip(self.layers, self.layers[1:], strict=False):
            if a.out_shape != b.in_shape:
                raise ModelError(f"layer {a.name} gives {a.out_shape} but {b.name} takes {b.in_shape}")

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    @cached_property
    def synchronised(self) -> bool:
        """Whether batch norms take their statistics over all replicas."""
        return any(layer.norms for layer in self.layers)

    @property
    def in_shape(self) -> tuple[int, ...]:
        """Shape of one input sample."""
        return self.layers[0].in_shape

    @property
    def mixable(self) -> bool:
        """Whether all that the model takes are floats, of which there are means."""
        return self.input_dtype == "float" and all(i.kind == "float" for i in self.inputs)

    @property
    def in_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of all tensors that one sample has."""
        return tuple(i.shape for i in self.inputs) or (self.in_shape,)

    @property
    def out_shape(self) -> tuple[int, ...]:
        """Shape of the output for one sample."""
        return self.layers[-1].out_shape

    @property
    def label_shape(self) -> tuple[int, ...]:
        """Shape of one sample's labels: (tokens,) where the output is (tokens, classes), else () for one label."""
        return self.out_shape[:1] if len(self.out_shape) == 2 else ()

    @property
    def labels(self) -> int:
        """Labels per sample."""
        return math.prod(self.label_shape)

    @property
    def classes(self) -> int:
        """Logits per label; of an output that is no row or rows of logits its first size."""
        return self.out_shape[len(self.label_shape)]

    def out_itemsize(self, layer: int, itemsize: int) -> int:
        """Bytes per element of what a layer gives, if parameters have ``itemsize``; -1: of the model's input."""
        return LOWERED_BYTES if layer >= 0 and self.layers[layer].lowered else itemsize

    @property
    def parameter_count(self) -> int:
        """Number of distinct parameter elements."""
        return sum({p.name: p.count for layer in self.layers for p in layer.parameters}.values())

    @cached_property
    def gathered(self) -> tuple[int, ...]:
        """Per layer, the elements of its weight if its backward adds the gradient where it lies, else 0.

        So do linear layers (``hybridpar.model.linear``) whose weight is theirs alone, and trained.
        """
        tied = {name for name, _ in self.tied} | set(self.frozen)
        weights = ((layer.linear, layer.parameters[:1]) for layer in self.layers)
        return tuple(p[0].count if linear and p[0].name not in tied else 0 for linear, p in weights)

    @cached_property
    def trained(self) -> tuple[int, ...]:
        """Per layer, the elements of its parameters that are trained."""
        frozen = set(self.frozen)
        return tuple(sum(p.count for p in layer.parameters if p.name not in frozen) for layer in self.layers)

    @cached_property
    def first_trained(self) -> int:
        """The first layer with parameters to train: no backward goes on before it. 0 where there is none."""
        return next((i for i, count in enumerate(self.trained) if count), 0)

    def shape(self, point: int) -> tuple[int, ...]:
        """Shape per sample of the value that enters layer ``point``, or of the output behind the last layer."""
        return self.layers[point].in_shape if point < len(self.layers) else self.out_shape

    @cached_property
    def axes(self) -> tuple[int, ...]:
        """By point, where in its shape the features are: what shards have slices of.

        Those of images are its channels, which come first. A linear map has them last, on both sides; a pointwise
        layer has them where its neighbours do, above all the one behind it.
        """
        axes = [0]
        for layer in self.layers:
            last = len(layer.out_shape) - 1
            axes.append(last if layer.linear else axes[-1] if layer.pointwise else 0)
        for point, layer in reversed(list(enumerate(self.layers))):
            if layer.linear:
                axes[point] = len(layer.in_shape) - 1
            elif layer.channelwise:
                axes[point] = axes[point + 1] if layer.pointwise else 0
        return tuple(axes)

    def width(self, point: int) -> int:
        """Features of the value at a point."""
        return self.shape(point)[self.axes[point]]

    def _sliceable(self, index: int) -> bool:
        """Whether a layer runs on a slice of features, or is a linear map whose weight is cut."""
        layer, entering, leaving = self.layers[index], self.axes[index], self.axes[index + 1]
        if layer.linear:
            return leaving == len(layer.out_shape) - 1
        return layer.pointwise or (layer.channelwise and entering == leaving == 0)

    @cached_property
    def tail_start(self) -> int:
        """The first layer from which on every layer is a linear map or runs on a slice, and some is linear.

        ``len(layers)`` where the model ends in no such run.
        """
        start = len(self.layers)
        while start > 0 and self._sliceable(start - 1):
            start -= 1
        if not any(layer.linear for layer in self.layers[start:]):
            return len(self.layers)
        return start

    def compiled(self, first: int, last: int) -> tuple[tuple[int, int], ...]:
        """Return the runs of layers in a block that a compiler may see, as far as they have parameters.

        Others, as activations between linear maps, are too little to be worth a compiled function.
        """
        found, start = [], first
        for i in range(first, last + 1):
            if i < last and self.layers[i].compilable:
                continue
            if any(layer.parameters for layer in self.layers[start:i]):
                found.append((start, i))
            start = i + 1
        return tuple(found)

    @cached_property
    def fingerprint(self) -> str:
        """Hash over everything the chain says; a profile or plan made for another chain is noticed by it."""
        data, (own, of_layers) = to_data(self), self._silent()
        for name in own:
            del data[name]
        for layer in data["layers"]:
            for name in of_layers:
                del layer[name]
            if layer["linear"] and not layer["linear"]["normalized"]:
                del layer["linear"]["normalized"]
        text = json.dumps(data, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def _silent(self) -> tuple[list[str], list[str]]:
        """Return the fields of the chain, and of its layers, that tell nothing here.

        They are no part of the fingerprint, so that a model without what they tell of is known by what it was
        before there were such fields.
        """
        own = [name for name in ("frozen", "inputs", "autocast", "memory_format") if not getattr(self, name)]
        of_layers = ["pointwise"]  # which follows from its kind
        of_layers += ["lowered"] * (self.autocast is None)
        of_layers += ["channels_last"] * (self.memory_format is None)
        of_layers += ["norms"] * (not self.synchronised)
        return own, of_layers
