"""Which slides a run learns from, chooses by, and is judged on: from lists, a folder, a glob or a CSV file.

Slides of one group (a patient) are never divided. The division is a function of names, groups and seed alone; a run
saves it as ``split.json`` and, when resumed, reads it from there, so that a file that comes or goes changes nothing.
"""

from __future__ import annotations

import csv
import dataclasses
import glob
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from wholegrad.errors import ConfigError
from wholegrad.train.tables import PARTS, SUFFIXES, Config, PairConfig, Part, SplitConfig, stem

OTHER = (".ndpi", ".vms", ".mrxs", ".scn", ".bif", ".svslide", ".czi", ".dcm", ".zarr", ".png", ".jpg", ".jpeg", ".npy")
IMAGES = (*SUFFIXES, *OTHER)  # endings of what is taken from a folder


@dataclass(frozen=True)
class Entry:
    """A slide with its mask, before it is opened.

    Attributes:
        name: of the slide, its file's without ending.
        slide, mask: paths.
        group: slides of one group stay together; the name itself where nothing says.
        part: train, val or test; empty until divided.
        mpp: um a pixel of its level 0, where the file does not say.
    """

    name: str
    slide: Path
    mask: Path
    group: str
    part: str = ""
    mpp: float | None = None


def entries(config: Config) -> list[Entry]:
    """Every slide of a run with the part it belongs to.

    Raises:
        ConfigError: nothing is found, a name stands for two files, a group is divided, or a part is empty.
    """
    data = config.data
    found = _listed(config) if data.slides is None else _found(config, config.path(data.slides))
    for name in {entry.name for entry in found}:
        parts = [entry.part for entry in found if entry.name == name]
        if len(parts) > 1:
            where = f"data.{parts[0] or 'slides'}"
            raise ConfigError(where, f"names {name} twice", "name each slide once")
    if data.slides is not None and not all(entry.part for entry in found):
        found = divide(found, data.split)
    _check_groups(found)
    if not any(entry.part == "train" for entry in found):
        raise ConfigError(str(data.slides), "leaves no slide to train on", "add slides, or take less for val and test")
    return found


def divide(found: Sequence[Entry], split: SplitConfig) -> list[Entry]:
    """The same entries, each with its part.

    Raises:
        ConfigError: there are fewer groups than parts or folds.
    """
    groups: dict[str, int] = {}
    for entry in sorted(found, key=lambda entry: entry.name):
        groups[entry.group] = groups.get(entry.group, 0) + 1
    rng = np.random.default_rng(split.seed)
    order = [list(groups)[i] for i in rng.permutation(len(groups))]
    part_of = _by_folds(order, groups, split) if split.folds else _by_fractions(order, groups, split.val, split.test)
    return [dataclasses.replace(entry, part=part_of[entry.group]) for entry in found]


def _by_fractions(order: Sequence[str], groups: dict[str, int], val: float, test: float) -> dict[str, str]:
    """Groups in random order, each to the part that lacks most of its share; no part that was asked for is empty."""
    wanted = {"test": test, "val": val, "train": 1 - val - test}
    wanted = {part: share for part, share in wanted.items() if share > 0}
    if len(order) < len(wanted):
        cause = f"has {len(order)} groups of slides for {len(wanted)} parts"
        raise ConfigError("data.split", cause, "add slides, or ask for fewer parts")
    total = sum(groups[group] for group in order)
    have = dict.fromkeys(wanted, 0)
    part_of: dict[str, str] = {}
    for group in order:
        left = len(order) - len(part_of)
        empty = [part for part in wanted if not have[part]]
        open_to = empty if len(empty) >= left else list(wanted)
        part = max(open_to, key=lambda part: wanted[part] * total - have[part])
        part_of[group] = part
        have[part] += groups[group]
    return part_of


def _by_folds(order: Sequence[str], groups: dict[str, int], split: SplitConfig) -> dict[str, str]:
    """Groups in folds of even size, the largest first; one fold is the test, and of the rest a share is val."""
    assert split.folds is not None
    if len(order) < split.folds:
        cause = f"has {len(order)} groups of slides for {split.folds} folds"
        raise ConfigError("data.split", cause, "add slides, or ask for fewer folds")
    sizes = [0] * split.folds
    fold_of: dict[str, int] = {}
    for group in sorted(order, key=lambda group: -groups[group]):  # stable: equal ones stay in random order
        fold_of[group] = sizes.index(min(sizes))
        sizes[fold_of[group]] += groups[group]
    rest = [group for group in order if fold_of[group] != split.fold]
    part_of = _by_fractions(rest, groups, split.val, 0.0)
    return {group: part_of.get(group, "test") for group in order}


def _listed(config: Config) -> list[Entry]:
    """Entries of ``data.train``, ``data.val`` and ``data.test``."""
    found = []
    for part in PARTS:
        for case, (name, slide, mask) in zip(getattr(config.data, part) or (), config.pairs(part), strict=True):
            pair = case if isinstance(case, PairConfig) else None
            group = (pair and pair.group) or _group(config.data.group, name)
            found.append(Entry(name, slide, mask, group, part, pair.mpp if pair else None))
    return found


def _found(config: Config, where: Path) -> list[Entry]:
    """Entries of a CSV file, a folder or a glob."""
    if where.suffix.lower() == ".csv":
        return _of_csv(where, config.data.group)
    if where.is_dir():
        files = [file for file in sorted(where.iterdir()) if file.name.lower().endswith(IMAGES)]
    else:
        files = [Path(file) for file in sorted(glob.glob(str(where), recursive=True))]  # noqa: PTH207 (may be absolute)
    if not files:
        raise ConfigError(str(where), "holds no slides", "check data.slides: a folder, a glob such as *.svs, or a CSV")
    return [_beside(config, file) for file in files]


def _beside(config: Config, file: Path) -> Entry:
    """A slide's entry, its mask where ``data.masks`` says."""
    name = stem(file.name)
    try:
        mask = config.data.masks.format(name=name)
    except (KeyError, IndexError, ValueError):
        raise ConfigError("data.masks", f"is {config.data.masks!r}", "write {name} where the name goes") from None
    return Entry(name, file, config.path(config.data.root) / mask, _group(config.data.group, name))


def _of_csv(path: Path, group: str | None) -> list[Entry]:
    """Entries of a table with columns slide and mask, and perhaps split, group and mpp; paths from its own folder."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file, skipinitialspace=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        cause = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise ConfigError(str(path), f"cannot be read ({cause})", "check the path, save it as UTF-8") from None
    if not rows:
        raise ConfigError(str(path), "lists no slides", "add rows below the line of column names")
    known = {"slide", "mask", "split", "group", "mpp"}
    odd = [str(column) for column in rows[0] if column not in known]
    missing = [column for column in ("slide", "mask") if column not in rows[0]]
    if odd or missing:
        cause = f"has no column '{missing[0]}'" if missing else f"has an unknown column '{odd[0]}'"
        raise ConfigError(str(path), cause, "name the columns slide,mask and if you like split,group,mpp")
    found = [_of_row(path, number, row, group) for number, row in enumerate(rows, start=2)]
    said = sum(bool(entry.part) for entry in found)
    if said not in (0, len(found)):
        raise ConfigError(str(path), f"says split for {said} of {len(found)} slides", "say it for all, or for none")
    return found


def _of_row(path: Path, number: int, row: dict[str, str | None], group: str | None) -> Entry:
    cells = {key: (row.get(key) or "").strip() for key in ("slide", "mask", "split", "group", "mpp")}
    where = f"{path} line {number}"
    if not cells["slide"] or not cells["mask"]:
        raise ConfigError(where, "names no slide or no mask", "give both, or take the line out")
    if cells["split"] not in ("", *PARTS):
        raise ConfigError(where, f"split is {cells['split']!r}", f"use {', '.join(PARTS)}")
    mpp = None
    if cells["mpp"]:
        try:
            mpp = float(cells["mpp"])
        except ValueError:
            mpp = -1.0
        if not 0 < mpp < float("inf"):
            raise ConfigError(where, f"mpp is {cells['mpp']!r}", "give micrometres a pixel such as 0.5, or nothing")
    slide = path.parent / cells["slide"]
    name = stem(slide.name)
    own = cells["group"] or _group(group, name)
    return Entry(name, slide, path.parent / cells["mask"], own, cells["split"], mpp)


def _group(pattern: str | None, name: str) -> str:
    """What ``pattern`` finds in a name (its first group if it has one); the name itself without a pattern."""
    if pattern is None:
        return name
    match = re.search(pattern, name)
    if match is None:
        raise ConfigError("data.group", f"{pattern!r} finds nothing in {name!r}", "write one that fits every name")
    return match.group(1) if match.re.groups else match.group()


def _check_groups(found: Sequence[Entry]) -> None:
    part_of: dict[str, str] = {}
    for entry in found:
        if part_of.setdefault(entry.group, entry.part) != entry.part:
            cause = f"group {entry.group!r} is in {part_of[entry.group]} and in {entry.part}"
            raise ConfigError("data", cause, "keep a patient's slides in one part")


def of_part(found: Sequence[Entry], part: Part) -> list[Entry]:
    """The entries of one part."""
    return [entry for entry in found if entry.part == part]


def to_json(found: Sequence[Entry]) -> str:
    """Entries by part, to read and to resume from."""
    table = {
        part: [
            {**dataclasses.asdict(entry), "slide": str(entry.slide), "mask": str(entry.mask)}
            for entry in of_part(found, part)
        ]
        for part in PARTS
    }
    return json.dumps(table, indent=2) + "\n"


def from_json(path: Path) -> list[Entry]:
    """What ``to_json`` wrote.

    Raises:
        ConfigError: it is something else.
    """
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        return [
            Entry(**{**entry, "slide": Path(entry["slide"]), "mask": Path(entry["mask"])})
            for part in PARTS
            for entry in table[part]
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(str(path), "is not a split that a run saved", "restore it, or start the run anew") from None
