"""The Dockerfile: no engine builds it here, so each of its RUN lines runs in a scratch root, by the shell.

What differs from an engine: paths lie below the scratch root; ``useradd`` writes to that root's own list of users (and
is left out, as ``chown`` is, for who may not); pip takes dependencies from the tests' environment, not from a network.
The base image and the switch of the user are read, not run.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from test_package import EPOCH, clean, environment

ROOT = Path(__file__).parent.parent
PLACES = ("/opt", "/data", "/cache")

pytestmark = pytest.mark.skipif(os.name != "posix", reason="a Dockerfile's lines are for a POSIX shell")


def instructions() -> list[tuple[str, str]]:
    """Each instruction with its argument, comments and line breaks taken out."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    text = re.sub(r"\\\n\s*", "", "\n".join(lines))
    found = [line.partition(" ") for line in text.splitlines() if line.strip()]
    return [(word, rest.strip()) for word, _, rest in found]


def all_of(word: str) -> list[str]:
    return [rest for each, rest in instructions() if each == word]


def test_it_does_not_run_as_root_and_says_whether_it_is_well() -> None:
    words = [word for word, _ in instructions()]
    assert words.count("USER") == 1 and all_of("USER")[0] not in ("root", "0")
    assert words.index("USER") < words.index("ENTRYPOINT")
    assert "COPY" not in words[words.index("USER") :]
    (health,) = all_of("HEALTHCHECK")
    assert json.loads(health.partition("CMD ")[2]) == ["wholegrad", "doctor", "--quick"]
    assert json.loads(all_of("ENTRYPOINT")[0]) == ["wholegrad"]


def test_its_steps_are_the_readmes() -> None:
    (step,) = re.findall(r"`pip install (-c constraints\.txt) \.`", (ROOT / "README.md").read_text())
    assert any(line.startswith("python -m pip install") and line.endswith(f"{step} .") for line in all_of("RUN"))


def test_it_copies_what_is_there_and_nothing_else_is_sent_to_the_engine() -> None:
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {name for line in all_of("COPY") for name in line.split()[:-1]}
    assert copied == kept
    assert all((ROOT / name).exists() for name in copied)


def placed(text: str, root: Path) -> str:
    """The same with every absolute path of the image below ``root``."""
    for place in PLACES:
        text = re.sub(rf"(?<![\w.]){place}(?=[/\s:]|$)", f"{root}{place}", text)
    return text


def filled(text: str, values: dict[str, str]) -> str:
    """Docker's own substitution of variables."""
    return re.sub(r"\$\{?(\w+)\}?", lambda name: values.get(name[1], ""), text)


def test_every_run_line_runs(tmp_path: Path) -> None:
    root = tmp_path / "root"
    for place in ("etc", "opt", "tmp"):
        (root / place).mkdir(parents=True)
    privileged = os.geteuid() == 0 and shutil.which("useradd") is not None
    users = {"passwd": "root:x:0:0::/:/bin/sh\n", "group": "root:x:0:\n", "shadow": "", "gshadow": ""}
    for name, text in users.items():
        (root / "etc" / name).write_text(text)
    values, folder, ran = {"PATH": os.environ["PATH"]}, root, 0
    env = {**environment(), "PIP_NO_DEPS": "1", "PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "false"}
    env |= {"TMPDIR": str(root / "tmp"), "SOURCE_DATE_EPOCH": EPOCH}
    for word, rest in instructions():
        if word == "ARG":
            name, _, value = rest.partition("=")
            values[name] = value
        elif word == "ENV":
            for each in shlex.split(placed(rest, root)):
                name, _, value = each.partition("=")
                values[name] = env[name] = filled(value, values)
        elif word == "WORKDIR":
            folder = Path(placed(rest, root))
            folder.mkdir(parents=True, exist_ok=True)
        elif word == "COPY":
            *names, to = rest.split()
            copy(names, Path(placed(to, root)), to.endswith("/"))
        elif word == "RUN":
            command = as_scratch(placed(filled(rest, values), root), root, privileged)
            done = subprocess.run(
                ["sh", "-ec", command], cwd=folder, env=env, capture_output=True, text=True, timeout=500
            )
            assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
            ran += 1
            if "-m venv" in command:  # what the network would have brought
                clean(root / "opt/venv")
    assert ran == len(all_of("RUN")) >= 4
    if privileged:
        assert re.search(r"^wholegrad:x:1000:1000:", (root / "etc/passwd").read_text(), re.MULTILINE)
    assert (root / "cache").stat().st_mode & 0o7777 == 0o1777
    wholegrad = shutil.which("wholegrad", path=env["PATH"])
    assert wholegrad == str(root / "opt/venv/bin/wholegrad")
    health = json.loads(all_of("HEALTHCHECK")[0].partition("CMD ")[2])
    assert subprocess.run(health, cwd=folder, env=env, capture_output=True).returncode == 0
    start = [*json.loads(all_of("ENTRYPOINT")[0]), *json.loads(all_of("CMD")[0])]
    assert "usage: wholegrad" in subprocess.run(start, cwd=folder, env=env, capture_output=True, text=True).stdout


def copy(names: list[str], to: Path, into: bool) -> None:
    """As COPY does: into a folder, or a folder's content."""
    to.mkdir(parents=True, exist_ok=True)
    for name in names:
        source = ROOT / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(source, to, dirs_exist_ok=True, ignore=ignored)
        else:
            assert into, "COPY of a file wants a folder that ends in /"
            shutil.copy(source, to)


def as_scratch(command: str, root: Path, privileged: bool) -> str:
    """The line for the scratch root: users are its own, and python is the tests' until there is an environment."""
    if privileged:
        command = command.replace("useradd ", f"useradd --prefix {root} ")
        command = command.replace("chown wholegrad:wholegrad", "chown 1000:1000")  # whom only the scratch root knows
    else:
        command = re.sub(r"useradd [^&]*&&", "", command)
        command = re.sub(r"&&\s*chown [^&]*(?=&&|$)", "", command)
    return command.replace("python -m venv", f"{shlex.quote(sys.executable)} -m venv --without-pip")
