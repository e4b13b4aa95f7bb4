"""Configurations: what they mean, and that every mistake is one line that says what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from wholegrad.errors import ConfigError
from wholegrad.train.config import check_config, expand, load_config

GOOD = """
[data]
root = "."
train = ["a", "b"]
test = ["c"]
[train]
steps = 5
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "run.toml"
    path.write_text(text)
    return path


def test_names_stand_for_files_beside_the_config(tmp_path: Path, write_case: Callable[..., None]) -> None:
    for name in "abc":
        write_case(tmp_path, name)
    config = load_config(write(tmp_path, GOOD))
    name, slide, mask = next(config.pairs("train"))
    assert (name, slide) == ("a", tmp_path / "slides" / "a.tif")
    assert mask == tmp_path / "masks" / "a.mask.tif"
    assert config.out == tmp_path / "out/train"
    assert config.steps_of(2) == 5


def test_pairs_may_be_given_by_path(tmp_path: Path) -> None:
    text = '[data]\ntrain = [{slide = "s/x.svs", mask = "m/x.tif"}]\n[train]\nepochs = 3\n'
    config = load_config(write(tmp_path, text))
    assert list(config.pairs("train")) == [("x", tmp_path / "s/x.svs", tmp_path / "m/x.tif")]
    assert config.steps_of(1) == 3


def test_variables_are_put_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_FOLDER", "/data/here")
    assert expand("${SOME_FOLDER}/x", "f") == "/data/here/x"
    monkeypatch.delenv("SOME_FOLDER")
    with pytest.raises(ConfigError) as error:
        expand("${SOME_FOLDER}/x", "run.toml")
    assert str(error.value) == (
        "run.toml: ${SOME_FOLDER} is not set in the environment; set SOME_FOLDER, or write the path out"
    )


def test_overrides_go_on_top(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, GOOD), ["train.lr=0.003", "train.loss=dice", "data.mpp=4", "train.epochs=2"])
    assert (config.train.lr, config.train.loss, config.data.mpp) == (0.003, "dice", 4.0)
    assert (config.train.steps, config.steps_of(2)) == (None, 4)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("train.stepz=3", "unknown key 'train.stepz'; did you mean 'train.steps'?"),
        ("data.resolution=3", "unknown key 'data.resolution'; did you mean"),
        ("validation.step=3", "unknown key 'validation.step'; did you mean 'validation.steps'?"),
        ("augment.flp=true", "unknown key 'augment.flp'; did you mean 'augment.flip'?"),
        ("train.optimizer.arg=3", "unknown key 'train.optimizer.arg'; did you mean 'train.optimizer.args'?"),
        ("validation.patience=3", "validation.patience without an interval; give validation.steps or .epochs"),
        ("data.pad=true", "data.pad without data.crop; give the size to pad to as data.crop"),
        ("network.mean=[0.5]", "one of network.mean and network.std given; give both"),
        ("augment.blur=50", "'augment.blur' is 50, input should be less than or equal to 20; mend that value"),
        ("steps=3", "unknown key 'steps'; did you mean 'train.steps'?"),
        ("optimiser.lr=3", "unknown key 'optimiser'; did you mean"),
        ("train.lr=-1", "'train.lr' is -1, input should be greater than 0; mend that value"),
        (
            "train.loss=mse",
            "'train.loss' is 'mse', input should be 'bce', 'dice', 'bce+dice' or 'focal'; mend",
        ),
        (
            "train.boundary_dtype=int8",
            "'train.boundary_dtype' is 'int8', input should be 'bfloat16' or 'float16'; mend that value",
        ),
        ("data.crop=[0, 5]", "data.crop is [0, 5]; give height and width of 1 or more"),
        ("data.train=[]", "'data.train' is [], which is an empty list; name at least one"),
        ("data.train=a", "'data.train' is 'a', which is no list; write a list: [...]"),
        ("data.train=[3]", "'data.train.0' is 3, which is no text; write text, in quotes"),
        ('data.train=[{slide="a.svs"}]', "key 'data.train.0.mask' is missing; add it"),
        ("data.crop=[5, 5, 5]", "'data.crop' is [5, 5, 5], which is too long a list; take something out"),
        ('data.pad="yes"', "'data.pad' is 'yes', which is neither true nor false; write true or false"),
        ("data.mpp=inf", "'data.mpp' is inf, which is no finite number; write a finite number"),
        ("train.steps=0", "'train.steps' is 0, input should be greater than or equal to 1; mend that value"),
        ("train.epochs=0", "'train.epochs' is 0, input should be greater than or equal to 1; mend that value"),
        ('train.steps="3"', "'train.steps' is '3', which is no whole number; write a whole number, without quotes"),
        ("train.steps=true", "'train.steps' is True, which is no whole number; write a whole number"),
        ("train.steps=2.5", "'train.steps' is 2.5, which is no whole number; write a whole number"),
        ('train.lr="0.1"', "'train.lr' is '0.1', which is no number; write a number, without quotes"),
        ("train.schedule=3", "'train.schedule' is 3, which is no table; write it as a table of keys"),
        ("trian.steps=3", "unknown key 'trian'; did you mean [train]?"),
        ("optimizer.name=Adam", "unknown key 'optimizer'; did you mean [train.optimizer]?"),
        ("train.optimzer.name=Adam", "unknown key 'train.optimzer'; did you mean [train.optimizer]?"),
        ('data.test=["a"]', "'a' is in data.train and in data.test; test on slides not trained on"),
        ("train.weights=[0, 0]", "train.weights are [0.0, 0.0]; give two of 0 or more"),
        ("folder=1", "unknown key 'folder'; remove it"),
        ("train.lr", "train.lr: is not key=value; write for example train.lr=0.003"),
        ("train.lr.x=1", "'lr' is not a table"),
    ],
)
def test_each_mistake_is_one_line(tmp_path: Path, change: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(write(tmp_path, GOOD + "lr = 0.01\n"), [change])
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[data]\ntrain = ['a']\n", "neither of train.steps and train.epochs given; give one of them"),
        ("[data]\ntrain = ['a']\n[train]\nsteps=1\nepochs=1\n", "both of train.steps and train.epochs given"),
        (
            "[data]\ntrain = ['a']\nmpp = 1\nlevel = 1\n[train]\nsteps = 1",
            "data.mpp and data.level both given",
        ),
        ("[train]\nsteps = 1\n", "key 'data' is missing; add it"),
        ("[dta]\ntrain = ['a']\n[train]\nsteps = 1\n", "unknown key 'dta'; did you mean [data]?"),
        ("[data\n", "is not TOML (Expected"),
    ],
)
def test_a_file_that_makes_no_sense(tmp_path: Path, text: str, said: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert str(error.value).startswith(f"{path}: ")
    assert said in str(error.value)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml: cannot be read \(No such file or directory\); check the path"):
        load_config(tmp_path / "none.toml")


def test_a_name_without_a_slide(tmp_path: Path) -> None:
    config = check_config({"data": {"train": ["ghost"]}, "train": {"steps": 1}}, "test", tmp_path)
    with pytest.raises(ConfigError, match=r"slides/ghost: no slide of that name \(\.svs, .*\); check data\.root"):
        list(config.pairs("train"))
