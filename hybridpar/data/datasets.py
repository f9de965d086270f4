"""Data sets by name: what a specification stands for, checked and loaded."""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hybridpar.data import transforms
from hybridpar.data.samples import (
    IGNORED,
    FileImages,
    Form,
    Samples,
    SyntheticSamples,
    TensorImages,
    check_labels,
    size_of,
)
from hybridpar.data.spec import Augment, DataSpec
from hybridpar.data.stream import as_samples, require_end
from hybridpar.data.text import CHARACTERS, read_text, split_text
from hybridpar.data.transforms import ImageTransform, Normalization
from hybridpar.errors import DataError
from hybridpar.model.chain import Input

DIGITS_TEST_SIZE = 360
"""Test samples of ``digits``, of 1,797; the rest is for training."""

DIGITS_SPLIT_SEED = 0
"""Fixes the test split of ``digits`` for all seeds of training."""

_CIFAR10_FOLDER = "cifar-10-batches-py"
_CIFAR10_FILES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta")
_CLASSES = {"digits": 10, "cifar10": 10, "text": len(CHARACTERS)}
_SEQUENCES = ("text", "custom")
"""Those whose samples may have several labels."""
_SEVERAL = ("custom",)
"""Those whose samples may have several tensors."""


@dataclass(frozen=True)
class Splits:
    """The samples to train on and those, all different, to test on."""

    train: Samples
    test: Samples


def check(spec: DataSpec, classes: int, label_shape: tuple[int, ...] = (), inputs: tuple[Input, ...] = ()) -> None:
    """Raise DataError if ``spec`` cannot be loaded for a model of ``classes`` classes, as far as a glance tells.

    ``label_shape``: of a sample's labels, () for a single one.

    Looks for paths and counts classes; decodes nothing. A ``custom`` function is looked up, not called.
    """
    if inputs and spec.name not in _SEVERAL:
        raise DataError(
            f"data set {spec.name} has one tensor per sample, but the model takes {len(inputs)}; take one of "
            f"{', '.join(_SEVERAL)}"
        )
    if label_shape and spec.name not in _SEQUENCES:
        raise DataError(
            f"data set {spec.name} has one label per sample, but the model gives logits for {label_shape} labels; "
            f"take one of {', '.join(_SEQUENCES)}, or a model whose output is one row of logits"
        )
    if spec.name == "text" and not label_shape:
        raise DataError(
            "data set text has a label for every token, but the model gives one row of logits per sample; take a "
            "model with logits (tokens, classes), such as model=gpt"
        )
    if spec.name in _CLASSES:
        _check_classes(spec.name, _CLASSES[spec.name], classes)
    if spec.name == "cifar10":
        folder = _root(spec) / _CIFAR10_FOLDER
        for file in _CIFAR10_FILES:
            _check_path(
                (folder / file).is_file(), folder / file, spec, f"the directory that holds {_CIFAR10_FOLDER}"
            )
    elif spec.name == "image_folder":
        _check_image_folder(spec, classes)
    elif spec.name == "custom":
        _function(spec)


def load(
    spec: DataSpec,
    in_shape: tuple[int, ...],
    classes: int,
    ignored: int = IGNORED,
    label_shape: tuple[int, ...] = (),
    inputs: tuple[Input, ...] = (),
) -> Splits:
    """Load the data set for a model that takes inputs ``(n, *in_shape)`` and knows ``classes`` classes.

    Labels that are ``ignored`` may lie outside the classes. Every sample has labels of ``label_shape``;
    of a model that takes several ``inputs`` so many tensors.

    ``digits``: scikit-learn's 1,797 images of 8 x 8 pixels; 360 of them, drawn class by class once for all, are
    the test split. ``cifar10``: the Python version below ``spec.root``. ``image_folder``: one folder per class in
    ``train`` and in ``val`` (or ``test``, where there is no ``val``) below ``spec.root``. ``text``: characters of
    the file ``spec.root``, or of a text that comes with Python; its last tenth is the test split. ``synthetic``:
    noise. ``custom``: what ``spec.function`` returns.

    Only training samples are augmented. Raises DataError for missing or malformed files, labels outside the
    classes and shapes that cannot be made; no process is started.
    """
    check(spec, classes, label_shape, inputs)
    loaders: dict[str, Callable[[DataSpec, tuple[int, ...], int], Splits]] = {
        "digits": _load_digits,
        "cifar10": _load_cifar10,
        "image_folder": _load_image_folder,
        "text": _load_text,
        "synthetic": _load_synthetic,
        "custom": functools.partial(_load_custom, ignored=ignored, label_shape=label_shape, inputs=inputs),
    }
    splits = loaders[spec.name](spec, tuple(in_shape), classes)
    for name, samples in (("training", splits.train), ("test", splits.test)):
        if size_of(samples) == 0:
            raise DataError(f"the {name} split of data set {spec.name} has no samples")
        if samples.labels is not None:
            check_labels(samples.labels, classes, f"the {name} split of data set {spec.name}", ignored)
    return splits


def _load_digits(spec: DataSpec, in_shape: tuple[int, ...], classes: int) -> Splits:  # noqa: ARG001
    from sklearn.datasets import load_digits  # noqa: PLC0415 - a second, which other data sets need not spend
    from sklearn.model_selection import train_test_split  # noqa: PLC0415

    pixels, digits = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels.astype(np.float32) / 16).view(-1, 1, 8, 8)
    labels = torch.from_numpy(digits.astype(np.int64))
    train, test = train_test_split(
        np.arange(len(digits)), stratify=digits, test_size=DIGITS_TEST_SIZE, random_state=DIGITS_SPLIT_SEED
    )

    def split(chosen: Any, augment: Augment) -> TensorImages:
        return TensorImages(
            images[chosen], labels[chosen], _transform(spec, in_shape, 1, transforms.DIGITS, augment)
        )

    return Splits(split(train, spec.augment), split(test, "none"))


def _load_cifar10(spec: DataSpec, in_shape: tuple[int, ...], classes: int) -> Splits:  # noqa: ARG001
    from torchvision.datasets import CIFAR10  # noqa: PLC0415 - two seconds, which other data sets need not spend

    def split(train: bool, augment: Augment) -> TensorImages:
        try:
            with warnings.catch_warnings():
                # numpy 2.4.0 to 2.4.4 warn about the age of these pickles: github.com/pytorch/vision/issues/9340
                warnings.filterwarnings("ignore", message=r"dtype\(\): align should be passed")
                stored = CIFAR10(_root(spec), train=train, download=False)
        except RuntimeError as e:
            raise DataError(
                f"{_root(spec) / _CIFAR10_FOLDER} does not have the checksums of CIFAR-10; fetch "
                f"{CIFAR10.filename} again and unpack it there"
            ) from e
        images = torch.from_numpy(stored.data).permute(0, 3, 1, 2).contiguous()
        labels = torch.tensor(stored.targets, dtype=torch.int64)
        return TensorImages(images, labels, _transform(spec, in_shape, 3, transforms.CIFAR10, augment))

    return Splits(split(True, spec.augment), split(False, "none"))


def _load_image_folder(spec: DataSpec, in_shape: tuple[int, ...], classes: int) -> Splits:  # noqa: ARG001
    from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset  # noqa: PLC0415 - as above

    train, test = _image_folders(spec)
    numbers = {name: number for number, name in enumerate(_class_names(train))}

    def split(folder: Path, augment: Augment) -> FileImages:
        present = {name: numbers[name] for name in _class_names(folder)}
        try:
            found = make_dataset(str(folder), present, extensions=IMG_EXTENSIONS)
        except FileNotFoundError as e:
            raise DataError(f"{folder} has a class without images: {e}") from e
        names = [str(Path(path).relative_to(folder)) for path, _ in found]
        labels = torch.tensor([label for _, label in found], dtype=torch.int64)
        return FileImages(folder, names, labels, _transform(spec, in_shape, 3, transforms.IMAGENET, augment))

    return Splits(split(train, spec.augment), split(test, "none"))


def _load_text(spec: DataSpec, in_shape: tuple[int, ...], classes: int) -> Splits:  # noqa: ARG001
    if len(in_shape) != 1:
        raise DataError(f"data set text gives rows of tokens, but the model takes {in_shape}; set model.in_shape")
    text, name = read_text(spec.root)
    return Splits(*split_text(text, in_shape[0], name))


def _load_synthetic(spec: DataSpec, in_shape: tuple[int, ...], classes: int) -> Splits:
    return Splits(
        SyntheticSamples(spec.size, in_shape, classes, split=0),
        SyntheticSamples(spec.test_size, in_shape, classes, split=1),
    )


def _load_custom(
    spec: DataSpec,
    in_shape: tuple[int, ...],
    classes: int,
    *,
    ignored: int,
    label_shape: tuple[int, ...],
    inputs: tuple[Input, ...],
) -> Splits:
    shapes = tuple(i.shape for i in inputs) or in_shape
    made = _function(spec)(root=spec.root, in_shape=shapes, classes=classes)
    if not (isinstance(made, tuple | list) and len(made) == 2):
        raise DataError(
            f"{spec.function} returned a {type(made).__name__}; return the two data sets (train, test)"
        )
    form = Form(in_shape, classes, ignored, label_shape, inputs)
    train, test = (
        as_samples(split, form, f"the {name} split of {spec.function}")
        for name, split in zip(("training", "test"), made, strict=True)
    )
    require_end(test)
    return Splits(train, test)


def _transform(
    spec: DataSpec, in_shape: tuple[int, ...], channels: int, normalization: Normalization, augment: Augment
) -> ImageTransform:
    return ImageTransform(in_shape, channels, normalization if spec.normalize else None, augment)


def _root(spec: DataSpec) -> Path:
    if spec.root is None:
        raise DataError(f"data set {spec.name} needs a directory; set data.root=/path/to/it")
    return Path(spec.root).expanduser().absolute()


def _check_path(found: bool, path: Path, spec: DataSpec, what: str) -> None:
    if not found:
        raise DataError(f"there is no {path}; set data.root, now {spec.root}, to {what}")


def _check_classes(name: str, needed: int, classes: int) -> None:
    if needed > classes:
        raise DataError(
            f"data set {name} has {needed} classes, but the model has {classes}; give the model at least {needed}"
        )


def _image_folders(spec: DataSpec) -> tuple[Path, Path]:
    """Return the folders of the training and the test split."""
    root = _root(spec)
    test = root / "val" if (root / "val").is_dir() or not (root / "test").is_dir() else root / "test"
    return root / "train", test


def _class_names(folder: Path) -> list[str]:
    """Return the names of the class folders, sorted; a class's number is its place among those of ``train``."""
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir())


def _check_image_folder(spec: DataSpec, classes: int) -> None:
    train, test = _image_folders(spec)
    for folder in (train, test):
        _check_path(
            folder.is_dir(),
            folder,
            spec,
            "a directory that holds train and val (or test), each with one folder per class",
        )
    names = _class_names(train)
    if not names:
        raise DataError(f"{train} has no folders; put the images of each class into a folder of its own")
    _check_classes(spec.name, len(names), classes)
    unknown = sorted(set(_class_names(test)) - set(names))
    if unknown:
        raise DataError(f"{test} has the class {unknown[0]!r}, which {train} lacks; rename or remove the folder")
    if not _class_names(test):
        raise DataError(f"{test} has no folders; put the images of each class into a folder of its own")


def _function(spec: DataSpec) -> Callable[..., Any]:
    """Import the function that makes a custom data set."""
    module_name, _, name = str(spec.function).partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as e:
        if e.name is None or not f"{module_name}.".startswith(f"{e.name}."):
            raise  # the module is there; an import inside it fails
        raise DataError(
            f"data.function={spec.function}: there is no module {e.name}; put its directory on PYTHONPATH"
        ) from e
    function = getattr(module, name, None)
    if not callable(function):
        raise DataError(f"data.function={spec.function}: module {module_name} has no function {name}")
    return function  # type: ignore[no-any-return]
