"""A training run's configuration: TOML in, checked and frozen out, so that a mistake costs one line.

Paths in the file may hold ``${NAME}`` (an environment variable) and are relative to the file's own folder.
Every refusal is a ``ConfigError`` that names the file, the key and the remedy; an unknown key names the
nearest known one.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterator, Sequence
from os import environ
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from wholegrad.errors import ConfigError

SUFFIXES = (".svs", ".ome.tif", ".tif", ".tiff")  # of a slide given by name, in order of preference


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PairConfig(_Table):
    """One slide and its label mask, by path."""

    slide: str
    mask: str


class DataConfig(_Table):
    """Which slides to learn from, which to be judged on, and at which resolution.

    A case is ``{slide = ..., mask = ...}``, or a name that stands for ``root/slides/NAME.*`` with
    ``root/masks/NAME.mask.tif``. ``mpp`` (micrometres a pixel) picks the level that comes nearest; ``level``
    picks one by number; without either it is level 0. ``crop`` (height, width in pixels) trains on a random
    region of each slide in place of the whole.
    """

    root: str = "."
    train: tuple[str | PairConfig, ...] = Field(min_length=1)
    test: tuple[str | PairConfig, ...] = ()
    mpp: float | None = Field(default=None, gt=0)
    level: int | None = Field(default=None, ge=0)
    crop: tuple[int, int] | None = None


class NetworkConfig(_Table):
    """Which network: a built-in name or ``module:factory``, its arguments, and weights to start from."""

    name: str = "unet4492"
    args: dict[str, Any] = Field(default_factory=dict)
    weights: str | None = None


class TrainConfig(_Table):
    """Steps or epochs, not both; a step is one slide; ``weights`` are of background and tissue.

    ``boundary_dtype`` stores boundaries rounded to it, as :func:`wholegrad.plan` does; left out, as they are.
    """

    steps: int | None = Field(default=None, ge=0)
    epochs: int | None = Field(default=None, ge=0)
    lr: float = Field(default=0.01, gt=0)
    schedule: Literal["constant", "cosine"] = "constant"
    warmup: int = Field(default=0, ge=0)
    loss: Literal["bce", "dice", "bce+dice", "focal"] = "bce+dice"
    weights: tuple[float, float] = (1.0, 1.0)
    budget: str | int | None = None
    boundary_dtype: Literal["bfloat16", "float16"] | None = None
    seed: int = Field(default=0, ge=0)
    threads: int | None = Field(default=None, ge=1)
    checkpoint_minutes: float = Field(default=5.0, ge=0)
    panels: bool = True
    out: str = "out/train"


class Config(_Table):
    """A whole run. ``folder`` is where relative paths start."""

    data: DataConfig
    network: NetworkConfig = Field(default_factory=NetworkConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    folder: Path = Field(default=Path(), exclude=True)

    @property
    def out(self) -> Path:
        """The folder that the run writes to."""
        return self.path(self.train.out)

    def path(self, text: str) -> Path:
        """A path as the file means it: variables put in, relative to the file's folder."""
        return self.folder / expand(text, str(self.folder))

    def pairs(self, part: Literal["train", "test"]) -> Iterator[tuple[str, Path, Path]]:
        """Name, slide path and mask path of each case."""
        for case in getattr(self.data, part):
            if isinstance(case, PairConfig):
                slide = self.path(case.slide)
                yield _stem(slide.name), slide, self.path(case.mask)
            else:
                root = self.path(self.data.root)
                yield case, _find_slide(root, case), root / "masks" / f"{case}.mask.tif"

    @property
    def total_steps(self) -> int:
        """How many steps the run has."""
        if self.train.steps is not None:
            return self.train.steps
        return (self.train.epochs or 0) * len(self.data.train)


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


def expand(text: str, where: str) -> str:
    """``text`` with each ``${NAME}`` replaced by that environment variable.

    Raises:
        ConfigError: a variable is not set.
    """

    def value(match: re.Match[str]) -> str:
        name = match.group(1)
        if name not in environ:
            raise ConfigError(where, f"${{{name}}} is not set in the environment", f"set {name}, or write the path out")
        return environ[name]

    return re.sub(r"\$\{(\w+)\}", value, text)


def _stem(name: str) -> str:
    """A file's name without the ending that says slide."""
    return next((name.removesuffix(ending) for ending in SUFFIXES if name.endswith(ending)), name)


def _find_slide(root: Path, name: str) -> Path:
    candidates = [root / "slides" / f"{name}{suffix}" for suffix in SUFFIXES]
    for candidate in candidates:
        if candidate.exists():
            return candidate
    raise ConfigError(
        str(root / "slides" / name),
        f"no slide of that name ({', '.join(SUFFIXES)})",
        "check data.root and the name, or give slide and mask by path",
    )


def _override(table: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(text, "is not key=value", "write for example train.lr=0.003")
    *parents, leaf = key.strip().split(".")
    for parent in parents:
        table = table.setdefault(parent, {})
        if not isinstance(table, dict):
            raise ConfigError(text, f"'{parent}' is not a table", "name a key such as train.lr")
    if leaf in ("steps", "epochs"):  # the one given last counts
        table.pop("epochs" if leaf == "steps" else "steps", None)
    table[leaf] = _toml_value(value.strip())


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text  # a bare word is a string


def _first_error(error: ValidationError, where: str) -> ConfigError:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return ConfigError(where, f"unknown key '{key}'", _nearest(key))
    if first["type"] == "missing":
        return ConfigError(where, f"key '{key}' is missing", "add it")
    said = first["msg"][0].lower() + first["msg"][1:]
    return ConfigError(where, f"'{key}' is {first['input']!r}, {said}", "mend that value")


def _nearest(key: str) -> str:
    known = list(_known_keys(Config))
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
    leaf = difflib.get_close_matches(key.rpartition(".")[2], [k.rpartition(".")[2] for k in known], n=1)
    best = next((k for k in known if leaf and k.rpartition(".")[2] == leaf[0]), near)
    return f"did you mean '{best}'?"


def _known_keys(table: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in table.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _known_keys(field.annotation, f"{prefix}{name}.")
        elif not field.exclude:
            yield prefix + name


def _check_sense(config: Config, where: str) -> None:
    """What single fields cannot see."""
    if (config.train.steps is None) == (config.train.epochs is None):
        given = "neither" if config.train.steps is None else "both"
        raise ConfigError(where, f"{given} of train.steps and train.epochs given", "give one of them")
    if config.data.mpp is not None and config.data.level is not None:
        raise ConfigError(where, "data.mpp and data.level both given", "give one of them")
    if config.data.crop is not None and min(config.data.crop) < 1:
        raise ConfigError(where, f"data.crop is {list(config.data.crop)}", "give height and width of 1 or more")
    if min(config.train.weights) < 0 or sum(config.train.weights) == 0:
        raise ConfigError(where, f"train.weights are {list(config.train.weights)}", "give two of 0 or more, not both 0")
    if config.train.loss == "dice" and config.train.weights != (1.0, 1.0):
        raise ConfigError(where, "train.weights with the dice loss, which has none", "use bce, bce+dice or focal")
    if len(set(config.data.train) & set(config.data.test)) > 0:
        shared = next(case for case in config.data.test if case in config.data.train)
        raise ConfigError(where, f"{shared!r} is in data.train and in data.test", "test on slides not trained on")
