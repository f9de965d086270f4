"""Streams: data sets without random access, which are gone through in order from their beginning.

Every rank that reads opens the stream itself, goes through all of it, and decodes its own samples only. So no rank
waits for another one to read, and what a sample is depends on its position alone: neither on plan and rank, nor on
the processes that read.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import IterableDataset

from hybridpar.data.keys import Keys, mix
from hybridpar.data.sampler import EpochOrder, Order, Positions
from hybridpar.data.samples import Batch, Form, Indices, MapSamples, Samples, size_of
from hybridpar.errors import ConfigError, DataError
from hybridpar.generators import all_borrowed, seed_all

_BLOCK, _OPENING, _NEXT = 4, 5, 6  # what a key is for, beside those of the sampler and of the mixing


@runtime_checkable
class Stateful(Protocol):
    """What can tell how far it has come, and go on from there: a stream's iterator, or its source."""

    def state_dict(self) -> Any:
        """Return where it is, as numbers, strings, bytes, tensors, arrays, and lists, tuples and dicts of them."""

    def load_state_dict(self, state: Any) -> None:
        """Be where ``state`` was told."""


@dataclass(frozen=True)
class Stream:
    """A data set that gives its samples one after the other.

    Raises ConfigError for numbers out of range, DataError for a source that cannot be opened twice.
    """

    source: Any
    """An iterable that begins anew with every ``iter``, or a function without arguments that returns an iterator;
    each time, on every rank, the same samples in the same order. Its method ``set_epoch``, where it has one, is
    called before with the number of the opening, from 0. Where the iterator, or else the source itself, has the
    methods of ``Stateful``, a training that is resumed goes on from such a state: an iterator takes it before its
    first sample, a source before ``iter``."""
    size: int | None = None
    """Samples of an epoch, the first so many of every opening; None: ``len(source)``, and where there is none, the
    stream has no end: it is opened again where it ends, and has no epochs."""
    decode: Callable[[Any], Any] | None = None
    """Makes (tensor, int) of what the source gives, for the samples that a rank works on. What it draws from the
    global generators is keyed by sample. None: the source gives them."""
    shuffle: int = 1
    """Each so many samples in a row are shuffled, anew in every epoch; every rank that reads keeps as many."""

    def __post_init__(self) -> None:
        if self.shuffle < 1 or (self.size is not None and self.size < 1):
            raise ConfigError(f"Stream: size {self.size} and shuffle {self.shuffle} must be at least 1")
        if isinstance(self.source, Iterator) or not (isinstance(self.source, Iterable) or callable(self.source)):
            raise DataError(
                f"a stream's source is a {type(self.source).__name__}, which cannot be gone through twice; give "
                "an object with a method __iter__ that begins anew, or the function that makes the iterator"
            )
        if self.size is None and isinstance(self.source, Sized):
            object.__setattr__(self, "size", len(self.source))

    def open(self, opening: int, state: Any = None) -> Iterator[Any]:
        """Begin anew, for the given time from 0; with a ``state`` of that opening go on from there."""
        if hasattr(self.source, "set_epoch"):
            self.source.set_epoch(opening)
        of_iterator, kept = (None, None) if state is None else copy.deepcopy(state)
        if of_iterator is False and isinstance(self.source, Stateful):
            self.source.load_state_dict(kept)
        iterator = iter(self.source if isinstance(self.source, Iterable) else self.source())
        if of_iterator and isinstance(iterator, Stateful):
            iterator.load_state_dict(kept)
        return iterator

    def state(self, iterator: Iterator[Any]) -> Any:
        """Return whether the iterator or its source tells where it is, and the state; None where neither can."""
        for of_iterator, keeper in ((True, iterator), (False, self.source)):
            if isinstance(keeper, Stateful):
                return of_iterator, copy.deepcopy(keeper.state_dict())
        return None


@dataclass(frozen=True)
class Mark:
    """A place in a stream from which reading may go on."""

    index: int
    """Of the sample that comes next."""
    opening: int
    """The opening that it is of."""
    begun: int
    """Index with which that opening began."""
    state: Any
    """Of the source, which has given all samples of the opening before it."""


def as_stream(dataset: Any) -> Stream | None:
    """Return a data set as a stream, None where it has random access. Raises DataError as ``Stream`` does."""
    if isinstance(dataset, Stream):
        return dataset
    random_access = hasattr(dataset, "__getitem__") and not isinstance(dataset, IterableDataset)
    return None if random_access or not isinstance(dataset, Iterable) else Stream(dataset)


def as_samples(dataset: Any, form: Form, name: str = "the data set") -> Samples:
    """Return a user's data set, map-style or a stream, to be read in batches. Raises DataError."""
    stream = as_stream(dataset)
    if stream is not None:
        return StreamSamples(stream, form, name)
    return MapSamples(dataset, form.in_shape, form.classes, name, form.ignored, form.label_shape, form.inputs)


def require_end(samples: Samples) -> None:
    """Raise DataError for samples that an evaluation would not come to the end of."""
    if size_of(samples) is None:
        raise DataError(
            "a stream without a length cannot be evaluated on, as an evaluation goes through all of it; give "
            "hybridpar.Stream(source, size=...)"
        )


def check_sources(train: Samples, test: Samples) -> None:
    """Raise DataError for one source of two streams that keeps its state itself: it could not tell whose."""
    if not (isinstance(train, StreamSamples) and isinstance(test, StreamSamples)):
        return
    source = train.stream.source
    if source is test.stream.source and isinstance(source, Stateful):
        raise DataError(
            f"the training and the test stream have one source, a {type(source).__name__} whose "
            "state_dict() can tell of one of them only; give the test stream a source object of its own"
        )


def check_workers(samples: Samples, workers: int) -> None:
    """Raise DataError for more processes than may read the samples."""
    if workers > 1 and isinstance(samples, StreamSamples):
        raise DataError(f"data.workers: {workers}, but a stream is read in order, by one process; set it to 1")


def shuffle_of(samples: Samples) -> int | None:
    """Return how many samples of a stream are shuffled with each other; None: they have random access."""
    return samples.stream.shuffle if isinstance(samples, StreamSamples) else getattr(samples, "shuffle", None)


@dataclass(frozen=True)
class StreamOrder(Order):
    """Which sample of a stream stands where in an epoch.

    A sample's index is its position in all openings of the stream, one after the other. ``repeats``: every epoch
    goes through the first opening, as an evaluation does.
    """

    shuffle: int = 1
    repeats: bool = False

    def indices(self, epoch: int, positions: Positions) -> NDArray[np.int64]:
        """Return the index in the stream of the samples at ``positions`` of ``epoch``."""
        first = 0 if self.size is None or self.repeats else epoch * self.size
        if self.shuffle == 1:
            return first + positions
        blocks, places = positions // self.shuffle, positions % self.shuffle
        result = np.empty_like(positions)
        for block in np.unique(blocks).tolist():
            begin, count = block * self.shuffle, self.shuffle
            if self.size is not None:
                count = min(count, self.size - begin)
            inside = blocks == block
            result[inside] = begin + _permutation(self.seed, epoch, block, count)[places[inside]]
        return first + result


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, block: int, count: int) -> NDArray[np.int64]:
    order = np.argsort(mix(seed, epoch, _BLOCK, block, np.arange(count)), kind="stable")
    order.setflags(write=False)
    return order


def order_of(
    samples: Samples, global_batch: int, seed: int = 0, *, train: bool = True, drop_last: bool = False
) -> Order:
    """Return the order of a training's samples, or of an evaluation's: every one once, in order.

    Raises ConfigError or DataError where no step is possible, or an evaluation would not end.
    """
    size = size_of(samples)
    if not train:
        require_end(samples)
        seed, drop_last = 0, False
    shuffle = samples.stream.shuffle if train and isinstance(samples, StreamSamples) else 1
    if isinstance(samples, StreamSamples) or size is None:
        return StreamOrder(size, global_batch, seed, drop_last, shuffle, repeats=not train)
    return EpochOrder(size, global_batch, seed, drop_last, shuffle=train)


class StreamSamples:
    """The samples of a stream, read in order; going back opens it anew, or goes on from the ``mark``.

    What the source draws from the global generators of torch, numpy and ``random`` is keyed by ``seed`` and the
    sample's index. Raises DataError at reading for a sample of another form, and for a stream that ends before its
    ``size``. ``name`` appears in messages.
    """

    labels = None

    def __init__(self, stream: Stream, form: Form, name: str = "the data set", seed: int = 0) -> None:
        self.stream, self.seed = stream, seed
        self._form, self._name = form, name
        self._iterator: Iterator[Any] | None = None
        self._opening = 0
        self._begun = 0
        """Index with which the opening of a stream without a length began."""
        self._next = 0
        """Index of what the iterator gives next."""
        self._held: dict[int, Any] = {}
        """What it gave, by index, as far as it is still needed."""
        self.mark: Mark | None = None
        """The latest place from which the samples after those read last may be read; None: the beginning."""

    @property
    def endless(self) -> bool:
        """Whether it has no length."""
        return self.stream.size is None

    def __len__(self) -> int:
        if self.stream.size is None:
            raise TypeError(f"{self._name} is a stream without a length")
        return self.stream.size

    def seeded(self, seed: int) -> StreamSamples:
        """Return the same samples with another seed, to be read independently of these."""
        return StreamSamples(self.stream, self._form, self._name, seed)

    def read(self, indices: Indices, keys: Keys) -> Batch:
        """Read samples by their indices (n,), decoded with the global generators seeded by their keys (n,).

        Later calls ask for samples of the same block or of later ones: others are forgotten.
        """
        wanted, latest = set(indices.tolist()), int(indices.max())
        floor = self._block_start(latest)
        with all_borrowed():
            if any(index < self._next and index not in self._held for index in wanted):
                self._iterator, self._next, self._begun, self._held = None, 0, 0, {}
            if self._iterator is None:
                self._go_on(self._block_start(min(wanted)))
            for index in self._passed(min(wanted), latest):
                if index == floor:
                    self._set_mark(index)
                item = self._pull(index)
                if index in wanted or index >= floor:
                    self._held[index] = item
            decoded = [self._decoded(i, key) for i, key in zip(indices.tolist(), keys.tolist(), strict=True)]
        self._held = {index: item for index, item in self._held.items() if index >= floor}
        return self._form.batch(decoded, self._name)

    def _go_on(self, index: int) -> None:
        """Begin at the mark, if it is no later than ``index``."""
        mark, size = self.mark, self.stream.size
        if mark is None or mark.index > index or (size is not None and mark.opening != index // size):
            return
        self._next, self._begun = mark.index, mark.begun
        self._open(mark.opening, mark.state)

    def _set_mark(self, index: int) -> None:
        """Note where the source is before it gives the sample of an index, the first of a block."""
        inside = self.stream.size is None or index % self.stream.size != 0
        state = self.stream.state(self._iterator) if self._iterator is not None and inside else None
        if state is not None:
            self.mark = Mark(index, self._opening, self._begun, state)

    def _block_start(self, index: int) -> int:
        """Return the first index of the samples that ``index`` is shuffled with."""
        first = 0 if self.stream.size is None else index // self.stream.size * self.stream.size
        return first + (index - first) // self.stream.shuffle * self.stream.shuffle

    def _passed(self, first: int, last: int) -> range:
        """Return the indices to go through; whole openings of a known size before ``first`` are left out."""
        begin = self._next
        if self.stream.size is not None:
            begin = max(begin, first // self.stream.size * self.stream.size)
        return range(begin, last + 1)

    def _pull(self, index: int) -> Any:
        """Return what the source gives for an index, which is the next one or the first of an opening."""
        size = self.stream.size
        if self._iterator is None or (size is not None and index % size == 0):
            self._open(0 if size is None else index // size)
        self._next = index + 1
        while True:
            seed_all(self._key(_NEXT, index))
            try:
                assert self._iterator is not None
                return next(self._iterator)
            except StopIteration:
                self._end(index)

    def _open(self, opening: int, state: Any = None) -> None:
        seed_all(self._key(_OPENING, opening))
        self._iterator, self._opening = self.stream.open(opening, state), opening

    def _end(self, index: int) -> None:
        """Open a stream without a length again. Raises DataError where it should not have ended."""
        size = self.stream.size
        if size is not None:
            raise DataError(
                f"{self._name} ended after {index % size} samples, but its length is {size}; give "
                "hybridpar.Stream the size that it has on every rank"
            )
        if index == self._begun:
            raise DataError(f"{self._name} is a stream without samples")
        self._begun = index
        self._open(self._opening + 1)

    def _decoded(self, index: int, key: int) -> tuple[Any, Any]:
        item = self._held[index]
        if self.stream.decode is not None:
            seed_all(key)
            item = self.stream.decode(item)
        return self._form.checked(item, f"sample {index} of {self._name}")

    def _key(self, purpose: int, number: int) -> int:
        return int(mix(self.seed, purpose, number)[0])

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what cannot be sent to a process that reads ahead: that begins anew, or at the mark."""
        return {**vars(self), "_iterator": None, "_next": 0, "_begun": 0, "_held": {}}


def mark_of(samples: Samples) -> Mark | None:
    """Return from where a stream may be read on after what was read last; None: from its beginning."""
    return samples.mark if isinstance(samples, StreamSamples) else None
