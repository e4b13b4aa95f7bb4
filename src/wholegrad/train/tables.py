"""The tables of a run's configuration file, checked and frozen. ``docs/training.md`` lists their keys; a test compares.

What single fields cannot see is checked in ``config``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from os import environ
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from wholegrad.errors import ConfigError

SUFFIXES = (".svs", ".ome.tif", ".tif", ".tiff")  # of a slide given by name, in order of preference
Part = Literal["train", "val", "test"]
PARTS: tuple[Part, ...] = ("train", "val", "test")
LARGEST_BLUR = 20.0  # pixels of standard deviation


class _Table(BaseModel):
    """Values are taken as TOML has them: a text is no number, however it reads."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _with_tuples(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        return {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}


class PairConfig(_Table):
    """One slide and its label mask, by path; ``mpp`` as ``data.slide_mpp``, ``group`` as in a CSV."""

    slide: str
    mask: str
    mpp: float | None = Field(default=None, gt=0)
    group: str | None = None


class SplitConfig(_Table):
    """How ``data.slides`` is divided where no CSV says: by fractions, or in ``folds`` of which ``fold`` is the test.

    Slides of one group (a patient) stay together. ``val`` is a fraction of all slides, or, with folds, of those that
    are not in the test fold.
    """

    val: float = Field(default=0.0, ge=0, lt=1)
    test: float = Field(default=0.0, ge=0, lt=1)
    folds: int | None = Field(default=None, ge=2)
    fold: int | None = Field(default=None, ge=0)
    seed: int = Field(default=0, ge=0)


class DataConfig(_Table):
    """Which slides to learn from, which to be judged on, and at which resolution.

    Either lists (``train``, ``val``, ``test``) of cases, each ``{slide = ..., mask = ...}`` or a name that stands for
    ``root/slides/NAME.*`` with ``root/masks/NAME.mask.tif``; or ``slides``: a folder, a glob or a CSV file, divided by
    ``data.split``. ``mpp`` (micrometres a pixel) or ``level`` say at which resolution slides are read, as
    :func:`wholegrad.open_slide` does; without either it is level 0. ``slide_mpp`` is that of level 0 where files do not
    say. ``balance`` evens out glass and ink, of which a picture of the whole slide tells, before the network sees it;
    so do ``predict`` and ``evaluate`` then. ``classes`` and ``ignore`` say what outlines mean, as for
    :func:`wholegrad.open_mask`. ``crop`` (height, width in pixels) trains on a random region of each slide in place of
    the whole; with ``pad`` a slide smaller than it is framed in its own glass.
    """

    root: str = "."
    train: tuple[str | PairConfig, ...] | None = Field(default=None, min_length=1)
    val: tuple[str | PairConfig, ...] = ()
    test: tuple[str | PairConfig, ...] = ()
    slides: str | None = None
    masks: str = "masks/{name}.mask.tif"
    group: str | None = None
    split: SplitConfig = Field(default_factory=SplitConfig)
    mpp: float | None = Field(default=None, gt=0)
    level: int | None = Field(default=None, ge=0)
    slide_mpp: float | None = Field(default=None, gt=0)
    balance: bool = False
    classes: dict[str, int] | None = None
    ignore: tuple[str, ...] | None = None
    crop: tuple[int, int] | None = None
    pad: bool = False


class AugmentConfig(_Table):
    """How much a training slide is changed, drawn anew for each slide and step; 0 or false is not at all.

    ``flip`` and ``turn``: mirrored, and turned by quarters, each way as likely. ``brightness``: up to this fraction of
    white is added or taken; ``contrast``: the distance from middle grey times 1 - contrast to 1 + contrast.
    ``stain``: each of haematoxylin, eosin and DAB times 1 - stain to 1 + stain, and up to ``stain_shift`` of optical
    density added or taken. ``blur``: a Gaussian of up to so many pixels of standard deviation.
    """

    flip: bool = False
    turn: bool = False
    brightness: float = Field(default=0.0, ge=0, le=0.5)
    contrast: float = Field(default=0.0, ge=0, lt=1)
    stain: float = Field(default=0.0, ge=0, lt=1)
    stain_shift: float = Field(default=0.0, ge=0, le=1)
    blur: float = Field(default=0.0, ge=0, le=LARGEST_BLUR)


class NetworkConfig(_Table):
    """Which network: a built-in name or ``module:factory``, its arguments, and weights to start from.

    ``mean`` and ``std``, a number a channel in fractions of 255, put ``(image - mean) / std`` in front of the network,
    as part of the graph and of what the weights file says.
    """

    name: str = "unet4492"
    args: dict[str, Any] = Field(default_factory=dict)
    weights: str | None = None
    mean: tuple[float, ...] | None = Field(default=None, min_length=1)
    std: tuple[float, ...] | None = Field(default=None, min_length=1)


class _Named(_Table):
    """A name with arguments; the name alone will do."""

    name: str
    args: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


class OptimizerConfig(_Named):
    """An optimiser of ``torch.optim`` by name, and its arguments; the learning rate is ``train.lr``."""

    name: str = "Adam"


class ScheduleConfig(_Named):
    """``constant``, ``cosine`` (half a cosine down to nothing), or a schedule of ``torch.optim.lr_scheduler``.

    It is stepped once an update. In arguments ``"total"`` stands for the run's number of updates.
    """

    name: str = "constant"


class TrainConfig(_Table):
    """Steps or epochs, not both; a step is one slide; ``weights`` are of background and tissue.

    ``device`` is where tiles run (the weights stay in the host's memory); if it has memory of its own, ``budget`` is
    for that, and ``host_budget`` the process's. ``tf32``, ``deterministic``, ``triton`` and ``graphs`` as for
    :func:`wholegrad.open_device`.
    ``boundary_dtype`` stores boundaries rounded to it, as :func:`wholegrad.plan` does; left out, as they are.
    ``strategy`` is how activations are held, as for :func:`wholegrad.plan`.
    ``accumulate`` slides make one update, by the mean of their gradients. ``clip`` is the largest norm of a gradient.
    ``ema`` is the decay of averaged weights, which are then what is evaluated and saved. ``warmup`` counts updates.
    ``on_error`` says whether a slide that cannot be read ends the run or is skipped.
    """

    steps: int | None = Field(default=None, ge=1)
    epochs: int | None = Field(default=None, ge=1)
    lr: float = Field(default=0.01, gt=0)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
    warmup: int = Field(default=0, ge=0)
    accumulate: int = Field(default=1, ge=1)
    clip: float | None = Field(default=None, gt=0)
    ema: float | None = Field(default=None, gt=0, lt=1)
    loss: Literal["bce", "dice", "bce+dice", "focal"] = "bce+dice"
    weights: tuple[float, float] = (1.0, 1.0)
    budget: str | int | None = None
    device: str | None = None
    host_budget: str | int | None = None
    tf32: bool = False
    deterministic: bool = False
    triton: bool = False
    graphs: bool = False
    boundary_dtype: Literal["bfloat16", "float16"] | None = None
    strategy: Literal["auto", "in-core", "recompute", "offload", "managed", "stream"] = "auto"
    seed: int = Field(default=0, ge=0)
    threads: int | None = Field(default=None, ge=1)
    checkpoint_minutes: float = Field(default=5.0, ge=0)
    on_error: Literal["stop", "skip"] = "stop"
    panels: bool = True
    out: str = "out/train"


class ValidationConfig(_Table):
    """Evaluation on the ``val`` slides: every so many ``steps`` or ``epochs``, and at the end.

    ``patience``: stop after so many evaluations in a row without a mean Dice better than the best by more than
    ``delta``.
    """

    steps: int | None = Field(default=None, ge=1)
    epochs: int | None = Field(default=None, ge=1)
    patience: int | None = Field(default=None, ge=1)
    delta: float = Field(default=0.0, ge=0)


class TrackConfig(_Table):
    """Where the log goes besides ``log.jsonl``: ``tensorboard`` (into the run's folder), MLflow (a tracking URI)."""

    tensorboard: bool = False
    mlflow: str | None = None
    experiment: str = "wholegrad"


class MeshConfig(_Table):
    """How a run is spread over ranks, where ``torchrun`` starts several: slides of one update over all of them.

    ``tiles`` ranks share the tiles of one slide. ``timeout``: seconds in which a rank that others wait for must get on
    with its work, be it by one tile.
    """

    tiles: int = Field(default=1, ge=1)
    timeout: float = Field(default=300.0, gt=0)


class Config(_Table):
    """A whole run. ``folder`` is where relative paths start."""

    data: DataConfig
    augment: AugmentConfig = Field(default_factory=AugmentConfig)
    network: NetworkConfig = Field(default_factory=NetworkConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    validation: ValidationConfig = Field(default_factory=ValidationConfig)
    track: TrackConfig = Field(default_factory=TrackConfig)
    mesh: MeshConfig = Field(default_factory=MeshConfig)
    folder: Path = Field(default=Path(), exclude=True)

    @property
    def out(self) -> Path:
        """The folder that the run writes to."""
        return self.path(self.train.out)

    def path(self, text: str) -> Path:
        """A path as the file means it: variables put in, relative to the file's folder."""
        return self.folder / expand(text, str(self.folder))

    def as_dict(self) -> dict[str, Any]:
        """The tables as JSON has them, every key written out."""
        return self.model_dump(mode="json")

    def pairs(self, part: Part) -> Iterator[tuple[str, Path, Path]]:
        """Name, slide path and mask path of each case that a list names."""
        for case in getattr(self.data, part) or ():
            if isinstance(case, PairConfig):
                slide = self.path(case.slide)
                yield stem(slide.name), slide, self.path(case.mask)
            else:
                root = self.path(self.data.root)
                yield case, _find_slide(root, case), root / "masks" / f"{case}.mask.tif"

    def steps_of(self, slides: int) -> int:
        """How many steps a run on so many training slides has."""
        return self.train.steps if self.train.steps is not None else (self.train.epochs or 0) * slides


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


def stem(name: str) -> str:
    """A file's name without the ending that says slide."""
    return next((name.removesuffix(ending) for ending in SUFFIXES if name.endswith(ending)), Path(name).stem)


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
