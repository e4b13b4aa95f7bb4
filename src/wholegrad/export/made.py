"""Makes the file of a network in one format, and finds out by running it which sizes and batches it takes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from wholegrad.errors import WholegradError
from wholegrad.export.card import ExportCard
from wholegrad.export.check import Compared, MismatchError, Truth, agrees, by_tiles
from wholegrad.export.formats import TORCHSCRIPT, Format, Run

UNKNOWN = tuple(1 << k for k in range(8))  # multiples to try where the geometry does not say
UNEVEN = 7  # pixels beyond a multiple, to see whether such sizes do
ELSEWHERE = "choose another ending, or take out of the network what the exporter names"


@dataclass(frozen=True)
class Made:
    """A file, and the card that says what was found out about it."""

    data: bytes
    card: ExportCard


def make(
    form: Format,
    network: nn.Module,
    truth: Truth,
    card: ExportCard,
    size: tuple[int, int],
    stride: tuple[int, int] | None,
    opset: int | None,
    check: bool,
) -> Made:
    """The network's file, checked.

    Args:
        size: of an image that is large enough for it, a multiple of the stride.
        stride: None where it is not known.

    Raises:
        MismatchError: the file does not compute what the network does.
        WholegradError: the exporter refuses the network.
    """
    refusal: WholegradError | None = None
    for batch, height, width in _examples(form, size, check):
        try:
            built = _built(form, network, truth.image(batch, height, width), card, opset)
        except WholegradError as error:
            refusal = refusal or error
            continue
        told = card if batch > 1 else _of_one(card)
        if not check:
            told = replace(told, input=told.input | {"multiple": list(stride or (1, 1))})
            return Made(form.pack(built, told.to_json()), told)
        run = form.load(form.pack(built, ""))
        try:
            told = _checked(told, form, run, truth, size, stride, batch)
        except MismatchError as error:
            refusal = error
            continue
        return Made(form.pack(built, told.to_json()), told)
    assert refusal is not None
    raise refusal


def _examples(form: Format, size: tuple[int, int], check: bool) -> list[tuple[int, int, int]]:
    """Batches and sizes to export with, until one does: code may look at either.

    A trace follows one image: one of uneven size shows the padding that even ones do without.
    """
    height, width = size
    even = [(2, height, width), (1, height, width)]
    return [(2, height + UNEVEN, width + UNEVEN), *even] if form is TORCHSCRIPT and check else even


def _of_one(card: ExportCard) -> ExportCard:
    """The card of a file that takes one image at a time."""
    one = [1, *card.input["axes"][1:]], [1, *card.output["axes"][1:]]
    return replace(card, input=card.input | {"axes": one[0]}, output=card.output | {"axes": one[1]})


def _built(form: Format, network: nn.Module, image: torch.Tensor, card: ExportCard, opset: int | None) -> object:
    try:
        return form.build(network, image, opset)
    except WholegradError:
        raise
    except Exception as error:  # the exporters have many kinds
        cause = error.__cause__ or error
        said = " ".join(f"{type(cause).__name__}: {cause}".split())[:300]
        raise WholegradError(card.network, f"cannot become {form.name} ({said})", ELSEWHERE) from error


def _checked(
    card: ExportCard,
    form: Format,
    run: Run,
    truth: Truth,
    size: tuple[int, int],
    stride: tuple[int, int] | None,
    batch: int,
) -> ExportCard:
    """The card with what running the file showed.

    Raises:
        MismatchError: the file is not the network.
    """
    multiple, whole = _multiple(card, run, truth, size, stride)
    if batch > 1:
        whole = max(whole, _demanded(card, agrees(truth, run, 3, *size), "three images"), key=lambda each: each.file)
    tiled = None
    if card.tiling is not None:
        tiled = by_tiles(truth, run, {"tiling": card.tiling, "output": card.output}, multiple)
        if tiled is not None and not tiled.ok:
            why = f"by tiles it is off by {tiled.file:.1e} from the whole image: run whole images"
            card, tiled = replace(card, tiling=None, why_not=why), None
    checked = {
        "with": form.runtime(), "against": "float64", "whole": whole.file, "torch": whole.torch,
        "allowed": whole.allowed, "tiles": None if tiled is None else tiled.file,
    }  # fmt: skip
    return replace(card, checked=checked, input=card.input | {"multiple": list(multiple)})


def _multiple(
    card: ExportCard, run: Run, truth: Truth, size: tuple[int, int], stride: tuple[int, int] | None
) -> tuple[tuple[int, int], Compared]:
    """What height and width must be a multiple of, the least that does, and how far the file is off there.

    Raises:
        MismatchError: nothing does but the size that it was exported with.
    """
    tried = [(1, 1), stride] if stride is not None else [(m, m) for m in UNKNOWN]
    for rows, cols in tried:
        sizes = [(size[0] + k * rows, size[1] + j * cols) for k, j in ((UNEVEN, 3), (2, UNEVEN), (0, 0))]
        found: list[Compared] = []
        for each in sizes:
            one = agrees(truth, run, 1, *each)
            if one is None or not one.ok:
                break
            found.append(one)
        else:
            return (rows, cols), max(found, key=lambda each: each.file)
    same = _demanded(card, agrees(truth, run, 1, *size), "the size that it was exported with")
    cause = f"runs at one size alone once exported (off by {same.file:.1e} there)"
    raise MismatchError(card.network, cause, "let no code of it fix sizes, or choose another ending")


def _demanded(card: ExportCard, found: Compared | None, where: str) -> Compared:
    if found is None or not found.ok:
        by = "refuses" if found is None else f"is off by {found.file:.1e} (rounding is {found.allowed:.1e}) on"
        raise MismatchError(card.network, f"{by} {where} once exported", "choose another ending, or report this")
    return found
