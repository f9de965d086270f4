"""The built wheel, installed where no checkout is: it plans, and trains in two processes, from any folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ("hybridpar", "conf", "models", "pyproject.toml", "README.md", "LICENSE")


def run(*command: str | Path, cwd: Path) -> str:
    """What a command prints; it sees neither the checkout nor the paths of this process."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(
        [str(c) for c in command],
        cwd=cwd,
        env={**environment, "CUDA_VISIBLE_DEVICES": "", "XDG_CACHE_HOME": str(cwd / "cache")},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy so that nothing is left behind in the checkout."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source)
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", built, source, cwd=built)
    (path,) = built.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with the wheel, and the dependencies of this one.

    A line in a .pth file adds this environment's packages but does not read its .pth files, so that an editable
    installation there stays out.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    interpreter = folder / "bin" / "python"
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    (site / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", interpreter)
    # Ignores the hybridpar of the dependencies, which it would otherwise take for the installed one.
    run(*pip, "install", "--quiet", "--no-deps", "--no-index", "--ignore-installed", wheel, cwd=folder)
    return interpreter


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    return folder


def test_the_wheel_holds_one_package_with_everything(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {n.split("/")[0] for n in names}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"hybridpar"}
    expected = {
        f"hybridpar/{part.relative_to(ROOT).as_posix()}"
        if folder != "hybridpar"
        else part.relative_to(ROOT).as_posix()
        for folder in ("hybridpar", "conf", "models")
        for part in (ROOT / folder).rglob("*")
        if part.suffix in {".py", ".yaml"} or part.name == "py.typed"
    }
    assert expected == {n for n in names if n.startswith("hybridpar/")}
    assert any(n.endswith("licenses/LICENSE") for n in names)


def test_the_checkout_is_out_of_sight(python: Path, elsewhere: Path) -> None:
    code = (
        "import hybridpar, hybridpar.models.vgg as m; from hybridpar.config import conf_dir; "
        "print(hybridpar.__file__, m.__file__, conf_dir(), sep='\\n')"
    )
    environment = python.parents[1]
    found = run(python, "-c", code, cwd=elsewhere).splitlines()
    assert len(found) == 3
    assert all(Path(path).is_relative_to(environment) for path in found), found


def test_the_console_script_plans(python: Path, elsewhere: Path) -> None:
    command = ("plan", "model=small_vgg", "cluster=p100_4x1_40g")
    shown = run(python.with_name("hybridpar"), *command, cwd=elsewhere)
    assert "p100_4x1_40g: 4 ranks on 4 nodes" in shown
    plan = json.loads(run(python, "-m", "hybridpar", *command, "format=json", cwd=elsewhere))
    assert (plan["model"], plan["world"]) == ("small_vgg", 4)
    assert list(elsewhere.iterdir()) == []


def test_two_processes_train(python: Path, elsewhere: Path) -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    job = ("model=small_vgg", "data=digits", "plan=three_stage", "train.global_batch=32", "train.steps=2")
    run(python, *launcher, "-m", "hybridpar", "train", *job, "run.dir=run", cwd=elsewhere)
    summary = json.loads((elsewhere / "run" / "summary.json").read_text())
    assert (summary["world"], summary["steps"], summary["test_samples"]) == (2, 2, 360)
    assert len((elsewhere / "run" / "metrics.jsonl").read_text().splitlines()) == 2
