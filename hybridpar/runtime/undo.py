"""What a step that is skipped takes back: the running statistics of batch norms, which its forwards have moved."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from hybridpar.model.chain import Chain
from hybridpar.runtime.modules import BlockModules


class Undo:
    """Keeps the buffers of the batch norms of some blocks as they were when a step began.

    A value that is not finite would stay in them for good, while the parameters never see it. The copies stay from
    step to step.
    """

    def __init__(self, blocks: Iterable[BlockModules], chain: Chain) -> None:
        self._buffers = [
            buffer
            for modules in blocks
            for index, layer in zip(range(*modules.block.layers), modules.layers, strict=True)
            if chain.layers[index].batch_norm
            for buffer in layer.buffers()
        ]
        self.copies = [torch.empty_like(buffer) for buffer in self._buffers]
        """In the order of the layers."""

    def keep(self) -> None:
        """Note the buffers as they are."""
        for copy, buffer in zip(self.copies, self._buffers, strict=True):
            copy.copy_(buffer)

    def restore(self) -> None:
        """Make the buffers what they were at the last ``keep``."""
        for copy, buffer in zip(self.copies, self._buffers, strict=True):
            buffer.copy_(copy)
