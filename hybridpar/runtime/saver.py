"""The saver: writes checkpoints beside the training, so that a kill at any instant leaves the last one intact."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist

from hybridpar.errors import CheckpointError, StuckError
from hybridpar.runtime import manifest as folders
from hybridpar.runtime.judge import Judge
from hybridpar.runtime.manifest import Manifest
from hybridpar.runtime.pieces import Piece, write
from hybridpar.runtime.process import SAVING_TIMEOUT, is_timeout
from hybridpar.sections import CheckpointConfig


class Saver:
    """Saves a job's tensors on one rank; all ranks call ``save`` and ``wait`` equally often.

    ``save`` copies the tensors and returns; a thread writes them. Every rank writes its own file into a folder
    with a temporary name. The ranks then agree over ``group``, a communicator that nobody else uses, that all
    have written, and rank 0 gives the folder its name. ``home`` is the run's folder of checkpoints, which all
    nodes share; ``group`` is None for a rank that is alone. ``judge`` says which checkpoint is the best one.
    """

    def __init__(
        self,
        home: Path,
        settings: CheckpointConfig,
        rank: int,
        group: dist.ProcessGroup | None,
        judge: Judge | None = None,
    ) -> None:
        self._home, self._settings, self._rank, self._group, self._judge = home, settings, rank, group, judge
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def save(self, pieces: Mapping[str, Piece], manifest: Manifest) -> Path:
        """Begin to save, after the save before has ended, and return the checkpoint's folder to be.

        ``pieces`` may change as soon as this returns. Raises CheckpointError where the save before failed.
        """
        self.wait()
        copies = {name: piece.copied() for name, piece in pieces.items()}
        self._thread = threading.Thread(target=self._run, args=(copies, manifest), name="checkpoint")
        self._thread.start()
        if not self._settings.asynchronous:
            self.wait()
        return folders.final(self._home, manifest.position.step)

    def wait(self) -> None:
        """Wait for the save that is going on. Raises CheckpointError where it failed, on every rank."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _run(self, pieces: Mapping[str, Piece], manifest: Manifest) -> None:
        try:
            self._write_all(pieces, manifest)
        except BaseException as e:  # noqa: BLE001 - it is raised again by whoever waits
            self._failure = e

    def _write_all(self, pieces: Mapping[str, Piece], manifest: Manifest) -> None:
        folder, failure = folders.partial(self._home, manifest.position.step), None
        try:
            self._require_finite(pieces, manifest.position.step)
            folder.mkdir(parents=True, exist_ok=True)
            write(folder, self._rank, pieces)
        except (OSError, CheckpointError) as e:
            failure = e
        if not self._agree(failed=failure is not None):
            raise self._error(failure, folder)
        try:
            if self._rank == 0:
                folders.commit(self._home, manifest)
                folders.retain(self._home, self._settings.keep, self._judge)
        except (OSError, CheckpointError) as e:
            failure = e
        if not self._agree(failed=failure is not None):
            raise self._error(failure, folder)

    def _require_finite(self, pieces: Mapping[str, Piece], step: int) -> None:
        """Raise CheckpointError rather than let a training that has diverged replace its last good checkpoint."""
        for name, piece in pieces.items():
            if piece.tensor.is_floating_point() and not bool(piece.tensor.isfinite().all()):
                raise CheckpointError(
                    f"{name} is not finite after step {step - 1}, and is not saved; lower optimizer.lr, or set "
                    f"optimizer.clip, and continue with resume=auto from {self._last_good()}"
                )

    def _last_good(self) -> str:
        known = folders.complete(self._home)
        return str(known[-1]) if known else "the beginning: there is no checkpoint before it"

    def _agree(self, *, failed: bool) -> bool:
        """Return, once all ranks have come here, whether none has failed."""
        flag = torch.tensor([int(failed)])
        if self._group is not None:
            try:
                self._group.allreduce([flag]).wait()
            except RuntimeError as e:
                if not is_timeout(e):
                    raise
                raise StuckError(
                    f"a rank has not written its part of a checkpoint to {self._home} within {SAVING_TIMEOUT}; "
                    "look at the file system on every node, and continue with resume=auto from "
                    f"{self._last_good()}"
                ) from e
        return not flag.item()

    def _error(self, failure: OSError | CheckpointError | None, folder: Path) -> CheckpointError:
        """Return what is raised for a failed save, and give back its space."""
        if self._rank == 0:
            folders.clean(self._home)
        if isinstance(failure, CheckpointError):
            return failure
        known = folders.complete(self._home)
        last = f"the last good one is {known[-1]}" if known else "there is none before it"
        what = f"cannot be written: {failure.strerror}" if failure is not None else "failed on another rank"
        return CheckpointError(
            f"the checkpoint {folder} {what}; {last}: free space, or set checkpoint.keep lower, and continue with "
            "resume=auto"
        )
