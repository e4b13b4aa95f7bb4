"""Which label each class of outlines gets, and in which order classes are painted over each other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral

from wholegrad.errors import ConfigError, SlideError
from wholegrad.slide.outlines_read import Outline

IGNORE = 255
OTHERS = "*"

Classes = Mapping[str, int | None]


def to_paint(
    path: str, outlines: Sequence[Outline], classes: Classes | None, ignore: Iterable[str] | None
) -> list[tuple[int, Outline]]:
    """The outlines with their labels, in the order in which they are painted. See ``open_mask``.

    Raises:
        ConfigError: labels outside 0 to 255, or a class that ``classes`` does not know.
        SlideError: no outline at all, or several classes and no ``classes``.
    """
    names = list(dict.fromkeys(outline.name for outline in outlines))
    ignored = [name for name in names if _ignored(name, ignore)]
    kept = [name for name in names if name not in ignored]
    if classes is None:
        classes = _one_class(path, kept, bool(outlines))
    _check_labels(classes)
    unknown = [name for name in kept if name not in classes and OTHERS not in classes]
    if unknown:
        cause = f"has the class {unknown[0]!r}, which classes {dict(classes)} does not name"
        remedy = f"give it a label (0 background, 255 ignore, None to leave it out), or {OTHERS!r} for all others"
        raise ConfigError(path, cause, remedy)
    rank = {name: number for number, name in enumerate([*classes, *ignored])}
    found = list[tuple[int, int, Outline]]()
    for outline in outlines:
        key = outline.name if outline.name in ignored or outline.name in classes else OTHERS
        label = IGNORE if outline.name in ignored else classes[key]
        if label is not None:
            found.append((len(rank) if outline.name in ignored else rank[key], label, outline))
    found.sort(key=lambda each: each[0])
    return [(label, outline) for _, label, outline in found]


def _check_labels(classes: Classes) -> None:
    if not isinstance(classes, Mapping):
        raise ConfigError("classes", f"is {classes!r}", "give the label of each class: {'Tissue': 1}")
    remedy = "give small whole numbers, 255 to ignore"
    for name, label in classes.items():
        if label is None:
            continue
        if not isinstance(label, Integral) or isinstance(label, bool):
            raise ConfigError("classes", f"label {label!r} of {name!r} is no whole number", remedy)
        if not 0 <= label <= IGNORE:
            raise ConfigError("classes", f"label {label} is not within 0 to 255", remedy)


def _ignored(name: str, ignore: Iterable[str] | None) -> bool:
    """By name; by default QuPath's rule (names that end in a star) and plain "Ignore"."""
    if isinstance(ignore, str):
        raise ConfigError("ignore", f"is {ignore!r}", "give a list of names of classes")
    return name in set(ignore) if ignore is not None else name.endswith("*") or name.lower() == "ignore"


def _one_class(path: str, kept: list[str], any_outline: bool) -> Classes:
    if len(kept) == 1:
        return {kept[0]: 1}
    if not kept:
        what = "only areas to ignore" if any_outline else "no outline with an area"
        remedy = "draw the tissue and export again; if the slide has none, say so with classes={'Tissue': 1}"
        raise SlideError(path, f"holds {what}", remedy)
    wanted = {name: number for number, name in enumerate(sorted(kept), 1)}
    cause = f"holds {len(kept)} classes, and their labels must be the same for every slide"
    raise SlideError(path, cause, f"give classes={wanted} or the like; where areas overlap, the later one wins")
