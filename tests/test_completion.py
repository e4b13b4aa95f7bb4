"""Shell completion, asked of the shells themselves."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from wholegrad.cli import COMMANDS, main

ASK = r"""
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
_shtab_wholegrad "$1" "${COMP_WORDS[$COMP_CWORD]}" "${COMP_WORDS[$((COMP_CWORD - 1))]}" 2>/dev/null
printf '%s\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the script of each shell."""
    folder = tmp_path_factory.mktemp("completion")
    for shell in ("bash", "zsh", "fish"):
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            assert main(["completion", shell]) == 0
        (folder / shell).write_text(said.getvalue())
    return folder


@pytest.mark.parametrize("command", ["completion", "doctor", "export"])
def test_help_has_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert f"examples:\n  wholegrad {command}" in capsys.readouterr().out


def needs(shell: str) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")


def in_bash(scripts: Path, cwd: Path, *words: str) -> set[str]:
    needs("bash")
    command = ["bash", "--norc", "-c", ASK, "bash", str(scripts / "bash"), "wholegrad", *words]
    return set(subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True).stdout.split())


def test_bash_completes_commands_options_choices_and_files(scripts: Path, tmp_path: Path) -> None:
    (tmp_path / "case.svs").write_text("")
    assert set(COMMANDS) <= in_bash(scripts, tmp_path, "")
    assert in_bash(scripts, tmp_path, "pre") == {"predict"}
    assert in_bash(scripts, tmp_path, "train", "--bud") == {"--budget"}
    assert in_bash(scripts, tmp_path, "predict", "--kind", "") == {"mask", "probability", "logits"}
    assert in_bash(scripts, tmp_path, "predict", "ca") == {"case.svs"}
    assert in_bash(scripts, tmp_path, "export", "--out", "ca") == {"case.svs"}
    assert in_bash(scripts, tmp_path, "completion", "") == {"bash", "zsh", "fish"}


def test_bash_completes_at_the_prompt(scripts: Path, tmp_path: Path) -> None:
    """A tab pressed in an interactive shell, on a terminal of its own."""
    needs("bash")
    pty = pytest.importorskip("pty")
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(tmp_path)
        os.execvpe("bash", ["bash", "--norc", "--noprofile", "-i"], {**os.environ, "PS1": "> ", "TERM": "dumb"})
    try:
        os.write(terminal, f"source {scripts / 'bash'}; echo rea''dy\n".encode())
        _until(terminal, b"ready")
        os.write(terminal, b"wholegrad verif\t--ev\t")
        assert b"verify --eval" in _until(terminal, b"verify --eval")
    finally:
        os.close(terminal)
        os.waitpid(process, 0)


def _until(terminal: int, wanted: bytes, seconds: float = 60) -> bytes:
    seen, end = b"", time.monotonic() + seconds
    while wanted not in seen and time.monotonic() < end:
        seen += os.read(terminal, 4096)
    return seen


def test_fish_completes(scripts: Path, tmp_path: Path) -> None:
    needs("fish")
    (tmp_path / "case.svs").write_text("")

    def ask(line: str) -> set[str]:
        command = ["fish", "--no-config", "-c", f"source {scripts / 'fish'}; complete -C '{line}'"]
        env = {**os.environ, "HOME": str(tmp_path)}
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, env=env)
        return {each.partition("\t")[0] for each in done.stdout.splitlines()}

    assert set(COMMANDS) <= ask("wholegrad ")
    assert ask("wholegrad predict --kind ") >= {"mask", "probability", "logits"}
    assert "--budget" in ask("wholegrad train --bud")
    assert "case.svs" in ask("wholegrad predict ca")


def test_zsh_takes_the_script(scripts: Path, tmp_path: Path) -> None:
    """Parsed, and loaded under compinit as the function of the command."""
    needs("zsh")
    (tmp_path / "_wholegrad").write_text((scripts / "zsh").read_text())
    assert (scripts / "zsh").read_text().startswith("#compdef wholegrad")
    script = (
        f"fpath=({tmp_path} $fpath); autoload -Uz compinit && compinit -u -d {tmp_path}/dump; echo $_comps[wholegrad]"
    )
    done = subprocess.run(["zsh", "-f", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "_wholegrad"
    subprocess.run(["zsh", "-f", "-n", str(tmp_path / "_wholegrad")], check=True)
