"""From stored images to the model's input: size, channels, normalization and augmentation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hybridpar.data.keys import Keys, mix
from hybridpar.data.spec import Augment
from hybridpar.errors import DataError

_ROW, _COLUMN, _FLIP = 1, 2, 3  # draws of one sample
_LUMA = (0.299, 0.587, 0.114)  # red, green, blue; ITU-R BT.601


@dataclass(frozen=True)
class Normalization:
    """Mean and standard deviation of each stored channel, for values in [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


DIGITS = Normalization((0.3054,), (0.3761,))
"""Over all pixels of the 1,437 training images that ``datasets.load`` selects; a test recomputes it."""

CIFAR10 = Normalization((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
"""Over all pixels of the 50,000 training images; the values in common use for this data set."""

IMAGENET = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""The values that torchvision's ImageNet weights were trained with (docs.pytorch.org/vision, models)."""

MAX_SHIFT_FRACTION = 8
"""Images move by up to this fraction of their height and width: 4 of 32 pixels, as in He et al., "Deep residual
learning for image recognition", CVPR 2016, section 4.2."""


@dataclass(frozen=True)
class ImageTransform:
    """Turns stored images (n, channels, h, w) into inputs ``(n, *in_shape)``, float32.

    Images are scaled to cover ``in_shape`` and cut at the centre, so that proportions stay. One stored channel is
    repeated for a model that takes more; three become their luma for a model that takes one. Raises DataError
    where ``in_shape`` is no image or its channels cannot be made from the stored ones.
    """

    in_shape: tuple[int, ...]
    """Channels, height and width of the model's input."""
    channels: int
    """Stored channels: 1 or 3."""
    normalization: Normalization | None = None
    augment: Augment = "none"

    def __post_init__(self) -> None:
        if len(self.in_shape) != 3 or not (self.channels == 1 or self.in_shape[0] in {1, self.channels}):
            raise DataError(
                f"the data set holds images of {self.channels} channel(s), from which the model's input shape "
                f"{self.in_shape} cannot be made; choose a model whose input is (channels, height, width) with "
                f"{'any number of' if self.channels == 1 else f'1 or {self.channels}'} channels"
            )

    @property
    def height_width(self) -> tuple[int, int]:
        """Height and width of the model's input in pixels."""
        return self.in_shape[1], self.in_shape[2]

    def prepare(self, images: Tensor) -> Tensor:
        """Scale, cut and normalize images (n, channels, h, w), uint8 or float in [0, 1], each on its own."""
        x = images.float() / 255 if images.dtype == torch.uint8 else images.float()
        x = _cover(x, *self.height_width)
        if self.normalization is None:
            return x
        mean, std = torch.tensor(self.normalization.mean), torch.tensor(self.normalization.std)
        return (x - mean[:, None, None]).div_(std[:, None, None])

    def finish(self, prepared: Tensor, keys: Keys) -> Tensor:
        """Augment prepared images by their keys (n,) and match the channels."""
        x = prepared if self.augment == "none" else self._augmented(prepared, keys)
        if self.in_shape[0] == self.channels:
            return x
        if self.channels == 1:
            return x.expand(-1, self.in_shape[0], -1, -1).contiguous()
        return (x * torch.tensor(_LUMA)[:, None, None]).sum(dim=1, keepdim=True)

    def _augmented(self, prepared: Tensor, keys: Keys) -> Tensor:
        """Move, and for ``flip_crop`` mirror, each image by its own key; what comes in from outside is black."""
        height, width = self.height_width
        downs = _shifts(mix(keys, _ROW), height)
        rights = _shifts(mix(keys, _COLUMN), width)
        flips = (mix(keys, _FLIP) & np.uint64(1 if self.augment == "flip_crop" else 0)).tolist()
        images = prepared.numpy()
        out = np.empty_like(images)
        out[:] = self._black()
        for i, (down, right, flip) in enumerate(zip(downs, rights, flips, strict=True)):
            source = images[i, :, :, ::-1] if flip else images[i]
            rows, source_rows = _overlap(down, height)
            columns, source_columns = _overlap(right, width)
            out[i, :, rows, columns] = source[:, source_rows, source_columns]
        return torch.from_numpy(out)

    def _black(self) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        """Return the value of a black pixel after normalization, (channels, 1, 1)."""
        black = self.prepare(torch.zeros(1, self.channels, 1, 1))
        return black[0, :, :1, :1].numpy()


def _cover(x: Tensor, height: int, width: int) -> Tensor:
    """Scale images to the least size that covers (height, width) and cut at the centre."""
    h, w = x.shape[-2:]
    if (h, w) == (height, width):
        return x
    scale = max(height / h, width / w)
    size = max(height, round(h * scale)), max(width, round(w * scale))
    x = F.interpolate(x, size=size, mode="bilinear", align_corners=False, antialias=True)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return x[..., top : top + height, left : left + width].contiguous()


def _shifts(keys: Keys, extent: int) -> list[int]:
    """Return uniform whole numbers of pixels from -most to most, the extent's largest shift."""
    most = max(1, extent // MAX_SHIFT_FRACTION)
    shifts: list[int] = ((keys % np.uint64(2 * most + 1)).astype(np.int64) - most).tolist()
    return shifts


def _overlap(shift: int, extent: int) -> tuple[slice, slice]:
    """Return where a line of ``extent`` pixels moved by ``shift`` lands, and which of its pixels do."""
    to = slice(max(shift, 0), extent + min(shift, 0))
    return to, slice(to.start - shift, to.stop - shift)
