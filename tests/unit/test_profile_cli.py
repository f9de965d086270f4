"""``hybridpar profile``, and planning from its file: without model, device or torch, and with one-line errors."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hybridpar import cli, planner
from hybridpar.cluster.describe import from_config, save
from hybridpar.cluster.devices import DEVICES
from hybridpar.config import compose
from hybridpar.errors import ConfigError
from hybridpar.model.chain import Chain
from hybridpar.planner import load_model, measured
from hybridpar.profiling import measure as measuring
from hybridpar.profiling.analytic import estimate
from hybridpar.profiling.record import LayerProfile, Profile
from tests.support.command import run

NARROW = (
    "model=small_vgg",
    "model.options.width=4",
    "model.options.classifier_width=16",
    "model.in_shape=[1,8,8]",
    "train.device=cpu",
)
QUICK = ("profile.cache=false", "profile.budget_s=60", "profile.micro_batches=[1,4]")
WITHOUT_TORCH = (
    "import sys\n"
    "for name in ('torch', 'torchvision', 'sklearn', 'deepspeed'):\n"
    "    sys.modules[name] = None  # importing it raises ImportError\n"
    "from hybridpar import cli\n"
    "cli.main(sys.argv[1:])\n"
)


def without_torch(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT_TORCH, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, cwd=cwd)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A measured profile of a narrow VGG, and a cluster of four cores, in files."""
    path = tmp_path_factory.mktemp("files")
    with pytest.raises(SystemExit) as ended:
        cli.main(["profile", *NARROW, *QUICK, f"out={path / 'profile.json'}"])
    assert ended.value.code == 0
    link = {"latency_s": 1e-4, "bytes_per_s": 1e9}
    data = {"name": "four", "device": {"preset": "cpu_core"}, "nodes": {"devices": 4}, "links": {"node": link}}
    save(from_config(data), path / "cluster.yaml")
    return path


def test_a_profile_from_the_command_line_is_whole(folder: Path) -> None:
    profile = Profile.load(folder / "profile.json")
    assert profile.described is not None
    assert (profile.source, profile.device_kind) == ("measured", "cpu")
    assert profile.optimizer == "SGD(momentum=0.9)"
    assert profile.data == "digits"
    assert profile.loader_samples_per_s is not None
    assert profile.loader_samples_per_s > 0
    assert profile.rank_speeds == (1.0,)
    assert "torch" in str(profile.made_with)
    assert len((folder / "profile.json").read_bytes()) < 100_000


def test_planning_from_files_needs_neither_model_nor_device_nor_torch(folder: Path, tmp_path: Path) -> None:
    profile, cluster = f"profile.path={folder / 'profile.json'}", f"cluster.path={folder / 'cluster.yaml'}"
    files = ("plan", "profile=from_file", profile, "cluster=from_file", cluster)
    done = without_torch(
        *files, "model=small_vgg", "model.in_shape=[1,8,8]", "train.global_batch=16", cwd=tmp_path
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "layer times measured" in done.stdout
    assert "predicted (measured)" in done.stdout


def test_the_documented_example_can_be_planned(folder: Path, tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "profiles.md").read_text()
    example = re.findall(r"```json\n(.*?)```", text, re.DOTALL)[0]
    (tmp_path / "tiny.json").write_text(example)
    files = (
        "profile=from_file",
        "profile.path=tiny.json",
        "cluster=from_file",
        f"cluster.path={folder}/cluster.yaml",
    )
    done = without_torch("plan", *files, "train.global_batch=16", "format=json", cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (0, 1), done.stderr
    assert "planning model tiny of the profile" in done.stderr
    assert json.loads(done.stdout)["model"] == "tiny"
    for name in (f.name for kind in (Profile, LayerProfile) for f in fields(kind)):
        assert f"`{name}`" in text, f"{name} is not documented"


def test_a_profile_for_another_kind_of_device_or_optimizer_is_told(
    capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    profile = ("profile=from_file", f"profile.path={folder / 'profile.json'}")
    _, err = run(
        capsys, "plan", *profile, "cluster=p100_4x1_40g", *NARROW, "train.global_batch=16", "optimizer=adam"
    )
    kind, optimizer = err.splitlines()
    assert re.fullmatch(
        r"the profile's times are those of cpu \(.*\); they stand for the P100 of cluster .*", kind
    )
    assert optimizer.startswith("the profile's update time is that of SGD(momentum=0.9); it stands for Adam(")


def test_a_profile_of_another_model_names_whose_it_is(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    """The profile brings its own chain along; the configured model's name is not silently taken for it."""
    profile = ("profile=from_file", f"profile.path={folder / 'profile.json'}")
    cluster = ("cluster=from_file", f"cluster.path={folder / 'cluster.yaml'}")
    _, err = run(capsys, "plan", *profile, *cluster, "model=alexnet", "train.global_batch=16", "format=json")
    assert err == "planning model small_vgg of the profile (not alexnet of the configuration)\n"


def _another_chain(data: dict[str, Any]) -> None:
    data["described"]["model"] = "another"


def _no_chain(data: dict[str, Any]) -> None:
    del data["described"]


def _short_row(data: dict[str, Any]) -> None:
    data["layers"][0]["forward_s"][0] = [1.0] * 9


@pytest.mark.parametrize(
    ("change", "override", "message"),
    [
        (lambda data: data.update(schema=1), "", "schema: 1 is not 3; measure the profile again"),
        (lambda data: data.update(dtype="float64"), "", "taken in float64, but train.precision=float32"),
        (str, "train.precision=float64", "taken in float32, but train.precision=float64"),
        (lambda data: data.pop("device"), "", "profile.json.device: missing"),
        (lambda data: data.update(extra=1), "", "profile.json.extra: unknown field"),
        (_another_chain, "", "described: chain .* is not the profile's"),
        (_no_chain, "", "describes no chain, and tracing model vgg16 needs torch"),
        (_short_row, "", "layer .*: forward_s does not fit fractions x micro_batches"),
        (lambda data: data["layers"].pop(), "", "layers: .*, but the chain has"),
        (lambda data: data.update(update_s_per_byte="fast"), "", "update_s_per_byte: expected float, got 'fast'"),
    ],
)
def test_a_profile_that_does_not_fit_is_refused_in_one_line_without_torch(
    folder: Path, tmp_path: Path, change: Any, override: str, message: str
) -> None:
    data = json.loads((folder / "profile.json").read_text())
    change(data)
    (tmp_path / "profile.json").write_text(json.dumps(data))
    files = (
        "profile=from_file",
        "profile.path=profile.json",
        "cluster=from_file",
        f"cluster.path={folder}/cluster.yaml",
    )
    done = without_torch("plan", *files, *filter(None, [override]), cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    lines = [line for line in done.stderr.splitlines() if not line.startswith("planning model ")]
    assert len(lines) == 1, done.stderr
    assert re.search(message, lines[0])


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "cannot read gone.json"), ("{", "gone.json is not JSON"), ("[]", "expected a mapping")],
)
def test_a_file_that_is_no_profile_is_refused(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    text: str | None,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    if text is not None:
        (tmp_path / "gone.json").write_text(text)
    _, err = run(capsys, "plan", "profile=from_file", "profile.path=gone.json", code=2)
    assert err.count("\n") == 1
    assert message in err


def test_a_profile_of_another_model_is_refused_where_the_model_is_at_hand(folder: Path) -> None:
    config = compose(
        [*NARROW, "model.in_shape=[1,16,16]", "profile=from_file", f"profile.path={folder}/profile.json"]
    )
    with pytest.raises(planner.ProfileError, match=r"was made for chain .*, but model small_vgg is"):
        planner.prepare(config, load_model(config)[0])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("profile.fractions=[0.5,1.0]", "profile.fractions: .* must descend from 1.0"),
        ("profile.fractions=[1.0,0.0]", "profile.fractions: .* must descend from 1.0"),
        ("profile.micro_batches=[4,1]", "profile.micro_batches: .* must ascend"),
        ("profile.micro_batches=[0,1]", "profile.micro_batches: .* must be positive"),
    ],
)
def test_what_cannot_be_profiled_is_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose(["profile=measured", override])


# The cache, and several ranks


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """Keyword arguments of every measurement; none takes any time."""
    calls: list[dict[str, Any]] = []

    def measure(_: object, chain: Chain, *__: object, **options: Any) -> Profile:
        calls.append(options)
        return replace(estimate(chain, DEVICES["cpu_core"]), source="measured")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(measuring, "measure", measure)
    return calls


def test_a_profile_is_measured_once_for_what_it_depends_on(made: list[dict[str, Any]]) -> None:
    def again(*overrides: str) -> Profile:
        config = compose(["profile=measured", *NARROW, *overrides])
        notes: list[str] = []
        profile = measured(config, load_model(config)[0], notes.append)
        assert len(notes) == (0 if len(made) > before else 1)
        assert all("profile.cache=false measures again" in note for note in notes)
        return profile

    before = 0
    first = again()
    before = 1
    assert again() == first
    assert len(made) == 1
    different = (
        "train.precision=float64",
        "optimizer=adam",
        "data=synthetic",
        "profile.budget_s=9",
        "profile.cache=false",
    )
    for override in different:
        before = len(made)
        again(override)
        assert len(made) == before + 1, override


class Ranks(SimpleNamespace):
    """Two ranks of which this is one, and the other says the same."""

    def share(self, make: Any, owner: int = 0) -> Any:  # noqa: ARG002 - as Process.share
        return json.loads(json.dumps(make()))


def test_ranks_measure_together_and_share_one_cached_profile(made: list[dict[str, Any]]) -> None:
    config = compose(["profile=measured", *NARROW, "data=cifar10"])
    place = SimpleNamespace(local_world=2)
    process: Any = Ranks(rank=0, world=2, place=place, device=torch.device("cpu"))
    traced, notes = load_model(config)[0], list[str]()
    profile = measured(config, traced, notes.append, process=process)
    assert profile.rank_speeds == (1.0, 1.0)
    assert made[0]["sharing"] == 2
    assert made[0]["meet"](5) == [5, 5]
    assert profile.loader_samples_per_s is profile.data is None
    assert notes == ["the loader is not measured: data set cifar10 needs a directory; set data.root=/path/to/it"]
    assert measured(config, traced, notes.append, process=process) == profile
    assert len(made) == 1
    measured(config, traced, notes.append)
    assert len(made) == 2, "alone there is no one to share the machine with"
