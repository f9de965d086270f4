"""The files of checkpoints: slices of any split, and what is refused before a tensor is touched."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hybridpar.config import compose
from hybridpar.errors import CheckpointError, ConfigError
from hybridpar.runtime import intact
from hybridpar.runtime import manifest as folders
from hybridpar.runtime.judge import Judge
from hybridpar.runtime.manifest import Manifest, Position, Subject
from hybridpar.runtime.pieces import DTYPES, Piece, Stored, write
from hybridpar.runtime.process import Process
from hybridpar.runtime.saver import Saver
from hybridpar.schema import to_data
from hybridpar.sections import CheckpointConfig
from tests.support.checkpoints import normed_case, plan_of

FULL = torch.arange(35, dtype=torch.float64).reshape(5, 7)


def save(folder: Path) -> Path:
    """Two ranks hold columns of a matrix; the first one a scalar, too."""
    folder.mkdir(parents=True, exist_ok=True)
    write(folder, 0, {"m": Piece(FULL[:, :3], (5, 7), (0, 0)), "s": Piece.whole(torch.tensor(3.0))})
    write(folder, 1, {"m": Piece(FULL[:, 3:], (5, 7), (0, 3)), "e": Piece.whole(torch.empty(0, 2))})
    return folder


def test_any_slices_are_put_together_from_any_others(tmp_path: Path) -> None:
    stored = Stored(save(tmp_path), 2)
    for first in range(5):
        for last in range(first + 1, 6):
            rows = torch.zeros(last - first, 7, dtype=torch.float64)
            stored.load({"m": Piece(rows, (5, 7), (first, 0))})
            assert torch.equal(rows, FULL[first:last])
    assert torch.equal(stored.read("m"), FULL)
    assert stored.read("s").item() == 3.0
    assert stored.read("e").shape == (0, 2)


def test_any_run_of_the_flattened_tensor_is_read(tmp_path: Path) -> None:
    stored = Stored(save(tmp_path), 2)
    for start in range(35):
        for stop in range(start + 1, 36):
            assert torch.equal(stored.run("m", start, stop - start), FULL.flatten()[start:stop])
    assert torch.equal(stored.run("s", 0, 1), torch.tensor([3.0]))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_all_kinds_of_numbers_come_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    value = torch.tensor([0, 1, 0, 1, 1]).to(dtype)[::2]
    write(tmp_path, 0, {"x": Piece.whole(value)})
    assert torch.equal(Stored(tmp_path, 1).read("x"), value)


def test_a_kind_of_number_without_a_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"x holds complex64, which a checkpoint cannot; .* set checkpoint"):
        write(tmp_path, 0, {"x": Piece.whole(torch.zeros(2, dtype=torch.complex64))})


def index(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads((folder / "rank-0.json").read_text())
    change(data)
    (folder / "rank-0.json").write_text(json.dumps(data))


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return Path.touch, (self.path,)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated data": (
        lambda f: (f / "rank-0.bin").write_bytes((f / "rank-0.bin").read_bytes()[:-1]),
        r"rank-0.bin has 123 bytes, but 124 were written; use another",
    ),
    "no data": (lambda f: (f / "rank-1.bin").unlink(), r"rank-1.bin has 0 bytes"),
    "no index": (lambda f: (f / "rank-1.json").unlink(), r"cannot read .*rank-1.json"),
    "half an index": (
        lambda f: (f / "rank-0.json").write_bytes((f / "rank-0.json").read_bytes()[:40]),
        r"rank-0.json is not JSON",
    ),
    "a pickle as index": (
        lambda f: (f / "rank-0.json").write_bytes(pickle.dumps(Bomb(f / "boom"))),
        r"rank-0.json is not JSON",
    ),
    "a pickle as data": (
        lambda f: (f / "rank-0.bin").write_bytes(pickle.dumps(Bomb(f / "boom")) + bytes(200)),
        r"the bytes of \w+ in rank-0.bin are not those that were written",
    ),
    "another folder's file": (
        lambda f: index(f, lambda d: d.update(data="../../etc/passwd")),
        r"names the file '../../etc/passwd', which is none",
    ),
    "a slice outside": (
        lambda f: index(f, lambda d: d["chunks"][0].update(offsets=[0, 6])),
        r"the slice \[0, 6\] \+ \[5, 3\] of m is impossible",
    ),
    "a negative place": (
        lambda f: index(f, lambda d: d["chunks"][0].update(start=-8)),
        r"of m is impossible",
    ),
    "a huge tensor": (
        lambda f: index(f, lambda d: d["chunks"][0].update(shape=[5, 10**15], sizes=[5, 10**15])),
        r"of m is impossible",
    ),
    "an unknown kind of number": (
        lambda f: index(f, lambda d: d["chunks"][0].update(dtype="object")),
        r"holds 'object', which is no kind of number",
    ),
    "a missing slice": (lambda f: index(f, lambda d: d["chunks"].pop(0)), r"m has 35 elements, but 20 are there"),
    "a wrong type": (
        lambda f: index(f, lambda d: d["chunks"][0].update(start="0")),
        r"rank-0.json.chunks\[0\].start",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_and_malice_are_refused_in_one_line(tmp_path: Path, damage: str) -> None:
    spoil, said = DAMAGES[damage]
    folder = save(tmp_path / "checkpoint")
    spoil(folder)
    with pytest.raises(CheckpointError, match=said) as caught:
        Stored(folder, 2).read("m")
    assert "\n" not in str(caught.value)
    assert not (folder / "boom").exists()


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    save(tmp_path)
    content = bytearray((tmp_path / "rank-1.bin").read_bytes())
    content[17] ^= 4
    (tmp_path / "rank-1.bin").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"the bytes of m in rank-1.bin are not those that were written"):
        Stored(tmp_path, 2).read("m")


def test_what_another_model_has_is_refused(tmp_path: Path) -> None:
    stored = Stored(save(tmp_path), 2)
    with pytest.raises(CheckpointError, match="holds no other; it belongs to another model"):
        stored.load({"other": Piece.whole(torch.zeros(1))})
    with pytest.raises(CheckpointError, match=r"m has the shape \[5, 7\] in torch.float64, but the model needs"):
        stored.load({"m": Piece.whole(torch.zeros(5, 7))})


# Folders


def manifest(step: int, metric: float | None = None, judged_by: Any = None) -> Manifest:
    subject = Subject("small", "0123", "float64", "SGD", 0, "digits", 48)
    return Manifest(Position(step, 0, 8), subject, 2, {}, {}, (), metric, judged_by=judged_by)


def committed(home: Path, step: int, metric: float | None = None, judged_by: Any = None) -> Path:
    save(folders.partial(home, step))
    return folders.commit(home, manifest(step, metric, judged_by))


def test_a_folder_of_the_final_name_is_complete(tmp_path: Path) -> None:
    made = committed(tmp_path, 7, 0.5)
    assert Manifest.load(made) == manifest(7, 0.5)
    save(folders.partial(tmp_path, 9))
    assert folders.complete(tmp_path) == [made]
    assert folders.find(tmp_path) == folders.find(made) == made
    folders.clean(tmp_path)
    assert list(tmp_path.iterdir()) == [made]


def test_a_rank_whose_file_is_not_there_stops_the_commit(tmp_path: Path) -> None:
    save(folders.partial(tmp_path, 3))
    (folders.partial(tmp_path, 3) / "rank-1.json").unlink()
    with pytest.raises(CheckpointError, match=r"the files of ranks \[1\] are not in .* all nodes share"):
        folders.commit(tmp_path, manifest(3))
    assert folders.complete(tmp_path) == []


class Killed(BaseException):
    """Stands for SIGKILL: nothing handles it."""


def dying(call: Callable[..., Any], left: Iterator[int]) -> Callable[..., Any]:
    """The call, as long as any are left to be made."""

    def made(*given: Any, **more: Any) -> Any:
        if next(left) <= 0:
            raise Killed
        return call(*given, **more)

    return made


@pytest.mark.parametrize("keep", [1, 2])
def test_a_kill_before_any_call_of_the_file_system_leaves_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: int
) -> None:
    """While the second one is saved and the first one maybe removed; after a kill nothing more is called."""
    calls = ((os, "fsync"), (Path, "rename"), (Path, "mkdir"), (Path, "open"), (os, "unlink"), (os, "rmdir"))
    plan, config = (
        to_data(plan_of(normed_case(), "alone")),
        CheckpointConfig(every=1, keep=keep, asynchronous=False),
    )
    made: list[int] = []
    for allowed in range(100):
        home = tmp_path / str(allowed) / "checkpoints"
        saver = Saver(home, config, 0, None)
        saver.save({"m": Piece.whole(FULL)}, replace(manifest(1), ranks=1, plan=plan))
        left = itertools.count(allowed, -1)
        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            for owner, name in calls:
                patch.setattr(owner, name, dying(getattr(owner, name), left))
            saver.save({"m": Piece.whole(FULL)}, replace(manifest(2), ranks=1, plan=plan))
        found = intact.look(compose([f"run.dir={home.parent}", "resume=auto"]), Process("cpu"))
        assert found.folder is not None
        assert found.damaged == ()
        made.append(int(found.folder.name[5:]))
        if next(left) > 0:
            break
    assert len(made) > (12 if keep == 1 else 8)
    assert made == sorted(made)
    assert (made[0], made[-1]) == (1, 2)


@pytest.mark.parametrize(("best", "stay"), [(None, [4, 5]), ("accuracy", [2, 4, 5]), ("loss", [1, 4, 5])])
def test_the_latest_stay_and_the_best(tmp_path: Path, best: Any, stay: list[int]) -> None:
    for step, metric in ((1, 0.1), (2, 0.9), (3, None), (4, 0.5), (5, None)):
        committed(tmp_path, step, metric, best)
    folders.retain(tmp_path, 2, Judge.of(best, {}))
    assert [int(p.name[5:]) for p in folders.complete(tmp_path)] == stay
    assert len(list(tmp_path.iterdir())) == len(stay)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": 2}, "has version 2, but this hybridpar reads 1"),
        ({"ranks": 0}, "impossible numbers"),
        ({"subject": None}, "subject"),
        ({"more": 1}, "more"),
    ],
)
def test_a_foreign_manifest_is_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    file = committed(tmp_path, 3) / folders.MANIFEST
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(CheckpointError, match=said):
        Manifest.load(file.parent)


def test_a_folder_without_checkpoints_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"holds no checkpoint; give the folder of a checkpoint, or of a run"
    ):
        folders.find(tmp_path)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["checkpoint.every=0"], r"checkpoint.every: 0 must be at least 1"),
        (["checkpoint.keep=0"], r"checkpoint.keep: 0 must be at least 1"),
        (["checkpoint.best=loss"], r"checkpoint.best: loss is of no effect without checkpoint.every"),
        (["resume=auto"], r"resume=auto: continues the run in run.dir, which is missing"),
    ],
)
def test_what_is_asked_of_checkpoints_is_checked(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        compose(overrides)
