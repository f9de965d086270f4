"""Data: the same samples in the same places whatever the plan, the rank count and the number of workers."""

import math
import pickle
import random
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torchvision.datasets import CIFAR10

from hybridpar.data import transforms
from hybridpar.data.datasets import DIGITS_TEST_SIZE, Splits, check, load
from hybridpar.data.keys import mix
from hybridpar.data.loader import StepLoader
from hybridpar.data.sampler import EpochOrder
from hybridpar.data.samples import FileImages, MapSamples, Samples, SyntheticSamples, TensorImages, check_labels
from hybridpar.data.spec import DataSpec
from hybridpar.data.transforms import ImageTransform
from hybridpar.errors import ConfigError, DataError, HybridparError
from hybridpar.schema import from_data

CONF = Path(__file__).parents[2] / "conf" / "data"


def everything(samples: Samples) -> tuple[torch.Tensor, torch.Tensor]:
    indices = np.arange(len(samples))
    return tuple(samples.read(indices, mix(0, indices)))


def whole_step(count: int) -> tuple[tuple[int, int], ...]:
    return ((0, count),)


def epoch_of(loader: StepLoader) -> list[tuple[torch.Tensor, torch.Tensor] | None]:
    return [None if batch is None else tuple(batch) for batch in loader]


def assert_same(a: list, b: list) -> None:
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        if x is None or y is None:
            assert x is y
        else:
            assert torch.equal(x[0], y[0])
            assert torch.equal(x[1], y[1])


@pytest.fixture(scope="module")
def digits() -> Splits:
    return load(DataSpec("digits", augment="shift"), (1, 16, 16), 10)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return three classes of images; `val` lacks the second, which must not renumber the third."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, names, each in (("train", ("ant", "bee", "cat"), 4), ("val", ("ant", "cat"), 3)):
        for name in names:
            (root / split / name).mkdir(parents=True)
            for i in range(each):
                pixels = rng.integers(0, 256, (20 + i, 30, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


# -- keys and order


def test_keys_are_fixed_and_spread() -> None:
    # splitmix64 of the stream seeded 0 starts with this number; a change would change every order and resume
    assert int(mix(0)[0]) == 0xE220A8397B1DCDAF
    keys = mix(-1, 3, np.arange(1000))
    assert len(np.unique(keys)) == 1000
    assert abs(float((keys % np.uint64(2)).mean()) - 0.5) < 0.05


def test_order_is_a_permutation_keyed_by_seed_and_epoch() -> None:
    everywhere = np.arange(100)
    order = EpochOrder(100, 32, seed=1)
    first = order.indices(0, everywhere)
    assert sorted(first.tolist()) == list(range(100))
    assert np.array_equal(first, EpochOrder(100, 7, seed=1).indices(0, everywhere))  # whatever the batch
    assert not np.array_equal(first, order.indices(1, everywhere))
    assert not np.array_equal(first, EpochOrder(100, 32, seed=2).indices(0, everywhere))


@pytest.mark.parametrize(("drop_last", "counts"), [(False, [32, 32, 32, 4]), (True, [32, 32, 32])])
def test_last_partial_batch(drop_last: bool, counts: list[int]) -> None:
    order = EpochOrder(100, 32, drop_last=drop_last)
    assert [order.count(step) for step in range(order.steps)] == counts


def test_orders_without_a_step_are_refused() -> None:
    with pytest.raises(DataError, match="100 samples, fewer than one global batch of 128"):
        EpochOrder(100, 128, drop_last=True)
    with pytest.raises(DataError, match="no samples"):
        EpochOrder(0, 4)
    with pytest.raises(ConfigError, match="global batch is 0"):
        EpochOrder(10, 0)


# -- digits


def test_digits_split_is_fixed_stratified_and_disjoint(digits: Splits) -> None:
    plain = load(DataSpec("digits", normalize=False), (1, 8, 8), 10)
    assert (len(plain.train), len(plain.test)) == (1797 - DIGITS_TEST_SIZE, DIGITS_TEST_SIZE)
    train, test = everything(plain.train), everything(plain.test)
    # recorded once: another split would make results of different versions incomparable
    assert test[1][:10].tolist() == [7, 6, 3, 7, 7, 3, 2, 8, 9, 3]
    assert torch.equal(test[1], digits.test.labels)
    assert torch.bincount(test[1]).min() >= 35
    assert torch.bincount(test[1]).max() <= 37
    images = {x.numpy().tobytes() for x in train[0]} | {x.numpy().tobytes() for x in test[0]}
    assert len(images) == 1797
    assert train[0].min() == 0
    assert train[0].max() == 1


def test_digits_constants_are_those_of_the_training_split() -> None:
    x, _ = everything(load(DataSpec("digits", normalize=False), (1, 8, 8), 10).train)
    assert (float(x.mean()), float(x.std())) == pytest.approx(
        (transforms.DIGITS.mean[0], transforms.DIGITS.std[0]), abs=1e-4
    )
    z, _ = everything(load(DataSpec("digits"), (1, 8, 8), 10).train)
    assert (float(z.mean()), float(z.std())) == pytest.approx((0, 1), abs=1e-3)


def test_digits_take_the_shape_of_the_model() -> None:
    x, labels = everything(load(DataSpec("digits"), (3, 32, 24), 1000).test)
    assert x.shape == (360, 3, 32, 24)
    assert x.dtype == torch.float32
    assert x.is_contiguous()
    assert labels.dtype == torch.int64
    assert torch.equal(x[:, 0], x[:, 2])


def test_too_few_classes_are_noticed_before_loading() -> None:
    with pytest.raises(DataError, match="digits has 10 classes, but the model has 5"):
        check(DataSpec("digits"), 5)
    with pytest.raises(DataError, match=r"label 7 \(1 of 3 labels are out of range\)"):
        check_labels(torch.tensor([0, 7, 6]), 7, "the set")


def test_shapes_that_cannot_be_made_are_refused() -> None:
    with pytest.raises(DataError, match=r"1 channel.*\(64,\)"):
        load(DataSpec("digits"), (64,), 10)
    with pytest.raises(DataError, match="1 or 3 channels"):
        ImageTransform((4, 8, 8), 3)


# -- transforms


def test_augmentation_depends_on_the_key_alone(digits: Splits) -> None:
    indices, keys = np.arange(40), mix(3, np.arange(40))
    together, _ = digits.train.read(indices, keys)
    for i in (0, 17, 39):
        alone, _ = digits.train.read(indices[i : i + 1], keys[i : i + 1])
        assert torch.equal(alone[0], together[i])
    other, _ = digits.train.read(indices, mix(4, np.arange(40)))
    assert not torch.equal(together, other)
    test_a, test_b = (digits.test.read(indices, k)[0] for k in (keys, mix(4, np.arange(40))))
    assert torch.equal(test_a, test_b)


def test_shifts_and_flips_move_pixels_and_fill_with_black() -> None:
    normalization = transforms.Normalization((0.5,), (0.25,))
    image = torch.rand(1, 1, 8, 16)
    many = image.expand(400, -1, -1, -1)
    transform = ImageTransform((1, 8, 16), 1, normalization, "flip_crop")
    moved = transform.finish(transform.prepare(many), mix(0, np.arange(400)))
    black = -0.5 / 0.25
    expected = set()
    for flipped in (False, True):
        source = transform.prepare(image)[0, 0]
        source = source.flip(-1) if flipped else source
        framed = torch.full((8 + 2, 16 + 4), black)
        framed[1:-1, 2:-2] = source
        expected |= {framed[y : y + 8, x : x + 16].numpy().tobytes() for y in range(3) for x in range(5)}
    seen = {x.numpy().tobytes() for x in moved}
    assert seen == expected  # all 30 outcomes occur, and nothing else
    shifted = ImageTransform((1, 8, 16), 1, normalization, "shift").finish(
        transform.prepare(many), mix(0, np.arange(400))
    )
    assert len({x.numpy().tobytes() for x in shifted}) == 15


def test_images_cover_the_shape_and_are_cut_at_the_centre() -> None:
    wide = torch.zeros(1, 1, 8, 24)
    wide[..., 8:16] = 1
    assert torch.equal(ImageTransform((1, 8, 8), 1).prepare(wide), torch.ones(1, 1, 8, 8))


def test_three_channels_become_luma() -> None:
    rgb = torch.tensor([1.0, 0.5, 0.25]).view(1, 3, 1, 1).expand(-1, -1, 4, 4)
    grey = ImageTransform((1, 4, 4), 3).finish(rgb, mix(0))
    assert torch.allclose(grey, torch.full((1, 1, 4, 4), 0.299 + 0.587 / 2 + 0.114 / 4))


def test_large_sets_are_prepared_at_reading_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.randint(0, 256, (10, 3, 12, 12), dtype=torch.uint8)
    transform = ImageTransform((3, 20, 20), 3, transforms.CIFAR10, "flip_crop")
    once, _ = everything(TensorImages(images, torch.zeros(10, dtype=torch.int64), transform))
    monkeypatch.setattr("hybridpar.data.samples.PREPARED_LIMIT_BYTES", 0)
    samples = TensorImages(images, torch.zeros(10, dtype=torch.int64), transform)
    assert torch.equal(once, everything(samples)[0])
    single, _ = samples.read(np.array([7]), mix(0, np.array([7])))
    assert torch.equal(single[0], once[7])


# -- loader


@pytest.mark.parametrize(
    "ranks",
    [
        [[(0, 100)]],
        [[(0, 50)], [(50, 100)]],
        [[(0, 10), (60, 70)], [(10, 60)], [], [(70, 70), (70, 100)]],
    ],
)
def test_any_split_reads_the_same_samples_in_the_same_places(
    digits: Splits, ranks: list[list[tuple[int, int]]]
) -> None:
    order = EpochOrder(len(digits.train), 200, seed=5)

    def part(mine: list[tuple[int, int]]):
        return lambda count: tuple((a * count // 100, b * count // 100) for a, b in mine)

    whole = StepLoader(digits.train, order, whole_step)
    parts = [StepLoader(digits.train, order, part(mine)) for mine in ranks]
    for loader in (whole, *parts):
        loader.set_epoch(2)
    assert len(whole) == 8
    for step, (everyone, *shares) in enumerate(zip(whole, *parts, strict=True)):
        count = order.count(step)
        inputs, labels = torch.zeros_like(everyone.inputs), torch.full_like(everyone.labels, -1)
        for mine, share in zip(ranks, shares, strict=True):
            numbers = [w for a, b in part(mine)(count) for w in range(a, b)]
            assert (share is None) == (not numbers)
            if share is not None:
                inputs[numbers], labels[numbers] = share
        assert torch.equal(inputs, everyone.inputs)
        assert torch.equal(labels, everyone.labels)


def test_evaluation_reads_every_test_sample_once_in_order(digits: Splits) -> None:
    loader = StepLoader(digits.test, EpochOrder.sequential(360, 100), whole_step)
    batches = epoch_of(loader)
    assert [len(labels) for _, labels in batches] == [100, 100, 100, 60]
    assert torch.equal(torch.cat([labels for _, labels in batches]), digits.test.labels)


def test_an_epoch_resumes_in_the_middle(digits: Splits) -> None:
    loader = StepLoader(digits.train, EpochOrder(1437, 256, seed=3), whole_step)
    loader.set_epoch(4)
    full = epoch_of(loader)
    loader.set_epoch(4, start_step=2)
    assert len(loader) == 4
    assert_same(epoch_of(loader), full[2:])
    loader.set_epoch(4, start_step=6)
    assert epoch_of(loader) == []


def test_epochs_differ_and_repeat(digits: Splits) -> None:
    loader = StepLoader(digits.train, EpochOrder(1437, 256), whole_step)
    first = epoch_of(loader)
    assert_same(epoch_of(loader), first)
    loader.set_epoch(1)
    assert not torch.equal(epoch_of(loader)[0][1], first[0][1])


def test_a_newer_iteration_ends_the_older(digits: Splits) -> None:
    loader = StepLoader(digits.train, EpochOrder(1437, 256), whole_step)
    older = iter(loader)
    next(older)
    loader.set_epoch(1)
    with pytest.raises(RuntimeError, match="iterate anew"):
        next(older)


def test_order_for_another_size_is_refused(digits: Splits) -> None:
    with pytest.raises(DataError, match="order is for 1000 samples, but the data set has 360"):
        StepLoader(digits.test, EpochOrder(1000, 10), whole_step)


def test_workers_change_nothing(digits: Splits, folder: Path) -> None:
    """Two workers read what none reads: across epochs, after an abandoned epoch, in the middle of one."""
    torch.manual_seed(0)
    state = torch.get_rng_state()
    images = load(DataSpec("image_folder", root=str(folder), augment="flip_crop"), (3, 16, 16), 3).train

    def some(count: int) -> tuple[tuple[int, int], ...]:
        return ((0, 1), (2, 4)) if count == 5 else ()  # nothing of the partial last step

    for samples, order, intervals in (
        (images, EpochOrder(12, 5, seed=1), some),
        (digits.train, EpochOrder(1437, 500, seed=1), whole_step),
    ):
        plain = StepLoader(samples, order, intervals)
        with StepLoader(samples, order, intervals, workers=2) as ahead:
            for epoch, start in ((0, 0), (1, 0), (3, 1)):
                plain.set_epoch(epoch, start)
                ahead.set_epoch(epoch, start)
                assert_same(epoch_of(ahead), epoch_of(plain))
                next(iter(ahead))
            workers = ahead._results._workers  # type: ignore[union-attr]
        assert len(workers) == 2
        assert all(not worker.is_alive() for worker in workers)
    assert torch.equal(torch.get_rng_state(), state)  # iterating draws nothing from the global generator


def test_errors_of_data_cross_the_worker_boundary(tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_text("no image")
    samples = FileImages(tmp_path, ["bad.png"], torch.zeros(1, dtype=torch.int64), ImageTransform((3, 8, 8), 3))
    message = rf"^cannot decode {tmp_path / 'bad.png'}: .*; replace or remove the file$"
    with StepLoader(samples, EpochOrder(1, 1), whole_step, workers=1) as loader:
        with pytest.raises(DataError, match=message):
            next(iter(loader))
        with pytest.raises(DataError, match=message):  # the worker survived
            next(iter(loader))


def test_an_image_too_large_to_decode_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow's refusal is no OSError and once ended a job as a bug of ours, without the file's name."""
    Image.new("RGB", (30, 30)).save(tmp_path / "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    samples = FileImages(tmp_path, ["huge.png"], torch.zeros(1, dtype=torch.int64), ImageTransform((3, 8, 8), 3))
    with pytest.raises(DataError, match=rf"cannot decode {tmp_path / 'huge.png'}: .* exceeds limit"):
        everything(samples)


def test_ranks_that_read_nothing_start_no_workers(digits: Splits) -> None:
    loader = StepLoader(digits.test, EpochOrder.sequential(360, 100), lambda _: (), workers=2)
    assert epoch_of(loader) == [None] * 4
    assert loader._loader is None


# -- other data sets


def test_image_folder(folder: Path) -> None:
    splits = load(DataSpec("image_folder", root=str(folder), normalize=False), (3, 20, 30), 3)
    assert splits.train.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert splits.test.labels.tolist() == [0] * 3 + [2] * 3
    x, _ = splits.train.read(np.array([4]), mix(0))
    stored = np.asarray(Image.open(folder / "train" / "bee" / "0.png"))
    assert torch.allclose(x[0].permute(1, 2, 0) * 255, torch.from_numpy(stored.copy()).float(), atol=1e-4)
    x, _ = everything(splits.train)
    assert x.shape == (12, 3, 20, 30)


def test_image_folder_takes_test_where_there_is_no_val(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "train").symlink_to(folder / "train")
    (tmp_path / "test").symlink_to(folder / "val")
    assert len(load(DataSpec("image_folder", root=str(tmp_path)), (3, 8, 8), 3).test) == 6


def test_image_folder_errors_name_path_and_remedy(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"set data\.root="):
        check(DataSpec("image_folder"), 3)
    with pytest.raises(DataError, match=rf"{tmp_path}/none/train; set data.root"):
        check(DataSpec("image_folder", root=str(tmp_path / "none")), 3)
    with pytest.raises(DataError, match="has 3 classes, but the model has 2"):
        check(DataSpec("image_folder", root=str(folder)), 2)
    for path in ("train/a", "val/b"):
        (tmp_path / path).mkdir(parents=True)
    with pytest.raises(DataError, match=r"has the class 'b', which .*train lacks"):
        check(DataSpec("image_folder", root=str(tmp_path)), 3)
    (tmp_path / "val" / "b").rename(tmp_path / "val" / "a")
    with pytest.raises(DataError, match="class without images"):
        load(DataSpec("image_folder", root=str(tmp_path)), (3, 8, 8), 3)


def test_cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads torchvision's format on disk; damaged files are noticed by their checksums."""
    spec = DataSpec("cifar10", root=str(tmp_path), normalize=False)
    with pytest.raises(DataError, match=r"data_batch_1; set data.root, now .*cifar-10-batches-py"):
        check(spec, 10)
    base = tmp_path / "cifar-10-batches-py"
    base.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (6, 4, 3072), dtype=np.uint8)
    for i, name in enumerate([*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]):
        (base / name).write_bytes(pickle.dumps({"data": pixels[i], "labels": [i, 1, 2, 9]}))
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": [str(n) for n in range(10)]}))
    check(spec, 10)
    with pytest.raises(DataError, match="checksums of CIFAR-10"):
        load(spec, (3, 32, 32), 10)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    splits = load(spec, (3, 32, 32), 10)
    x, labels = everything(splits.train)
    assert torch.equal(x, torch.from_numpy(pixels[:5].reshape(20, 3, 32, 32)).float() / 255)
    assert labels[:8].tolist() == [0, 1, 2, 9, 1, 1, 2, 9]
    assert len(splits.test) == 4
    assert len(CIFAR10.train_list) == 5  # the files that check looks for are those that torchvision reads
    (base / "test_batch").write_bytes(pickle.dumps({"data": pixels[5], "labels": [0, 1, 2, 10]}))
    with pytest.raises(DataError, match="test split of data set cifar10 has label 10"):
        load(spec, (3, 32, 32), 10)


def test_synthetic_depends_on_the_index_alone() -> None:
    splits = load(DataSpec("synthetic", size=50, test_size=20), (3, 8, 8), 7)
    x, labels = everything(splits.train)
    assert x.shape == (50, 3, 8, 8)
    assert set(labels.tolist()) == set(range(7))
    again = SyntheticSamples(50, (3, 8, 8), 7, split=0).read(np.array([31, 2]), mix(9, np.arange(2)))
    assert torch.equal(again.inputs, x[[31, 2]])
    assert torch.equal(again.labels, labels[[31, 2]])
    assert len({a.numpy().tobytes() for a in x}) == 50
    assert abs(float(x.mean())) < 0.1
    assert abs(float(x.std()) - 1) < 0.1
    assert not torch.equal(everything(splits.test)[0], x[:20])


class Noisy:
    """Draws from every global generator."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.tensor([torch.rand(()), np.random.rand(), random.random(), index]), index  # noqa: S311


def test_draws_of_custom_data_sets_are_keyed_and_leave_no_trace() -> None:
    samples = MapSamples(Noisy(), (4,), 8)
    indices = np.arange(8)
    keys = mix(1, indices)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    together, labels = samples.read(indices, keys)
    assert labels.tolist() == list(range(8))
    assert torch.equal(samples.read(indices[5:6], keys[5:6]).inputs[0], together[5])
    assert not torch.equal(samples.read(indices, mix(2, indices)).inputs[:, 0], together[:, 0])
    assert len(together[:, 1].unique()) == 8
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == before[1:]


def test_custom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_data.py").write_text(
        textwrap.dedent(
            """
            import torch
            from torch.utils.data import TensorDataset

            def make(root, in_shape, classes):
                def split(size):
                    return TensorDataset(torch.rand(size, *in_shape), torch.arange(size) % classes)
                return split(10), split(4)

            def wrong(root, in_shape, classes):
                return make(root, in_shape, classes + 1)

            def one(root, in_shape, classes):
                return make(root, in_shape, classes)[0]
            """
        )
    )
    monkeypatch.syspath_prepend(tmp_path)
    check(DataSpec("custom", function="own_data:make"), 3)
    splits = load(DataSpec("custom", function="own_data:make"), (5,), 3)
    assert (len(splits.train), len(splits.test)) == (10, 4)
    assert everything(splits.train)[1].tolist() == [i % 3 for i in range(10)]
    with pytest.raises(DataError, match=r"own_data:wrong has label 3 \(2 of 10"):
        everything(load(DataSpec("custom", function="own_data:wrong"), (5,), 3).train)
    with pytest.raises(DataError, match="returned a TensorDataset; return the two"):
        load(DataSpec("custom", function="own_data:one"), (5,), 3)
    with pytest.raises(DataError, match="module own_data has no function none"):
        check(DataSpec("custom", function="own_data:none"), 3)
    with pytest.raises(DataError, match="there is no module not_here; put its directory on PYTHONPATH"):
        check(DataSpec("custom", function="not_here:make"), 3)


class Listed:
    """Lists its labels in `targets`, as torchvision's data sets do."""

    def __init__(self, targets: list[int], labels: list[int]) -> None:
        self.targets = targets
        self.given = labels

    def __len__(self) -> int:
        return len(self.given)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.zeros(2), self.given[index]


def test_targets_are_labels_that_are_known_and_checked_early() -> None:
    assert MapSamples(Listed([0, 1], [0, 1]), (2,), 2).labels.tolist() == [0, 1]
    with pytest.raises(DataError, match="label 5"):
        MapSamples(Listed([0, 5], [0, 5]), (2,), 2)
    with pytest.raises(DataError, match=r"sample 1 of the data set has label 0, but its targets\[1\] is 1"):
        everything(MapSamples(Listed([0, 1], [0, 0]), (2,), 2))
    with pytest.raises(DataError, match=r"shape \(2,\), but the model takes \(3,\)"):
        everything(MapSamples(Listed([0], [0]), (3,), 2))
    with pytest.raises(DataError, match=r"return \(tensor, int\)"):
        everything(MapSamples([1, 2], (3,), 2))
    with pytest.raises(DataError, match="without __len__"):
        MapSamples(iter([]), (3,), 2)


# -- specification


@pytest.mark.parametrize("name", ["digits", "cifar10", "image_folder", "synthetic", "custom"])
def test_config_files_are_specifications(name: str) -> None:
    data = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    if name == "custom":
        with pytest.raises(ConfigError, match=r"set data\.function=module:function"):
            from_data(DataSpec, data, "data", ConfigError)
        data["function"] = "own:make"
    assert from_data(DataSpec, data, "data", ConfigError).name == name


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "digit"}, "'digit' is not one of 'digits'"),
        ({"name": "digits", "workers": -1}, "data.workers is -1"),
        ({"name": "digits", "augment": "spin"}, "'spin' is not one of"),
        ({"name": "synthetic", "size": 0}, "data.size is 0"),
        ({"name": "synthetic", "augment": "shift"}, "set data.augment=none"),
        ({"name": "custom", "function": "make"}, "data.function is 'make'"),
    ],
)
def test_values_out_of_range(values: dict[str, object], message: str) -> None:
    with pytest.raises(HybridparError, match=message):
        from_data(DataSpec, values, "data", ConfigError)


def test_scale_of_jpeg_decoding_keeps_proportions(tmp_path: Path) -> None:
    """A large JPEG is decoded at a smaller scale, close to what full decoding gives."""
    ramp = np.tile(np.linspace(0, 255, 640, dtype=np.uint8)[None, :, None], (480, 1, 3))
    Image.fromarray(ramp).save(tmp_path / "ramp.jpg", quality=95)
    samples = FileImages(tmp_path, ["ramp.jpg"], torch.zeros(1, dtype=torch.int64), ImageTransform((1, 48, 48), 3))
    x, _ = samples.read(np.array([0]), mix(0))
    left = 255 * (640 - 480) / 2 / 640
    expected = torch.linspace(left, 255 - left, 48) / 255
    assert torch.allclose(x[0, 0].mean(0), expected, atol=0.02)
    assert math.isclose(float(x.mean()), 0.5, abs_tol=0.01)
