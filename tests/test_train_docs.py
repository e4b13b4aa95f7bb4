"""docs/training.md against the code: every key with its default, every snippet a good file, every flag a real key."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from wholegrad.commands.train import FLAGS
from wholegrad.train.config import check_config, known_keys
from wholegrad.train.tables import Config

TEXT = (Path(__file__).parent.parent / "docs/training.md").read_text()
SNIPPETS = re.findall(r"```toml\n(.*?)```", TEXT, re.DOTALL)


def test_every_key_is_listed_and_no_other() -> None:
    assert re.findall(r"^\| `([a-z_0-9.]+)` \|", TEXT.partition("## Every key")[2], re.MULTILINE) == list(
        known_keys(Config)
    )


def test_defaults_are_as_listed() -> None:
    made = check_config({"data": {"train": ["a"]}, "train": {"steps": 1}}, "test").as_dict()
    rows = re.findall(r"^\| `([a-z_0-9.]+)` \| (.*?) \|", TEXT.partition("## Every key")[2], re.MULTILINE)
    for key, said in rows:
        if key in ("data.train", "train.steps"):
            continue
        value: Any = made
        for part in key.split("."):
            value = value[part]
        if said:
            assert tomllib.loads(f"x = {said.strip('`')}")["x"] == value, key
        else:
            assert value in (None, []), key


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_each_snippet_is_a_configuration(number: int) -> None:
    check_config(tomllib.loads(SNIPPETS[number]), "docs/training.md")


def test_each_flag_stands_for_a_key() -> None:
    keys = set(known_keys(Config))
    named = {"train.optimizer", "train.schedule"}  # tables for which a name will do
    assert {key for key, _ in FLAGS.values()} <= keys | named
