"""Fixtures that several unit tests share."""

import shutil
import subprocess
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def stub_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler to build the stub NVML with")
    folder = tmp_path_factory.mktemp("nvml")
    source = Path(__file__).with_name("nvml_stub.c")
    flags = ("-shared", "-fPIC", "-Wall", "-Wextra", "-Werror")
    command = [compiler, *flags, "-o", str(folder / "libnvidia-ml.so.1"), str(source)]
    subprocess.run(command, check=True)
    return folder


@pytest.fixture
def nvml(stub_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Processes started from now on find the stub NVML; it writes its counts to the file returned."""
    monkeypatch.setenv("LD_LIBRARY_PATH", str(stub_folder))
    path = tmp_path / "stub.json"
    monkeypatch.setenv("NVML_STUB_REPORT", str(path))
    return path


@pytest.fixture
def no_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that is none, found before one that the machine may have."""
    (tmp_path / "libnvidia-ml.so.1").write_text("")
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
