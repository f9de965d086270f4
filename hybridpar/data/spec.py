"""The data section of a job's configuration; imports no torch, so that planning can read it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hybridpar.errors import ConfigError

Augment = Literal["none", "shift", "flip_crop"]


@dataclass(frozen=True)
class DataSpec:
    """Which data set, and how its samples are read.

    Raises ConfigError for a value that is out of range or does not go with the data set.
    """

    name: Literal["digits", "cifar10", "image_folder", "text", "synthetic", "custom"]
    root: str | None = None
    """Directory of ``cifar10`` (it holds ``cifar-10-batches-py``) and ``image_folder`` (``train`` and ``val``);
    a file for ``text``."""
    function: str | None = None
    """``module:function`` of ``custom``; called with ``root``, ``in_shape`` and ``classes``, it returns two
    data sets (train, test), map-style or streams, of (tensor, int); of (tensor, tensor) where every token has a
    label."""
    augment: Augment = "none"
    """What happens to training images: ``shift`` moves them by up to an eighth of their size, ``flip_crop`` also
    mirrors half of them."""
    normalize: bool = True
    """Images to mean 0 and standard deviation 1 by the constants of the data set; otherwise they lie in [0, 1]."""
    workers: int = 0
    """Processes that read ahead, for every rank that reads; 0 reads in the rank's own process. An evaluation has
    as many of its own, which end with it."""
    size: int = 10_000
    """Training samples of ``synthetic``."""
    test_size: int = 2_000
    """Test samples of ``synthetic``."""
    mixup: float | None = None
    """Alpha of mixup on training samples; None: none."""
    cutmix: float | None = None
    """Alpha of CutMix on training images; None: none."""

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise ConfigError(f"data.workers is {self.workers}; give 0 (read in the rank's process) or more")
        if self.size < 1 or self.test_size < 1:
            raise ConfigError(
                f"data.size is {self.size} and data.test_size {self.test_size}; both must be positive"
            )
        for key, alpha in (("mixup", self.mixup), ("cutmix", self.cutmix)):
            if alpha is not None and alpha <= 0:
                raise ConfigError(f"data.{key}: {alpha} must be above 0, as 0.2 or 1.0, or null")
        if self.augment != "none" and self.name in {"text", "synthetic", "custom"}:
            raise ConfigError(
                f"data.augment={self.augment} does not work with data set {self.name}; set data.augment=none "
                "(a custom data set augments in its own __getitem__, whose random draws are keyed by sample)"
            )
        if self.name == "custom":
            self._check_function()

    def _check_function(self) -> None:
        module, colon, function = (self.function or "").partition(":")
        if not (module and colon and function):
            raise ConfigError(
                f"data.function is {self.function!r}; set data.function=module:function, where the function "
                "returns the data sets (train, test)"
            )
