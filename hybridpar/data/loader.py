"""What one rank reads of every step."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterator
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import BaseContext
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from hybridpar.data.keys import Keys
from hybridpar.data.mixing import Mix, Mixing
from hybridpar.data.sampler import Order
from hybridpar.data.samples import Batch, Samples, size_of
from hybridpar.data.stream import Mark, StreamSamples, check_workers, mark_of
from hybridpar.errors import DataError

Intervals = Callable[[int], tuple[tuple[int, int], ...]]


class _Request(NamedTuple):
    indices: NDArray[np.int64]
    keys: Keys
    pairs: NDArray[np.int64] | None = None
    """(2, n): which of them each sample is, and with which one it is mixed; None: they are not mixed."""
    mix: Mix | None = None

    def read(self, samples: Samples) -> Batch:
        """Read the samples, and mix them."""
        batch = samples.read(self.indices, self.keys)
        if self.pairs is None or self.mix is None:
            return batch
        first, second = torch.from_numpy(self.pairs)
        inputs = batch.inputs
        return Batch(self.mix.apply(inputs[first], inputs[second]), batch.labels[first])


class _Requests:
    """What to read in each step of an epoch, in order; steps in which nothing is read are left out."""

    def __init__(self, order: Order, intervals: Intervals, mixing: Mixing | None = None) -> None:
        self.order, self.mixing = order, mixing
        self.epoch = 0
        self.start_step = 0
        self._intervals = intervals
        self._work: dict[int, NDArray[np.int64]] = {}

    @property
    def steps(self) -> range:
        """The steps from the first that is wanted to the end of the epoch."""
        return range(self.start_step, self.order.steps)

    @property
    def reads(self) -> bool:
        """Whether the rank reads anything, in whatever step."""
        return any(len(self._of(count)) for count in self.order.counts)

    def work(self, step: int) -> NDArray[np.int64]:
        """Return the work numbers that the rank reads, one interval after the other; may be empty."""
        return self._of(self.order.count(step))

    def _of(self, count: int) -> NDArray[np.int64]:
        """Return those of a step of so many samples."""
        if count not in self._work:
            intervals = self._intervals(count)
            assert all(0 <= start <= stop <= count for start, stop in intervals), (intervals, count)
            parts = [np.arange(start, stop) for start, stop in intervals]
            self._work[count] = np.concatenate([np.arange(0), *parts])
        return self._work[count]

    def at(self, step: int) -> _Request:
        """Return what to read in ``step``."""
        work, pairs, mixed = self.work(step), None, None
        if self.mixing is not None:
            # Each with the one before it in the step; those of an interval are there but for the first one's.
            both = np.stack([work, (work - 1) % self.order.count(step)])
            work = np.unique(both)
            pairs, mixed = np.searchsorted(work, both), self.mixing.of(self.epoch, step)
        positions = self.order.start(step) + work
        order, epoch = self.order, self.epoch
        return _Request(order.indices(epoch, positions), order.keys(epoch, positions), pairs, mixed)

    def __iter__(self) -> Iterator[_Request]:
        return (self.at(step) for step in self.steps if len(self.work(step)))


class _Result(NamedTuple):
    """What a worker has read, and where it is in a stream then."""

    batch: Batch
    mark: Mark | None


class _Reader(Dataset[_Result | DataError]):
    """Reads one request in a worker; an error of the data comes back as a value, without a traceback."""

    def __init__(self, samples: Samples) -> None:
        self._samples = samples

    def __getitem__(self, request: _Request) -> _Result | DataError:
        try:
            return _Result(request.read(self._samples), mark_of(self._samples))
        except DataError as e:
            return e


class StepLoader:
    """Reads, for one rank, the samples that the rank works on in each step.

    Iterating gives for every step of the epoch a Batch of inputs and labels, (n, ...) each, in the order
    of the intervals, or None where the rank reads nothing. ``intervals`` maps the step's number of samples (the
    global batch, or fewer in a partial last step) to half-open intervals of work numbers within the step; the
    sample with work number w has the id ``order.start(step) + w``. The tensors depend on order, epoch and
    intervals alone, not on ``workers``.

    With ``workers`` > 0 as many processes read up to ``prefetch`` steps each ahead. They live until ``close`` (or
    the end of a ``with`` block), across epochs, and start without a copy of this process's memory, because forking
    a process that has threads may hang; so a script that starts them needs ``if __name__ == "__main__":``, and the
    samples must be picklable. ``pin`` puts the tensors into page-locked memory, for copies to a CUDA device.

    With ``mixing`` inputs are mixed with those of the samples before them in the step; labels stay their own.

    A stream is read by one process at most.

    One iteration at a time: a new one, ``set_epoch`` or ``close`` ends the one before. Raises DataError when the
    order is for another number of samples, and while iterating for samples that cannot be read.
    """

    def __init__(
        self,
        dataset: Samples,
        order: Order,
        intervals: Intervals,
        *,
        workers: int = 0,
        pin: bool = False,
        prefetch: int = 2,
        mixing: Mixing | None = None,
    ) -> None:
        if (size := size_of(dataset)) != order.size:
            raise DataError(
                f"the order is for {order.size} samples, but the data set has {size}; give the order the size of "
                "the data set"
            )
        check_workers(dataset, workers)
        self._samples = dataset.seeded(order.seed) if isinstance(dataset, StreamSamples) else dataset
        self._requests = _Requests(order, intervals, mixing)
        self._workers = workers
        self._pin = pin
        self._prefetch = prefetch
        self._loader: DataLoader[_Result | DataError] | None = None
        self._results: Iterator[Any] | None = None
        self._iteration = 0
        self._mark: Mark | None = None

    def __len__(self) -> int:
        return len(self._requests.steps)

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        """Let the next iteration be over ``epoch``, from ``start_step`` on."""
        assert 0 <= start_step <= self._requests.order.steps, start_step
        self._iteration += 1
        self._requests.epoch = epoch
        self._requests.start_step = start_step

    @property
    def mark(self) -> Mark | None:
        """From where a stream may be read on after the step that was given last; None: from its beginning."""
        return self._mark

    def go_on(self, mark: Mark) -> None:
        """Let a stream, of which nothing was read yet, be opened at a mark. Other samples need none."""
        if isinstance(self._samples, StreamSamples):
            self._mark = self._samples.mark = mark

    def __iter__(self) -> Iterator[Batch | None]:
        self._iteration += 1
        if not self._workers or not self._requests.reads:
            return self._read_here(self._iteration)
        if self._loader is None:
            self._loader = self._started()
        self._results = iter(self._loader)
        return self._read_ahead(self._iteration)

    def _read_here(self, iteration: int) -> Iterator[Batch | None]:
        for step in self._requests.steps:
            self._check_current(iteration)
            if not len(self._requests.work(step)):
                yield None
                continue
            inputs, labels = self._requests.at(step).read(self._samples)
            self._mark = mark_of(self._samples)
            yield Batch(inputs.pin_memory(), labels.pin_memory()) if self._pin else Batch(inputs, labels)

    def _read_ahead(self, iteration: int) -> Iterator[Batch | None]:
        for step in self._requests.steps:
            self._check_current(iteration)
            if not len(self._requests.work(step)):
                yield None
                continue
            assert self._results is not None
            result = next(self._results)
            if isinstance(result, DataError):
                raise result
            batch, self._mark = result
            yield Batch(*batch)

    def _check_current(self, iteration: int) -> None:
        if iteration != self._iteration:
            raise RuntimeError("this iteration was ended by a later one, by set_epoch or by close; iterate anew")

    def _started(self) -> DataLoader[_Result | DataError]:
        return DataLoader(
            _Reader(self._samples),
            batch_size=None,  # a request is a batch already
            sampler=self._requests,
            collate_fn=_unchanged,
            num_workers=self._workers,
            prefetch_factor=self._prefetch,
            persistent_workers=True,
            pin_memory=self._pin,
            multiprocessing_context=_worker_context(),
            generator=torch.Generator(),  # else every iteration would draw from the global one
        )

    def close(self) -> None:
        """End the workers; a later iteration starts new ones."""
        self._iteration += 1
        # the workers end when the last reference to the loader's iterator goes
        self._results = None
        self._loader = None

    def __enter__(self) -> StepLoader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _unchanged(result: Any) -> Any:
    return result


def _worker_context() -> BaseContext:
    """Return how workers start: forked from a process that has no threads and has imported what reading needs."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([_Reader.__module__])
    # torchrun sends SIGTERM to whole process groups. The trainer then ends after a step, which needs its readers:
    # they and the server that forks them inherit that the signal is held back.
    resource_tracker.ensure_running()  # which the server needs, and which lets the signal through again
    held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
    return context
