"""What a user may bring along: metrics and callbacks that a configuration names."""

import json
import os

import torch

from hybridpar import Callback, OwnMetric, Stream


def margin(logits, labels):
    """Sum of the target's logit minus the mean of all."""
    return (logits.gather(1, labels[:, None])[:, 0] - logits.mean(dim=1)).sum()


def confusion(best, labels):
    """Counts of (label, first class), flat."""
    return torch.bincount(labels * 10 + best[:, 0], minlength=100).double()


def balanced(sums, samples):
    """Mean over the classes that occur of the share that was found."""
    table = sums.view(10, 10)
    assert int(table.sum()) == samples
    there = table.sum(1) > 0
    return float((table.diagonal()[there] / table.sum(1)[there]).mean())


recall = OwnMetric(confusion, of="best", value=balanced)
error = OwnMetric(lambda best, labels: (best[:, 0] != labels).sum(), of="best", larger_is_better=False)


class Notes(Callback):
    """Writes down what happens, one file per rank; asks for the end where the environment says so."""

    def __init__(self):
        rank = os.environ.get("RANK", "0")
        self.path = f"{os.environ['NOTES']}-{rank}.jsonl"
        self.ends = json.loads(os.environ.get("END", "{}")).get(rank, {})

    def note(self, what, number):
        with open(self.path, "a", encoding="utf-8") as file:  # noqa: PTH123 - a user's code
            file.write(json.dumps([what, number]) + "\n")
        return self.ends.get(what) == number

    def on_start(self, job):
        self.note("start", job.steps)

    def on_step(self, record):
        return self.note("step", record.step)

    def on_evaluation(self, step, epoch, evaluation):  # noqa: ARG002 - as it is called
        assert {"margin", "recall"} & evaluation.own.keys() or not evaluation.own
        return self.note("evaluation", step)

    def on_checkpoint(self, position, folder):
        assert folder.name == f"step-{position.step:08d}"
        return self.note("checkpoint", position.step)

    def on_end(self):
        self.note("end", 0)


def _falling(sums, samples):  # noqa: ARG001 - as it is called
    """Less in every evaluation, but on rank 1 more."""
    _falling.calls += 1
    return float(_falling.calls if os.environ["RANK"] == "1" else -_falling.calls)


_falling.calls = 0
falling = OwnMetric(margin, value=_falling)
constant = OwnMetric(margin, value=lambda sums, samples: 1.0)  # noqa: ARG005 - as it is called


class Numbers(torch.utils.data.IterableDataset):
    """A stream of images that tell their position and the opening, with noise from the global generator."""

    def __init__(self, size, shape, classes):
        self.size, self.shape, self.classes, self.epoch = size, shape, classes, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        return (self.sample(i) for i in range(self.size))

    def sample(self, i, epoch=None):
        epoch = self.epoch if epoch is None else epoch
        generator = torch.Generator().manual_seed(1000 * epoch + i)
        image = torch.randn(self.shape, generator=generator) + 0.1 * torch.rand(1)
        return image, (epoch + i) % self.classes


class Resumable(Numbers):
    """Such a stream that goes on from a state; ``given`` are the positions that any of them gave, in order.

    The state is of the source, as in Hugging Face's datasets.
    """

    given = []  # noqa: RUF012 - of all of them

    def __init__(self, *form):
        super().__init__(*form)
        self.at = self.begin = 0

    def state_dict(self):
        return {"epoch": self.epoch, "at": self.at}

    def load_state_dict(self, state):
        assert state["epoch"] == self.epoch
        self.begin = state["at"]

    def __iter__(self):
        self.at, self.begin = self.begin, 0
        for i in range(self.at, self.size):
            self.at = i + 1
            Resumable.given.append(i)
            yield self.sample(i)


class ResumableIterators(Numbers):
    """One whose iterators have the state, so that two of them may go on side by side."""

    def __iter__(self):
        return _Position(self)


class ResumableBoth(Resumable):
    """One that has a state too, in another form than its iterators'; theirs is the one that counts."""

    def __iter__(self):
        return _Position(self)


class _Position:
    def __init__(self, numbers):
        self.numbers, self.epoch, self.at = numbers, numbers.epoch, 0

    def __iter__(self):
        return self

    def __next__(self):
        if self.at == self.numbers.size:
            raise StopIteration
        Resumable.given.append(self.at)
        self.at += 1
        return self.numbers.sample(self.at - 1, self.epoch)

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


def noisy(sample):
    image, label = sample
    return image + 0.1 * torch.rand(image.shape), label


def streams(root, in_shape, classes):  # noqa: ARG001 - as it is called
    """One to train on whose length nobody knows, one to test on."""
    train = Stream(Numbers(21, in_shape, classes), decode=noisy, shuffle=6)
    return train, Stream(Numbers(16, in_shape, classes), size=12)


def sized_streams(root, in_shape, classes):
    """Epochs of 20 samples."""
    train, test = streams(root, in_shape, classes)
    return Stream(train.source, size=20, decode=noisy, shuffle=6), test


def resumable_streams(root, in_shape, classes):
    """As ``streams``, with a state."""
    train, test = streams(root, in_shape, classes)
    return Stream(Resumable(21, in_shape, classes), decode=noisy, shuffle=train.shuffle), test


def sized_resumable_streams(root, in_shape, classes):
    """As ``sized_streams``, with a state."""
    train, test = sized_streams(root, in_shape, classes)
    return Stream(ResumableIterators(21, in_shape, classes), train.size, noisy, train.shuffle), test


def less_shuffled_streams(root, in_shape, classes):
    """As ``streams``, but for the shuffling."""
    train, test = streams(root, in_shape, classes)
    return Stream(train.source, decode=noisy, shuffle=5), test


def streams_of_one_source(root, in_shape, classes):
    """To train and to test on."""
    test = resumable_streams(root, in_shape, classes)[0]
    return test, Stream(test.source, size=12)
