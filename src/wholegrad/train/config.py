"""A training run's configuration: TOML in, checked and frozen out, so that a mistake costs one line.

Paths in the file may hold ``${NAME}`` (an environment variable) and are relative to the file's own folder.
Every refusal is a ``ConfigError`` that names the file, the key and the remedy; an unknown key names the
nearest known one.
"""

from __future__ import annotations

import difflib
import inspect
import re
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ValidationError

from wholegrad.errors import ConfigError
from wholegrad.train.tables import PARTS, Config, DataConfig, PairConfig, TrainConfig, expand

__all__ = ["Config", "DataConfig", "PairConfig", "TrainConfig", "check_config", "expand", "known_keys", "load_config"]

NAMED = ("optimizer", "schedule")  # tables for which a name alone will do
SHAPED = ("constant", "cosine")  # schedules that need nothing of torch
UNFIT = ("LambdaLR", "MultiplicativeLR", "SequentialLR", "ChainedScheduler", "LRScheduler")  # need code, not values

_NUMBER = "which is no whole number", "write a whole number, without quotes"
_TABLE = "which is no table", "write it as a table of keys"
WANTED = {  # what is wrong with a value, and the remedy, by the kind of error
    "int_type": _NUMBER,
    "int_from_float": _NUMBER,
    "float_type": ("which is no number", "write a number, without quotes"),
    "finite_number": ("which is no finite number", "write a finite number"),
    "bool_type": ("which is neither true nor false", "write true or false, without quotes"),
    "string_type": ("which is no text", "write text, in quotes"),
    "tuple_type": ("which is no list", "write a list: [...]"),
    "too_short": ("which is an empty list", "name at least one"),
    "too_long": ("which is too long a list", "take something out"),
    "dict_type": _TABLE,
    "model_type": _TABLE,
    "model_attributes_type": _TABLE,
}


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a TOML file, put ``key=value`` overrides (``train.lr=0.003``) on top, and check the whole.

    Raises:
        ConfigError: the file cannot be read, is not TOML, or asks for something unknown or impossible.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(str(path), f"cannot be read ({error.strerror})", "check the path") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), f"is not TOML ({error})", "mend that line") from None
    for override in overrides:
        _override(table, override)
    return check_config(table, str(path), path.parent)


def check_config(table: dict[str, Any], where: str, folder: Path = Path()) -> Config:
    """A checked ``Config`` of a nested table; ``where`` names its source in messages.

    Raises:
        ConfigError: the first thing that is wrong with it.
    """
    if "folder" in table:
        raise ConfigError(where, "unknown key 'folder'", "remove it")
    try:
        config = Config.model_validate({**table, "folder": folder})
    except ValidationError as error:
        raise _first_error(error, where) from None
    _check_sense(config, where)
    return config


def _override(table: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(text, "is not key=value", "write for example train.lr=0.003")
    *parents, leaf = key.strip().split(".")
    for parent in parents:
        if parent in NAMED and isinstance(table.get(parent), str):  # a name alone stands for a table
            table[parent] = {"name": table[parent]}
        table = table.setdefault(parent, {})
        if not isinstance(table, dict):
            raise ConfigError(text, f"'{parent}' is not a table", "name a key such as train.lr")
    if leaf in ("steps", "epochs"):  # the one given last counts
        table.pop("epochs" if leaf == "steps" else "steps", None)
    if (parents, leaf) == (["data"], "slides"):  # in place of lists
        for part in PARTS:
            table.pop(part, None)
    table[leaf] = _toml_value(value.strip())


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text  # a bare word is a string


def _first_error(error: ValidationError, where: str) -> ConfigError:
    found = error.errors()
    first = next((each for each in found if each["type"] == "extra_forbidden"), found[0])
    if isinstance(first["input"], dict):  # a pair, or a name: what is wrong with the pair
        first = next((each for each in found if "PairConfig" in each["loc"]), first)
    key = ".".join(str(part) for part in first["loc"] if str(part) not in ("PairConfig", "str", "int"))
    if first["type"] == "extra_forbidden":
        return ConfigError(where, f"unknown key '{key}'", _nearest(key, isinstance(first["input"], dict)))
    if first["type"] == "missing":
        return ConfigError(where, f"key '{key}' is missing", "add it")
    if first["type"] in WANTED:
        cause, remedy = WANTED[first["type"]]
        given = list(first["input"]) if isinstance(first["input"], tuple) else first["input"]
        return ConfigError(where, f"'{key}' is {given!r}, {cause}", remedy)
    said = first["msg"][0].lower() + first["msg"][1:]
    return ConfigError(where, f"'{key}' is {first['input']!r}, {said}", "mend that value")


def _nearest(key: str, table: bool) -> str:
    """The remedy for a key, or a table, that is not known."""
    if table:
        tables = list(known_tables(Config))
        leaves = [name for name in tables if difflib.get_close_matches(_leaf(key), [_leaf(name)])]
        meant = difflib.get_close_matches(key, tables, n=1) or leaves
        if meant:
            return f"did you mean [{meant[0]}]?"
    known = list(known_keys(Config))
    if "." in key and (same := difflib.get_close_matches(key, known, n=1, cutoff=0.8)):
        return f"did you mean '{same[0]}'?"
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
    leaf = difflib.get_close_matches(_leaf(key), [_leaf(k) for k in known], n=1)
    best = next((k for k in known if leaf and _leaf(k) == leaf[0]), near)
    return f"did you mean '{best}'?"


def _leaf(key: str) -> str:
    return key.rpartition(".")[2]


def known_keys(table: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every key of a table and of those within it, dotted."""
    for name, field in table.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from known_keys(field.annotation, f"{prefix}{name}.")
        elif not field.exclude:
            yield prefix + name


def known_tables(table: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every table within a table, dotted."""
    for name, field in table.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield prefix + name
            yield from known_tables(field.annotation, f"{prefix}{name}.")


def _check_sense(config: Config, where: str) -> None:
    """What single fields cannot see."""
    _check_data(config, where)
    train = config.train
    if (train.steps is None) == (train.epochs is None):
        given = "neither" if train.steps is None else "both"
        raise ConfigError(where, f"{given} of train.steps and train.epochs given", "give one of them")
    if min(train.weights) < 0 or sum(train.weights) == 0:
        raise ConfigError(where, f"train.weights are {list(train.weights)}", "give two of 0 or more, not both 0")
    if train.loss == "dice" and train.weights != (1.0, 1.0):
        raise ConfigError(where, "train.weights with the dice loss, which has none", "use bce, bce+dice or focal")
    if "lr" in train.optimizer.args:
        raise ConfigError(where, "lr in train.optimizer.args", "set train.lr")
    _check_name(where, "train.optimizer", train.optimizer.name, optimizers())
    _check_name(where, "train.schedule", train.schedule.name, (*SHAPED, *schedules()))
    if train.schedule.name in SHAPED and train.schedule.args:
        raise ConfigError(where, f"train.schedule {train.schedule.name} takes no args", "remove them")
    network, validation = config.network, config.validation
    if (network.mean is None) != (network.std is None):
        raise ConfigError(where, "one of network.mean and network.std given", "give both, a number a channel")
    if network.mean and network.std and (len(network.mean) != len(network.std) or min(network.std) <= 0):
        raise ConfigError(where, "network.mean and network.std do not fit", "give one positive std for each mean")
    if validation.steps is not None and validation.epochs is not None:
        raise ConfigError(where, "both of validation.steps and validation.epochs given", "give one of them")
    if validation.patience is not None and not (validation.steps or validation.epochs):
        raise ConfigError(where, "validation.patience without an interval", "give validation.steps or .epochs")


def _check_data(config: Config, where: str) -> None:
    data, split = config.data, config.data.split
    if data.train is None and data.slides is None:
        raise ConfigError(
            where, "neither data.train nor data.slides given", "list names, or name a folder, glob or CSV"
        )
    if data.slides is not None and (data.train or data.val or data.test):
        raise ConfigError(where, "both data.slides and lists of slides given", "give one of them")
    if data.slides is None and split.model_fields_set:
        raise ConfigError(where, "data.split without data.slides", "give data.slides, or the lists alone")
    if data.mpp is not None and data.level is not None:
        raise ConfigError(where, "data.mpp and data.level both given", "give one of them")
    if data.crop is not None and min(data.crop) < 1:
        raise ConfigError(where, f"data.crop is {list(data.crop)}", "give height and width of 1 or more")
    if data.pad and data.crop is None:
        raise ConfigError(where, "data.pad without data.crop", "give the size to pad to as data.crop")
    if data.group is not None:
        try:
            re.compile(data.group)
        except re.error as error:
            raise ConfigError(where, f"data.group is no regular expression ({error})", "mend it") from None
    if (split.folds is None) != (split.fold is None):
        raise ConfigError(where, "one of data.split.folds and data.split.fold given", "give both")
    if split.folds is not None and split.fold is not None and split.fold >= split.folds:
        raise ConfigError(where, f"data.split.fold is {split.fold}", f"give 0 to {split.folds - 1}")
    if split.folds is not None and split.test:
        raise ConfigError(where, "both data.split.folds and data.split.test given", "the fold is the test")
    if split.val + split.test >= 1:
        raise ConfigError(where, "data.split leaves nothing to train on", "give fractions that sum to less than 1")
    for part in ("val", "test"):
        for shared in set(data.train or ()) & set(getattr(data, part)):
            raise ConfigError(
                where, f"{shared!r} is in data.train and in data.{part}", f"{part} on slides not trained on"
            )


def optimizers() -> list[str]:
    """Names of ``torch.optim``'s optimisers that a run can use: those that need no closure and no sparse gradients."""
    kinds = inspect.getmembers(torch.optim, inspect.isclass)
    unfit = ("Optimizer", "LBFGS", "SparseAdam")
    return [name for name, kind in kinds if issubclass(kind, torch.optim.Optimizer) and name not in unfit]


def schedules() -> list[str]:
    """Names of ``torch.optim.lr_scheduler``'s schedules that values alone describe."""
    kinds = inspect.getmembers(torch.optim.lr_scheduler, inspect.isclass)
    base = torch.optim.lr_scheduler.LRScheduler
    return [n for n, kind in kinds if issubclass(kind, base) and n not in UNFIT and not n.startswith("_")]


def _check_name(where: str, key: str, name: str, known: Sequence[str]) -> None:
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
        raise ConfigError(where, f"{key} is {name!r}, which is not known", f"did you mean {near!r}?")
