"""Lists of slides and their division: patients stay together, seeds decide, and every mistake is one line."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wholegrad.errors import ConfigError
from wholegrad.train.config import Config, check_config
from wholegrad.train.split import Entry, divide, entries, from_json, to_json
from wholegrad.train.tables import SplitConfig


def made(count: int, slides_a_group: int = 1) -> list[Entry]:
    return [Entry(f"s{i:02}", Path(f"s{i}.svs"), Path(f"s{i}.tif"), f"g{i // slides_a_group}") for i in range(count)]


def configure(folder: Path, **data: Any) -> Config:
    return check_config({"data": data, "train": {"steps": 1}}, "test", folder)


def parts(found: list[Entry]) -> Counter[str]:
    return Counter(entry.part for entry in found)


@given(
    count=st.integers(6, 40),
    together=st.integers(1, 3),
    val=st.sampled_from([0.0, 0.1, 0.25]),
    test=st.sampled_from([0.0, 0.2, 0.4]),
    seed=st.integers(0, 5),
)
def test_fractions(count: int, together: int, val: float, test: float, seed: int) -> None:
    groups = -(-count // together)
    if groups < 1 + (val > 0) + (test > 0):
        return
    found = divide(made(count, together), SplitConfig(val=val, test=test, seed=seed))
    assert [entry.name for entry in found] == [entry.name for entry in made(count, together)]
    for group in {entry.group for entry in found}:
        assert len({entry.part for entry in found if entry.group == group}) == 1
    for part, share in (("train", 1 - val - test), ("val", val), ("test", test)):
        assert abs(parts(found)[part] - share * count) <= together + 1
        assert (parts(found)[part] > 0) == (share > 0)


def test_every_slide_is_tested_by_one_fold() -> None:
    tested: Counter[str] = Counter()
    for fold in range(5):
        found = divide(made(13), SplitConfig(folds=5, fold=fold, val=0.2, seed=3))
        tested.update(entry.name for entry in found if entry.part == "test")
        assert parts(found)["val"] >= 1 and 2 <= parts(found)["test"] <= 3
    assert set(tested.values()) == {1} and len(tested) == 13


def test_a_seed_is_a_division_and_order_of_files_is_none() -> None:
    split = SplitConfig(test=0.5, seed=1)
    first = {entry.name: entry.part for entry in divide(made(20), split)}
    assert first == {entry.name: entry.part for entry in divide(made(20)[::-1], split)}
    assert first != {entry.name: entry.part for entry in divide(made(20), SplitConfig(test=0.5, seed=2))}


@pytest.mark.parametrize("slides", ["slides", "slides/*.tif", "**/*.tif"])
def test_a_folder_or_a_glob(tmp_path: Path, slides: str) -> None:
    (tmp_path / "slides").mkdir()
    for name in ("p1-a.tif", "p1-b.tif", "p2-a.tif", "p3-a.tif", "notes.txt"):
        (tmp_path / "slides" / name).touch()
    config = configure(tmp_path, slides=slides, masks="labels/{name}.tif", group="^(p.)-", split={"test": 0.3})
    found = entries(config)
    assert [entry.name for entry in found] == ["p1-a", "p1-b", "p2-a", "p3-a"]
    assert found[0].mask == tmp_path / "labels/p1-a.tif"
    assert [entry.group for entry in found] == ["p1", "p1", "p2", "p3"]
    assert parts(found)["test"] >= 1 and found[0].part == found[1].part


def test_a_csv_says_all(tmp_path: Path) -> None:
    (tmp_path / "lists").mkdir()
    text = "slide,mask,split,group,mpp\n../s/a.svs,../m/a.tif,train,p1,0.5\n../s/b.svs,../m/b.tif,test,p2,\n"
    (tmp_path / "lists/all.csv").write_text(text)
    first, second = entries(configure(tmp_path, slides="lists/all.csv"))
    assert (first.name, first.part, first.group, first.mpp) == ("a", "train", "p1", 0.5)
    assert (second.part, second.mpp) == ("test", None)
    assert first.slide.resolve() == tmp_path / "s/a.svs"


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    found = divide(made(6), SplitConfig(test=0.5))
    (tmp_path / "split.json").write_text(to_json(found))
    assert sorted(from_json(tmp_path / "split.json"), key=lambda e: e.name) == found
    (tmp_path / "split.json").write_text("{}")
    with pytest.raises(ConfigError, match="is not a split that a run saved"):
        from_json(tmp_path / "split.json")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "lists no slides; add rows"),
        ("slide,mask\n", "lists no slides"),
        ("slide,label\na,b\n", "has no column 'mask'; name the columns slide,mask"),
        ("slide,mask,patient\na,b,c\n", "has an unknown column 'patient'"),
        ("slide,mask\na.svs,\n", "line 2: names no slide or no mask"),
        ("slide,mask,split\na,b,dev\n", "line 2: split is 'dev'; use train, val, test"),
        ("slide,mask,split\na,b,test\nc,d,\n", "says split for 1 of 2 slides"),
        ("slide,mask,mpp\na,b,nan\n", "line 2: mpp is 'nan'; give micrometres"),
        ("slide,mask\nx/a.svs,b\ny/a.svs,b\n", "names a twice; name each slide once"),
        ("slide,mask,split\na,b,test\n", "leaves no slide to train on"),
        ("slide,mask,split,group\na,b,test,p\nc,d,train,p\n", "group 'p' is in test and in train; keep a patient's"),
    ],
)
def test_each_mistake_in_a_csv_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "all.csv").write_text(text)
    with pytest.raises(ConfigError) as error:
        entries(configure(tmp_path, slides="all.csv"))
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({}, "neither data.train nor data.slides given"),
        ({"slides": "x", "train": ["a"]}, "both data.slides and lists of slides given"),
        ({"train": ["a"], "split": {"test": 0.5}}, "data.split without data.slides"),
        ({"slides": "x", "split": {"folds": 3}}, "one of data.split.folds and data.split.fold given"),
        ({"slides": "x", "split": {"folds": 3, "fold": 3}}, "data.split.fold is 3; give 0 to 2"),
        ({"slides": "x", "split": {"val": 0.5, "test": 0.5}}, "data.split leaves nothing to train on"),
        ({"slides": "x", "group": "("}, "data.group is no regular expression"),
        ({"slides": "x", "masks": "{slide}.tif"}, "data.masks: is '{slide}.tif'; write {name} where the name goes"),
        ({"slides": "x", "group": "zz"}, "'zz' finds nothing in 'one'"),
        ({"slides": "nowhere"}, "nowhere: holds no slides"),
        ({"slides": "x", "split": {"test": 0.5}}, "has 1 groups of slides for 2 parts"),
        ({"slides": "x", "split": {"folds": 2, "fold": 0}}, "has 1 groups of slides for 2 folds"),
    ],
)
def test_each_mistake_in_a_list_is_one_line(tmp_path: Path, data: dict[str, Any], said: str) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x/one.svs").touch()
    with pytest.raises(ConfigError) as error:
        entries(configure(tmp_path, **data))
    assert said in str(error.value) and "\n" not in str(error.value)
