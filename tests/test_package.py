"""What a user installs: wheel and sdist as the sources make them, in an environment of their own."""

from __future__ import annotations

import email
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

import wholegrad

ROOT = Path(__file__).parent.parent
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "src")
BESIDE = ("Makefile", "constraints.txt", "tests")  # of the rest of the repository, which an sdist has too
EPOCH = "1700000000"

USE = r"""
import importlib.resources, sys
import numpy as np
import wholegrad
from wholegrad.cli import main
from wholegrad.nets.tissue import tissue4492

assert wholegrad.__file__.startswith(sys.prefix), wholegrad.__file__
assert (importlib.resources.files("wholegrad.view") / "assets/index.html").read_text().startswith("<!doctype html")
image = np.random.default_rng(0).integers(0, 256, (3, 75, 90), np.uint8)
wholegrad.predict(tissue4492(), image, out="mask.npy")
assert np.load("mask.npy").shape == (1, 75, 90)
assert main(["doctor", "--quick", "--json"]) == 0
try:
    main(["demo", "--help"])
except SystemExit as stop:
    assert not stop.code
"""


def environment() -> dict[str, str]:
    """Without this checkout on the path."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    return {**kept, "SOURCE_DATE_EPOCH": EPOCH, "PYTHONSAFEPATH": "1"}


def build(source: Path, out: Path, *kinds: str) -> None:
    """Wheel and sdist, or one of them, by the standard front end without a network."""
    command = [sys.executable, "-m", "build", "--no-isolation", *kinds, "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the build needs, where it may leave what it likes."""
    folder = tmp_path_factory.mktemp("sources")
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in (*SOURCES, *BESIDE):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def dist(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist, and the wheel built from it."""
    folder = tmp_path_factory.mktemp("dist")
    build(sources, folder)
    return folder


def the_wheel(folder: Path) -> Path:
    (found,) = folder.glob("*.whl")
    return found


def version() -> str:
    told: str = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    return told


def test_one_version() -> None:
    assert wholegrad.__version__ == version()


def test_the_wheel_holds_all_of_the_package_and_nothing_else(dist: Path) -> None:
    path = the_wheel(dist)
    assert path.name == f"wholegrad-{version()}-py3-none-any.whl"
    with zipfile.ZipFile(path) as file:
        names = set(file.namelist())
        told = email.message_from_bytes(file.read(f"wholegrad-{version()}.dist-info/METADATA"))
        scripts = file.read(f"wholegrad-{version()}.dist-info/entry_points.txt").decode()
    package = ROOT / "src/wholegrad"
    wanted = {
        f"wholegrad/{each.relative_to(package).as_posix()}"
        for each in package.rglob("*")
        if each.is_file() and "__pycache__" not in each.parts
    }
    assert {name for name in names if ".dist-info/" not in name} == wanted | {"wholegrad_start.py"}
    for data in ("py.typed", "nets/weights/tissue4492.safetensors", "view/assets/openseadragon.min.js"):
        assert f"wholegrad/{data}" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert told["Version"] == version() and told["License-Expression"] == "Apache-2.0 AND BSD-3-Clause"
    assert told["Description-Content-Type"] == "text/markdown" and told.get_payload().startswith("# wholegrad")
    assert "wholegrad = wholegrad_start:main" in scripts


def test_the_sdist_builds_the_wheel_that_the_sources_build(dist: Path, sources: Path, tmp_path: Path) -> None:
    """The same bytes, too: a wheel depends on its sources and on nothing of the day or the machine."""
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "src/wholegrad/py.typed"} <= names
    assert {"Makefile", "constraints.txt", "tests/conftest.py", "tests/oracle.py"} <= names, "or nobody could test it"
    assert not [name for name in names if name.endswith(".pyc")]
    build(sources, tmp_path, "--wheel")
    assert the_wheel(tmp_path).read_bytes() == the_wheel(dist).read_bytes()


def clean(folder: Path) -> Path:
    """A virtual environment that has what wholegrad depends on, but not wholegrad; its folder of programs.

    Dependencies are those of the tests, found by a line in a ``.pth`` file (whose own ``.pth`` files, an editable
    wholegrad among them, are not read).
    """
    venv.create(folder, with_pip=False, symlinks=True)
    programs = folder / ("Scripts" if os.name == "nt" else "bin")
    python = programs / "python"
    where = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True, text=True, check=True, env=environment(),
    ).stdout.strip()  # fmt: skip
    packages = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    Path(where, "dependencies.pth").write_text("\n".join(packages) + "\n")
    return programs


def test_an_installed_wheel_works(dist: Path, tmp_path: Path) -> None:
    programs = clean(tmp_path / "clean")
    install = ["-m", "pip", "--python", str(programs / "python"), "install", "--no-deps", "--no-index", "--quiet"]
    subprocess.run([sys.executable, *install, str(the_wheel(dist))], check=True, env=environment())
    work = tmp_path / "work"
    work.mkdir()
    run = {"cwd": work, "capture_output": True, "text": True, "env": environment()}
    told = subprocess.run([programs / "wholegrad", "--version"], **run)
    assert told.stdout == f"wholegrad {version()}\n", told.stderr
    done = subprocess.run([programs / "python", "-c", USE], **run)
    assert done.returncode == 0, done.stdout + done.stderr
    assert '"ok": true' in done.stdout
