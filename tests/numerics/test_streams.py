"""Streams: what a plan trains on is what one process would read, in order or shuffled, also after a resume."""

import functools
import json
import pickle
import random
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hybridpar import Stream
from hybridpar.data.loader import StepLoader
from hybridpar.data.samples import Form
from hybridpar.data.stream import Mark, StreamSamples, as_samples, order_of
from hybridpar.errors import CheckpointError, ConfigError, DamageError, DataError
from hybridpar.runtime.job import Job
from hybridpar.runtime.pieces import Piece, Stored, write
from hybridpar.runtime.stream_state import mark_from, piece_of
from tests.support.own_code import Numbers, Resumable, ResumableBoth, ResumableIterators, noisy
from tests.support.parity import near, overlapping_ranks, own_ranks, plan_of, shape, shared_ranks
from tests.support.runs import run, train_here
from tests.support.threads import run_ranks
from tests.support.training import SEED, assemble, make_case, whole_model

BATCH, CLASSES, SHAPE = 13, 7, (2, 6, 6)
FORM = Form(SHAPE, CLASSES)
CASE = make_case(steps=1, samples=(13,))


def stream(size=None, shuffle=1, length=30):
    return Stream(Numbers(length, SHAPE, CLASSES), size, noisy, shuffle)


def loader_of(given, intervals=lambda count: ((0, count),), train=True, **more):
    samples = StreamSamples(given, FORM)
    return StepLoader(samples, order_of(samples, BATCH, SEED, train=train), intervals, **more)


def steps(given, count, epoch=0, start=0, **more):
    with loader_of(given, **more) as loader:
        loader.set_epoch(epoch, start)
        return list(islice(loader, count))


def same(one, other):
    assert len(one) == len(other)
    return all(a.inputs.equal(b.inputs) and a.labels.equal(b.labels) for a, b in zip(one, other, strict=True))


def test_a_stream_in_order_is_what_it_gives():
    """Without an end it goes on with the next opening; with a size an epoch is one opening's first samples."""
    plain = [Stream(Numbers(30, SHAPE, CLASSES), size) for size in (None, 28)]
    labels = [label for epoch in (0, 1) for _, label in _opened(epoch)]
    assert torch.cat([b.labels for b in steps(plain[0], 4)]).tolist() == labels[:52]
    for epoch in (0, 1):
        found = steps(plain[1], 9, epoch)
        assert [len(b.labels) for b in found] == [13, 13, 2]
        assert torch.cat([b.labels for b in found]).tolist() == labels[30 * epoch : 30 * epoch + 28]


def _opened(epoch):
    numbers = Numbers(30, SHAPE, CLASSES)
    numbers.set_epoch(epoch)
    return list(numbers)


@pytest.mark.parametrize("shuffle", [1, 5, 40])
@pytest.mark.parametrize("size", [None, 28])
def test_any_intervals_are_parts_of_the_whole(shuffle, size):
    """Read here or by another process, from the beginning or from the middle, of the first epoch or the third."""
    given, epochs = stream(size, shuffle), (0, 2) if size else (0,)
    for epoch in epochs:
        whole = steps(given, 3, epoch)
        for intervals in (
            lambda count: ((0, count // 2),),
            lambda count: ((count // 3, count), (0, 1)),
            lambda count: tuple((i, i + 1) for i in range(0, count, 2)),
        ):
            for start in (0, 1, 2):
                parts = steps(given, 3 - start, epoch, start, intervals=intervals)
                for all_of_it, part in zip(whole[start:], parts, strict=True):
                    rows = torch.cat([torch.arange(a, b) for a, b in intervals(len(all_of_it.labels))])
                    assert part.inputs.equal(all_of_it.inputs[rows])
                    assert part.labels.equal(all_of_it.labels[rows])


def test_a_process_that_reads_ahead_changes_nothing():
    given = stream(28, 5)
    with loader_of(given) as here, loader_of(given, workers=1) as ahead:
        for epoch, start in ((0, 0), (1, 0), (3, 1), (0, 2)):
            here.set_epoch(epoch, start)
            ahead.set_epoch(epoch, start)
            assert same(list(ahead), list(here))
            next(iter(ahead))
    with pytest.raises(DataError, match=r"data.workers: 2, but a stream is read in order, by one process"):
        loader_of(given, workers=2)


@pytest.mark.parametrize("size", [None, 28])
def test_a_shuffled_stream_has_each_sample_once(size):
    """Within its block, in another order in every epoch and with every seed."""
    samples = StreamSamples(stream(size, 8), FORM)
    found = []
    for seed, epoch in ((1, 0), (1, 1), (2, 0)) if size else ((1, 0), (2, 0)):
        indices = order_of(samples, BATCH, seed).indices(epoch, np.arange(28)) - epoch * (size or 0)
        for begin in range(0, 24 if size is None else 28, 8):
            assert sorted(indices[begin : begin + 8]) == list(range(begin, min(begin + 8, 28)))
        found.append(indices.tolist())
    assert len({tuple(f) for f in found}) == len(found)


def test_no_more_is_held_than_the_buffer():
    samples = StreamSamples(stream(None, 10, length=1000), FORM)
    order = order_of(samples, BATCH, SEED)
    for step in range(50):
        positions = np.arange(13 * step, 13 * step + 4)
        samples.read(order.indices(0, positions), order.keys(0, positions))
        assert len(samples._held) <= 10


def test_an_evaluation_goes_through_the_first_opening_in_order():
    for epoch in (0, 1):
        found = torch.cat([b.labels for b in steps(stream(28, 5), 9, epoch, train=False)])
        assert found.tolist() == [i % CLASSES for i in range(28)]


@pytest.mark.parametrize("source", [Resumable, ResumableIterators, ResumableBoth])
@pytest.mark.parametrize("shuffle", [1, 5, 40])
@pytest.mark.parametrize("size", [None, 28])
def test_a_stream_with_a_state_goes_on_from_it(size, shuffle, source):
    """From every step of three epochs, or over the ends of a stream: the same samples, and few of those before."""
    given = Stream(source(30, SHAPE, CLASSES), size, noisy, shuffle)
    intervals, places = (lambda count: ((count // 3, count - 1),)), []
    with loader_of(given, intervals=intervals) as loader:
        for epoch in range(3 if size else 1):
            loader.set_epoch(epoch)
            places += [(epoch, batch, loader.mark) for batch in islice(loader, 3 if size else 9)]
    for done, (epoch, _, mark) in enumerate(places, 1):
        rest = [batch for at, batch, _ in places[done:] if at == epoch][:2]
        first = sum(at == epoch for at, _, _ in places[:done])
        with loader_of(given, intervals=intervals) as loader:
            if mark is not None:
                loader.go_on(mark_through_a_checkpoint(mark))
            Resumable.given.clear()
            loader.set_epoch(epoch, first)
            assert same(list(islice(loader, len(rest))), rest)
        if mark is not None and len(rest) == 2:
            assert len(Resumable.given) <= 2 * (BATCH + shuffle)
    assert sum(mark is not None for *_, mark in places) >= (len(places) // 2 if shuffle < 28 else not size)


def mark_through_a_checkpoint(mark):
    with TemporaryDirectory() as folder:
        write(Path(folder), 0, piece_of(mark, 3))
        return mark_from(Stored(Path(folder), 1), 0)


def test_a_process_that_reads_ahead_tells_the_state_of_the_step_that_is_given():
    given = Stream(ResumableIterators(30, SHAPE, CLASSES), None, noisy, 5)
    with loader_of(given) as here, loader_of(given, workers=1) as ahead:
        for one, two in islice(zip(here, ahead, strict=True), 4):
            assert one.inputs.equal(two.inputs)
            assert here.mark == ahead.mark
    with loader_of(given, workers=1) as ahead:
        ahead.go_on(here.mark)
        ahead.set_epoch(0, 4)
        assert same(list(islice(ahead, 2)), steps(given, 2, start=4))


STATES = {
    "nested": {"at": 3, "parts": [1.5, None, True, "x", (1, (2, b"\x00\xff"))], 7: {}},
    "tensors": {
        "generator": torch.Generator().get_state(),
        "empty": torch.empty(0, 2),
        "half": torch.ones(2).half(),
    },
    "arrays": {"keys": np.arange(6, dtype=np.uint32).reshape(2, 3), "one": np.int64(4), "truth": np.array([True])},
    "of random": random.Random(3).getstate(),  # noqa: S311
    "of numpy": np.random.RandomState(3).get_state(legacy=False),
}


@pytest.mark.parametrize("kind", STATES)
def test_a_state_comes_back_as_it_was(kind):
    found = mark_through_a_checkpoint(Mark(9, 2, 4, STATES[kind]))
    assert (found.index, found.opening, found.begun) == (9, 2, 4)
    assert pickle.dumps(found.state) == pickle.dumps(STATES[kind]) or repr(found.state) == repr(STATES[kind])


def test_a_state_that_cannot_be_held_is_told_with_its_place():
    with pytest.raises(
        CheckpointError, match=r"state_dict\(\)\['a'\]\[1\] is a Generator, which a checkpoint cannot"
    ):
        piece_of(Mark(1, 0, 0, {"a": [0, torch.Generator()]}), 0)


@pytest.mark.parametrize(
    "text",
    [
        "[1, 0]",
        "[1, 0, 0, {}]",
        '[1, 0, 0, {"pickle": "gA=="}]',
        "{",
        '[1, 0, 0, {"array": ["|O", [1], "AAAAAAAAAAA="]}]',
    ],
)
def test_what_is_no_state_is_refused(tmp_path, text):
    write(tmp_path, 0, {"stream/0": Piece.whole(torch.tensor(list(text.encode()), dtype=torch.uint8))})
    with pytest.raises(DamageError, match="stream/0 is no place in a stream"):
        mark_from(Stored(tmp_path, 1), 0)


def batches(given, epochs, count):
    """What one process reads."""
    return [b for epoch in range(epochs) for b in steps(given, count, epoch)]


@functools.cache
def reference(size):
    model = whole_model(CASE)
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), []
    for x, y in batches(stream(size, 5), 2 if size else 1, 3 if size else 5):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x.double()), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    names = dict.fromkeys(n for layer in CASE.traced.names for n in layer.values())
    return losses, dict(zip(names, (p.detach() for p in model.parameters()), strict=True))


@pytest.mark.parametrize("size", [None, 28])
@pytest.mark.parametrize(
    ("degrees", "place", "replicas"),
    [
        ((3, 0, 0), own_ranks, 1),
        ((0, 2, 1), own_ranks, 1),
        ((2, 1, 3), overlapping_ranks, 1),
        ((2, 0, 2), shared_ranks, 2),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_plan_trains_as_one_process_does(degrees, place, replicas, size):
    """Two epochs with a partial last batch; or five steps over the end of the stream. Ranks that only compute
    know its size, if it has one."""
    plan = plan_of(*shape(*degrees, place), replicas=replicas)

    def body(rank, groups):
        sgd = functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9)
        job = Job(plan, CASE.traced, CASE.source, sgd, groups, rank=rank, seed=SEED)
        feed = job.loader(stream(size, 5) if job.reads else size)
        losses = [job.step(b) for _ in range(2 if size else 1) for b in islice(feed, 3 if size else 5)]
        return losses, list(job.parameters.values())

    losses, parameters = reference(size)
    results = run_ranks(plan, body)
    for own, _ in results:
        assert own == pytest.approx(losses, rel=1e-10)
    found = assemble([owned for _, owned in results[: plan.replica_world]])
    for name, expected in parameters.items():
        assert near(found[name], expected), name


CUSTOM = ("data=custom", "model.in_shape=[1,8,8]", "checkpoint.every=1", "train.eval_every_steps=2")
FUNCTION = "data.function=tests.support.own_code:"
STREAMS, SIZED = FUNCTION + "streams", FUNCTION + "sized_streams"


def lines(folder, name="metrics"):
    kept = ("step", "epoch", "loss", "samples", "top1")
    found = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in kept if key in line} for line in found]


@pytest.mark.parametrize("function", [STREAMS, SIZED])
def test_a_configured_training_goes_on_bit_for_bit(tmp_path, function):
    """Of 20 or 21 samples in batches of 8: stopped amid the first opening, and amid the third."""
    train_here(tmp_path / "whole", *CUSTOM, function, "train.steps=9")
    for steps_run in (2, 7, 9):
        train_here(tmp_path / "parts", *CUSTOM, function, f"train.steps={steps_run}", "resume=auto")
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")
    assert lines(tmp_path / "parts", "evaluations")[-1] == lines(tmp_path / "whole", "evaluations")[-1]
    sizes = [line["samples"] for line in lines(tmp_path / "whole")]
    assert sizes == ([8, 8, 4] * 3 if function is SIZED else [8] * 9)


@pytest.mark.parametrize("function", ["resumable_streams", "sized_resumable_streams"])
def test_a_configured_training_asks_a_source_with_a_state_for_what_is_left(tmp_path, function):
    """And goes on as it does without one, bit for bit; with one that reads ahead it does so, too."""
    plain = FUNCTION + function.replace("resumable_", "")
    train_here(tmp_path / "plain", *CUSTOM, plain, "train.steps=9")
    Resumable.given.clear()
    train_here(tmp_path / "parts", *CUSTOM, FUNCTION + function, "train.steps=2")
    assert Resumable.given[:6] == [0, 1, 2, 3, 4, 5]
    for steps_run, begins in ((5, {12}), (8, {0, 9, 12, 15})):
        Resumable.given.clear()
        train_here(tmp_path / "parts", *CUSTOM, FUNCTION + function, f"train.steps={steps_run}", "resume=auto")
        assert Resumable.given[0] in begins
    more = ("train.steps=9", "resume=auto", "data.workers=1")
    train_here(tmp_path / "parts", *CUSTOM, FUNCTION + function, *more)
    assert lines(tmp_path / "parts") == lines(tmp_path / "plain")


def test_ranks_train_on_a_stream_by_the_command(tmp_path):
    """Two processes, each with one that reads ahead, against one without; several openings in every step."""
    train_here(tmp_path / "one", *CUSTOM, STREAMS, "train.steps=3", "train.global_batch=48")
    small = ("data.name=custom", "model.in_shape=[1,8,8]", "model.options={width: 4, classifier_width: 8}")
    batch = ("train.steps=3", "train.device=cpu", "profile=analytic", "monitor=off")
    more = ("train.eval_every_steps=2", "train.mode=quiet", "data.workers=1", f"run.dir={tmp_path}/two")
    done = run(2, "front_tail", f"+{STREAMS}", *small, *batch, *more)
    assert done.returncode == 0, done.stderr
    for name in ("metrics", "evaluations"):
        for one, two in zip(lines(tmp_path / "one", name), lines(tmp_path / "two", name), strict=True):
            assert one.pop("loss") == pytest.approx(two.pop("loss"), rel=1e-5)
            assert one == two


def test_what_is_no_stream_is_refused(tmp_path):
    with pytest.raises(DataError, match="a generator, which cannot be gone through twice; give an object"):
        as_samples((i for i in range(3)), FORM)
    with pytest.raises(ConfigError, match="size None and shuffle 0 must be at least 1"):
        Stream([1], shuffle=0)
    with pytest.raises(DataError, match="a stream without a length cannot be evaluated on"):
        loader_of(stream(), train=False)
    with pytest.raises(DataError, match="the data set ended after 30 samples, but its length is 31"):
        steps(stream(31), 3)
    with pytest.raises(DataError, match="is a stream without samples"):
        steps(stream(length=0), 1)
    with pytest.raises(DataError, match=r"sample 0 of the data set is a int; return \(tensor, int\)"):
        steps(Stream(lambda: iter(range(9))), 1)
    with pytest.raises(ConfigError, match=r"train.steps: missing, but the training data has no length"):
        train_here(tmp_path, *CUSTOM, STREAMS)


@pytest.mark.parametrize(
    ("overrides", "error", "said"),
    [
        (
            ("train.early_stop.metric=loss",),
            ConfigError,
            "early_stop.metric: loss, but .* set train.eval_every_steps",
        ),
        (("checkpoint.best=accuracy",), ConfigError, "checkpoint.best: accuracy, but the training data"),
        (("data.workers=2",), DataError, "data.workers: 2, but a stream is read in order, by one process"),
        (
            (f"{FUNCTION}streams_of_one_source", "train.eval_every_steps=2"),
            DataError,
            "have one source, a Resumable whose state_dict.* give the test stream a source object of its own",
        ),
    ],
)
def test_what_a_stream_cannot_do_is_said_before_anything_is_written(tmp_path, overrides, error, said):
    """Without epochs nothing was ever evaluated, so that nothing stopped; workers were refused amid the start."""
    given = [o for o in CUSTOM if not o.startswith("train.eval_every_steps")]
    with pytest.raises(error, match=said):
        train_here(tmp_path, *given, STREAMS, "train.steps=3", *overrides)
    assert list(tmp_path.iterdir()) == []


def test_another_shuffling_of_a_stream_is_refused(tmp_path):
    """It was not noticed, and the epoch went on in another order."""
    train_here(tmp_path, *CUSTOM, STREAMS, "train.steps=2")
    said = r"with samples of a stream that are shuffled .* 6, but here it is 5; set it as it was"
    with pytest.raises(CheckpointError, match=said):
        train_here(tmp_path, *CUSTOM, f"{FUNCTION}less_shuffled_streams", "train.steps=4", "resume=auto")
