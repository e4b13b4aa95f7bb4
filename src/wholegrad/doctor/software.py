"""What is installed: versions against what this project needs, libraries that load, extras that are there."""

from __future__ import annotations

import importlib.util
import platform
import re
import sys
from importlib.metadata import PackageNotFoundError, requires, version

from wholegrad.doctor.finding import Finding, Findings, State
from wholegrad_start import module, trouble

EXTRAS = {  # what each is for
    "dicom": "DICOM whole-slide images",
    "zarr": "Zarr and OME-Zarr",
    "export": "networks as ONNX",
    "fleet": "thousands of slides by several workers",
    "tensorboard": "a copy of a run's log",
    "mlflow": "a copy of a run's log",
}
NEEDED = re.compile(r"^(?P<name>[\w.-]+)\s*(?P<bounds>[^;]*)(?:;\s*(?P<marker>.*))?$")
SINCE = re.compile(r">=\s*([\w.]+)")
PYTHON = (3, 11)


def look_at_versions(quick: bool) -> Findings:
    """Python and the packages that everything needs; unless ``quick``, each is imported."""
    ours = ".".join(map(str, PYTHON))
    old = sys.version_info < PYTHON
    mend = f"use Python {ours} or later" if old else None
    found = platform.python_version()
    yield Finding("python", f"{found} at {sys.executable}", found, State.BROKEN if old else State.OK, mend)
    needed = requirements()
    if needed is None:
        mend = "pip install wholegrad: without it no version can be compared"
        yield Finding("wholegrad", "runs from a folder, not installed", None, State.ADVICE, mend)
        return
    yield Finding("wholegrad", version("wholegrad"), version("wholegrad"))
    for name, since in needed.get("", []):
        yield _package(name, since, quick)


def look_at_extras() -> Findings:
    """What an extra of this package would add."""
    needed = requirements() or {}
    for extra, purpose in EXTRAS.items():
        packages = [name for name, _ in needed.get(extra, [])]
        missing = [name for name in packages if importlib.util.find_spec(module(name)) is None]
        if not packages:
            continue
        if missing:
            mend = f"pip install 'wholegrad[{extra}]'"
            yield Finding(extra, f"not there ({purpose})", False, State.ABSENT, mend)
            continue
        outdated = [
            each for name, since in needed[extra] if (each := _package(name, since, True)).state is State.BROKEN
        ]
        told = ", ".join(f"{name} {version(name)}" for name in packages)
        if outdated:
            yield Finding(extra, outdated[0].text, False, State.ADVICE, outdated[0].mend)
        else:
            yield Finding(extra, f"{told} ({purpose})", True)


def requirements() -> dict[str, list[tuple[str, str | None]]] | None:
    """Packages and least versions by extra, ``""`` for what everything needs; None where nothing is installed."""
    try:
        told = requires("wholegrad") or []
    except PackageNotFoundError:
        return None
    found: dict[str, list[tuple[str, str | None]]] = {}
    for line in told:
        parts = NEEDED.match(line)
        if parts is None:
            continue
        extra = re.search(r"extra == ['\"](\w+)['\"]", parts["marker"] or "")
        since = SINCE.search(parts["bounds"])
        found.setdefault(extra[1] if extra else "", []).append((parts["name"], since[1] if since else None))
    return found


def numbers(text: str) -> tuple[int, ...]:
    """The leading numbers of a version, for comparison."""
    return tuple(int(part) for part in re.findall(r"\d+", re.split(r"[+a-z]", text, maxsplit=1)[0]))


def _package(name: str, since: str | None, quick: bool) -> Finding:
    install = f"pip install '{name}{f'>={since}' if since else ''}'"
    try:
        found = version(name)
    except PackageNotFoundError:
        return Finding(name, "is not installed", None, State.BROKEN, install)
    if since is not None and numbers(found) < numbers(since):
        return Finding(name, f"{found} is older than {since}", found, State.BROKEN, install)
    if not quick:
        said = trouble(name)
        if said is not None:
            again = f"pip install --force-reinstall {name}"
            return Finding(name, f"{found} does not load ({said})", found, State.BROKEN, again)
    return Finding(name, found, found)
