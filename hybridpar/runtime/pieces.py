"""Pieces: what one rank holds of a checkpoint's tensors, and a storage for them without pickles.

``torch.distributed.checkpoint`` describes the slices and says, for any other split, what is read from where. Its
own files describe tensors by pickles; here every rank writes the bytes of its tensors into one file and their
places into an index in JSON.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from hybridpar.errors import CheckpointError, DamageError
from hybridpar.schema import read_json, to_data

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    )
}
"""What a checkpoint may hold, by its name in the index."""

_DATA = re.compile(r"rank-\d+\.bin")


@dataclass(frozen=True)
class Piece:
    """A slice of a full tensor, or all of it, on one rank."""

    tensor: torch.Tensor
    """The slice; loading writes into it."""
    shape: tuple[int, ...]
    """Of the full tensor."""
    offsets: tuple[int, ...]
    """Where in the full tensor the slice begins."""

    @staticmethod
    def whole(tensor: torch.Tensor) -> Piece:
        """Return the piece of a tensor that the rank holds all of."""
        return Piece(tensor.detach(), tuple(tensor.shape), (0,) * tensor.ndim)

    @staticmethod
    def slice(tensor: torch.Tensor, shape: tuple[int, ...], dim: int | None, start: int) -> Piece:
        """Return the piece of a tensor that is a slice along ``dim`` of one of ``shape``; None: all of it."""
        return Piece(tensor.detach(), shape, tuple(start if d == dim else 0 for d in range(len(shape))))

    def fill(self, full: torch.Tensor) -> None:
        """Take the slice's values from those of the full tensor."""
        source = full
        for dim, (offset, length) in enumerate(zip(self.offsets, self.tensor.shape, strict=True)):
            source = source.narrow(dim, offset, length)
        self.tensor.copy_(source)

    def copied(self) -> Piece:
        """Return the piece with a copy of its values in the CPU's memory."""
        return Piece(self.tensor.detach().to("cpu", copy=True), self.shape, self.offsets)

    @property
    def chunk(self) -> ChunkStorageMetadata:
        """Where in the full tensor the slice lies."""
        return ChunkStorageMetadata(torch.Size(self.offsets), torch.Size(self.tensor.shape))


@dataclass(frozen=True)
class Chunk:
    """Where a slice lies in a rank's file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    """Of the full tensor."""
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    """Of the slice."""
    start: int
    """Its first byte."""
    bytes: int
    crc32: int


@dataclass(frozen=True)
class Index:
    """What a rank's file holds."""

    data: str
    """Name of the file, which lies beside the index."""
    chunks: tuple[Chunk, ...]


def write(folder: Path, rank: int, pieces: Mapping[str, Piece]) -> None:
    """Write a rank's pieces and their index into ``folder``, and wait until both are on the disk.

    Raises OSError as the file system does, and CheckpointError for a kind of number that no index can name.
    """
    data, chunks = f"rank-{rank}.bin", []
    with (folder / data).open("wb") as file:
        for name, piece in pieces.items():
            chunks.append(_append(file, name, piece))
        _to_disk(file)
    with (folder / f"rank-{rank}.json").open("wb") as file:
        file.write(json.dumps(to_data(Index(data, tuple(chunks)))).encode())
        _to_disk(file)


def _append(file: BinaryIO, name: str, piece: Piece) -> Chunk:
    dtype = str(piece.tensor.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise CheckpointError(
            f"{name} holds {dtype}, which a checkpoint cannot; it can hold {', '.join(DTYPES)}: set "
            "checkpoint.every=null, or use another optimizer or model"
        )
    content = piece.tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    start, sizes = file.tell(), tuple(piece.tensor.shape)
    file.write(content)
    return Chunk(name, dtype, piece.shape, piece.offsets, sizes, start, content.nbytes, zlib.crc32(content))


def _to_disk(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


class Stored:
    """The tensors of a checkpoint: the indices of all its ranks together.

    Reads the indices and compares them with the files; no tensor is read before ``load``. Raises CheckpointError
    for what is missing, malformed, or does not fit together.
    """

    def __init__(self, folder: Path, ranks: int) -> None:
        self.folder = folder
        self.tensors: dict[str, TensorStorageMetadata] = {}
        """By name: dtype, full shape and slices."""
        self._where: dict[MetadataIndex, tuple[Path, Chunk]] = {}
        for rank in range(ranks):
            index = read_json(Index, folder / f"rank-{rank}.json", DamageError)
            if not _DATA.fullmatch(index.data):
                self._refuse(f"rank-{rank}.json names the file {index.data!r}, which is none of a checkpoint's")
            path = folder / index.data
            size = path.stat().st_size if path.is_file() else -1
            for chunk in index.chunks:
                self._add(path, size, chunk)
        for name, tensor in self.tensors.items():
            there = sum(prod(chunk.sizes) for chunk in tensor.chunks)
            if there != prod(tensor.size):
                self._refuse(f"{name} has {prod(tensor.size)} elements, but {there} are there")

    def load(self, pieces: Mapping[str, Piece]) -> None:
        """Fill pieces, whatever slices they are, with what was saved. Raises CheckpointError, also for damage."""
        for name, piece in pieces.items():
            saved = self._saved(name)
            if (tuple(saved.size), saved.properties.dtype) != (piece.shape, piece.tensor.dtype):
                raise CheckpointError(
                    f"{self.folder}: {name} has the shape {list(saved.size)} in {saved.properties.dtype}, but the "
                    f"model needs {list(piece.shape)} in {piece.tensor.dtype}; it belongs to another model"
                )
            for item in create_read_items_for_chunk_list(name, saved, [piece.chunk]):
                source, target = self._read(item.storage_index), piece.tensor.detach()
                begins = zip(item.storage_offsets, item.dest_offsets, item.lengths, strict=True)
                for dim, (there, here, length) in enumerate(begins):
                    source, target = source.narrow(dim, there, length), target.narrow(dim, here, length)
                target.copy_(source)

    def verify(self, share: int = 0, shares: int = 1) -> None:
        """Compare the checksum of every saved slice, of one of some shares of them. Raises DamageError."""
        for index in list(self._where)[share::shares]:
            self._read(index)

    def read(self, name: str) -> torch.Tensor:
        """Return a whole tensor. Raises CheckpointError as ``load`` does."""
        saved = self._saved(name)
        piece = Piece.whole(torch.empty(tuple(saved.size), dtype=saved.properties.dtype))
        self.load({name: piece})
        return piece.tensor

    def run(self, name: str, start: int, numel: int) -> torch.Tensor:
        """Return elements of a flattened tensor, (numel,), from ``start`` on. Raises CheckpointError as ``load``.

        No more of the tensor is put together than the rows in which they lie.
        """
        saved = self._saved(name)
        if numel == prod(saved.size):
            return self.read(name).flatten()
        row = prod(saved.size[1:])
        first, last = start // row, -(-(start + numel) // row)
        rows = torch.empty((last - first, *saved.size[1:]), dtype=saved.properties.dtype)
        self.load({name: Piece(rows, tuple(saved.size), (first, *(0 for _ in saved.size[1:])))})
        return rows.flatten().narrow(0, start - first * row, numel)

    def _saved(self, name: str) -> TensorStorageMetadata:
        if name not in self.tensors:
            raise CheckpointError(f"{self.folder} holds no {name}; it belongs to another model or optimizer")
        return self.tensors[name]

    def _add(self, path: Path, size: int, chunk: Chunk) -> None:
        if chunk.dtype not in DTYPES:
            self._refuse(f"{chunk.name} holds {chunk.dtype!r}, which is no kind of number that is known here")
        dtype = DTYPES[chunk.dtype]
        known = self.tensors.setdefault(
            chunk.name, TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(chunk.shape), [])
        )
        fits = len(chunk.shape) == len(chunk.offsets) == len(chunk.sizes) and all(
            offset >= 0 and length >= 0 and offset + length <= full
            for full, offset, length in zip(chunk.shape, chunk.offsets, chunk.sizes, strict=False)
        )
        whole = fits and chunk.bytes == prod(chunk.sizes) * dtype.itemsize and chunk.start >= 0
        if not whole or (tuple(known.size), known.properties.dtype) != (chunk.shape, dtype):
            self._refuse(f"the slice {list(chunk.offsets)} + {list(chunk.sizes)} of {chunk.name} is impossible")
        if chunk.start + chunk.bytes > size:
            self._refuse(f"{path.name} has {max(size, 0)} bytes, but {chunk.start + chunk.bytes} were written")
        offsets = torch.Size(chunk.offsets)
        known.chunks.append(ChunkStorageMetadata(offsets, torch.Size(chunk.sizes)))
        self._where[MetadataIndex(chunk.name, offsets)] = path, chunk

    def _read(self, index: MetadataIndex) -> torch.Tensor:
        """Return a saved slice."""
        path, chunk = self._where[index]
        content = bytearray(chunk.bytes)
        try:
            with path.open("rb") as file:
                file.seek(chunk.start)
                file.readinto(content)
        except OSError as e:
            raise DamageError(f"cannot read {path}: {e.strerror}; use another checkpoint") from e
        if zlib.crc32(content) != chunk.crc32:
            self._refuse(f"the bytes of {chunk.name} in {path.name} are not those that were written")
        if not content:
            return torch.empty(chunk.sizes, dtype=DTYPES[chunk.dtype])
        return torch.frombuffer(content, dtype=DTYPES[chunk.dtype]).reshape(chunk.sizes)

    def _refuse(self, what: str) -> Any:
        raise DamageError(f"the checkpoint {self.folder} is damaged: {what}; use another one")
