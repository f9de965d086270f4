"""Samples: random access to inputs and labels, a whole batch at a time."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from hybridpar.data.keys import Keys, mix
from hybridpar.data.transforms import ImageTransform
from hybridpar.errors import DataError
from hybridpar.generators import all_borrowed, seed_all
from hybridpar.model.chain import Input
from hybridpar.model.inputs import pack

Indices = NDArray[np.int64]

PREPARED_LIMIT_BYTES = 256 * 2**20
"""Images in memory are prepared once if the result is no larger than this, otherwise at every reading."""

_NOISE_SPAN = 2**20  # different offsets into the noise, hence about so many different synthetic samples


class Batch(NamedTuple):
    """Inputs ``(n, *in_shape)`` and labels ``(n, *label_shape)`` of int64, both contiguous in CPU memory."""

    inputs: Tensor
    labels: Tensor


class Samples(Protocol):
    """A data set that is read in batches. What is read depends on index and key alone, not on the batch."""

    @property
    def labels(self) -> Tensor | None:
        """All labels ``(size, *label_shape)``, int64, where they are known without decoding inputs."""

    def __len__(self) -> int: ...

    def read(self, indices: Indices, keys: Keys) -> Batch:
        """Read samples by their indices (n,); ``keys`` (n,) decide what is random. Raises DataError."""


IGNORED = -100
"""The label of samples that no loss counts, unless another is chosen; as in torch."""


def check_labels(labels: Tensor, classes: int, where: str, ignored: int = IGNORED) -> None:
    """Raise DataError unless all ``labels`` lie in ``[0, classes)`` or are ``ignored``; ``where`` names them."""
    wrong = labels[((labels < 0) | (labels >= classes)) & (labels != ignored)]
    if len(wrong):
        raise DataError(
            f"{where} has label {int(wrong[0])} ({len(wrong)} of {labels.numel()} labels are out of range), "
            f"but the model has {classes} classes, 0 to {classes - 1}; give the model more classes or correct the "
            "labels"
        )


def size_of(samples: Samples) -> int | None:
    """Return the number of samples; None: a stream that has no length."""
    return None if getattr(samples, "endless", False) else len(samples)


@dataclass(frozen=True)
class Form:
    """What a sample (tensor, int) of a user's own has to look like; (tensor, tensor) with several labels."""

    in_shape: tuple[int, ...]
    classes: int
    ignored: int = IGNORED
    label_shape: tuple[int, ...] = ()
    inputs: tuple[Input, ...] = ()
    """Of a model that takes several tensors: a sample has a sequence of them, or a mapping by name."""

    def checked(self, sample: Any, what: str) -> tuple[Tensor, Tensor]:
        """Return input and label, int64. Raises DataError for another form; ``what`` names the sample.

        Several inputs become one row (``hybridpar.model.inputs``).
        """
        pair = isinstance(sample, tuple | list) and len(sample) == 2
        if self.inputs and pair and isinstance(sample[0], tuple | list | Mapping):
            sample = pack(self.inputs, sample[0], 0, what), sample[1]
        if not (isinstance(sample, tuple | list) and len(sample) == 2 and isinstance(sample[0], Tensor)):
            raise DataError(f"{what} is a {type(sample).__name__}; return (tensor, int)")
        x, label = sample[0], self._label(sample[1], what)
        if x.shape != self.in_shape:
            raise DataError(
                f"{what} has shape {tuple(x.shape)}, but the model takes {self.in_shape}; resize it in the data "
                "set"
            )
        return x, label

    def batch(self, checked: Sequence[tuple[Tensor, Tensor]], name: str) -> Batch:
        """Return samples as a batch. Raises DataError for labels out of range; ``name`` is the data set's."""
        inputs, labels = (torch.stack(parts) for parts in zip(*checked, strict=True))
        check_labels(labels, self.classes, name, self.ignored)
        return Batch(inputs, labels)

    def _label(self, given: Any, what: str) -> Tensor:
        """Return the label or labels of a sample, ``label_shape``."""
        if not self.label_shape:
            return torch.tensor(int(given), dtype=torch.int64)
        label = torch.as_tensor(given)
        if label.shape != self.label_shape or label.is_floating_point():
            raise DataError(
                f"{what} has labels of shape {tuple(label.shape)} in {label.dtype}, but the model gives logits "
                f"for {self.label_shape} labels; return an int64 tensor of that shape"
            )
        return label.to(torch.int64)


class TensorImages:
    """Images (size, channels, h, w), uint8 or float in [0, 1], and labels (size,), all in memory."""

    def __init__(self, images: Tensor, labels: Tensor, transform: ImageTransform) -> None:
        self.labels: Tensor = labels
        self._transform = transform
        prepared_elements = (
            len(images) * transform.channels * transform.height_width[0] * transform.height_width[1]
        )
        self._prepared = prepared_elements * torch.float32.itemsize <= PREPARED_LIMIT_BYTES
        self._images = transform.prepare(images) if self._prepared else images

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, indices: Indices, keys: Keys) -> Batch:
        """Read samples by their indices (n,), augmented by their keys (n,)."""
        chosen = torch.from_numpy(indices)
        images = self._images.index_select(0, chosen)
        if not self._prepared:
            images = self._transform.prepare(images)
        return Batch(self._transform.finish(images, keys), self.labels.index_select(0, chosen))


class FileImages:
    """Images in files, decoded at every reading.

    ``names`` are paths below ``root``, ``labels`` (size,) belong to them.
    """

    def __init__(self, root: Path, names: Sequence[str], labels: Tensor, transform: ImageTransform) -> None:
        self.labels: Tensor = labels
        self._root = root
        # one block of memory, because every worker process holds a copy
        self._names = np.array([os.fsencode(name) for name in names])
        self._transform = transform

    def __len__(self) -> int:
        return len(self._names)

    def read(self, indices: Indices, keys: Keys) -> Batch:
        """Decode samples by their indices (n,), augmented by their keys (n,); DataError names a bad file."""
        images = torch.from_numpy(np.stack([self._decoded(i) for i in indices.tolist()]))
        prepared = self._transform.prepare(images.permute(0, 3, 1, 2).contiguous())
        return Batch(self._transform.finish(prepared, keys), self.labels[torch.from_numpy(indices)])

    def _decoded(self, index: int) -> NDArray[np.uint8]:
        """Decode one image to (height, width, 3), scaled and cut on the way."""
        path = self._root / os.fsdecode(self._names[index])
        height, width = self._transform.height_width
        try:
            with Image.open(path) as image:
                image.draft("RGB", (width, height))  # a large JPEG is decoded at a smaller scale
                fitted = ImageOps.fit(image.convert("RGB"), (width, height), Image.Resampling.BILINEAR)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:  # damaged, or far too large
            raise DataError(f"cannot decode {path}: {e}; replace or remove the file") from e
        return np.asarray(fitted)


class SyntheticSamples:
    """Standard normal inputs and uniform labels, made from the index; for measuring, there is nothing to learn.

    Each input is a window of one block of noise, so that making it costs a copy, no random number per element.
    """

    def __init__(self, size: int, in_shape: tuple[int, ...], classes: int, split: int) -> None:
        generator = torch.Generator().manual_seed(split)
        elements = int(np.prod(in_shape))
        self._noise = torch.randn(elements + _NOISE_SPAN, generator=generator)
        self._in_shape = in_shape
        self._split = split
        drawn = mix(split, 0, np.arange(size)) % np.uint64(classes)
        self.labels: Tensor = torch.from_numpy(drawn.astype(np.int64))

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, indices: Indices, keys: Keys) -> Batch:  # noqa: ARG002 - nothing is random beyond the index
        """Make samples by their indices (n,)."""
        windows = sliding_window_view(self._noise.numpy(), len(self._noise) - _NOISE_SPAN)
        offsets = mix(self._split, 1, indices) % np.uint64(_NOISE_SPAN)
        inputs = torch.from_numpy(windows[offsets.astype(np.int64)]).view(-1, *self._in_shape)
        return Batch(inputs, self.labels[torch.from_numpy(indices)])


class MapSamples:
    """A map-style data set of (tensor, int), read sample by sample; of (tensor, tensor) with several labels.

    What its ``__getitem__`` draws from the global generators of torch, numpy and ``random`` is keyed by sample.
    Its ``targets``, where it has them, are its labels. Raises DataError for labels that are neither ``ignored``
    nor among the ``classes``, and at reading for a sample that is no (tensor of ``in_shape``, int) or contradicts
    ``targets``. ``name`` appears in messages. Where ``label_shape`` is not (), labels are int64 tensors of it.
    """

    def __init__(
        self,
        dataset: Any,
        in_shape: tuple[int, ...],
        classes: int,
        name: str = "the data set",
        ignored: int = IGNORED,
        label_shape: tuple[int, ...] = (),
        inputs: tuple[Input, ...] = (),
    ) -> None:
        for method in ("__len__", "__getitem__"):
            if not hasattr(dataset, method):
                raise DataError(
                    f"{name} is a {type(dataset).__name__} without {method}; give a map-style data set"
                )
        self._dataset = dataset
        self._form, self._name = Form(tuple(in_shape), classes, ignored, label_shape, inputs), name
        self.labels: Tensor | None = None if label_shape else _targets(dataset)
        if self.labels is not None:
            check_labels(self.labels, classes, name, ignored)

    def __len__(self) -> int:
        return len(self._dataset)

    def read(self, indices: Indices, keys: Keys) -> Batch:
        """Read samples by their indices (n,), with the global generators seeded by their keys (n,)."""
        found = []
        with all_borrowed():
            for index, key in zip(indices.tolist(), keys.tolist(), strict=True):
                seed_all(key)
                found.append(self._form.checked(self._dataset[index], f"sample {index} of {self._name}"))
        batch = self._form.batch(found, self._name)
        self._check_targets(indices, batch.labels)
        return batch

    def _check_targets(self, indices: Indices, labels: Tensor) -> None:
        if self.labels is None:
            return
        listed = self.labels[torch.from_numpy(indices)]
        for i in (listed != labels).nonzero().flatten().tolist():
            raise DataError(
                f"sample {indices[i]} of {self._name} has label {labels[i]}, but its targets[{indices[i]}] is "
                f"{listed[i]}; make the two agree or remove the attribute targets"
            )


def _targets(dataset: Any) -> Tensor | None:
    """Return the labels that a data set lists in ``targets``, as torchvision does, if they are class numbers."""
    targets = getattr(dataset, "targets", None)
    if (
        not isinstance(targets, list | np.ndarray | Tensor)
        or getattr(dataset, "target_transform", None) is not None
    ):
        return None
    numbers = np.asarray(targets)
    if numbers.shape != (len(dataset),) or numbers.dtype.kind not in "iu":
        return None
    return torch.from_numpy(numbers.astype(np.int64))
