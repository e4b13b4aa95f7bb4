"""Makes the file of a network in one format, and finds out by running it which sizes and batches it takes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import lcm
from typing import Any

import torch
from torch import nn

from wholegrad.errors import WholegradError
from wholegrad.export.card import ExportCard
from wholegrad.export.check import REFUSED, Compared, MismatchError, Truth, agrees, by_tiles
from wholegrad.export.formats import TORCHSCRIPT, Format, Run

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
    units: list[tuple[int, int]],
    opset: int | None,
    check: bool,
) -> Made:
    """The network's file, checked.

    Args:
        size: of an image that the network takes, large enough for it, a multiple of all units.
        units: what height and width may have to be multiples of, the least first.

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
            return Made(form.pack(built, told.to_json()), told)
        try:
            run = _loaded(form, form.pack(built, ""), card)
            told = _checked(told, form, run, truth, size, units, batch)
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


def _loaded(form: Format, data: bytes, card: ExportCard) -> Run:
    """What runs the file.

    Raises:
        MismatchError: its runtime does not take it, as ONNX Runtime takes no convolution of float64.
    """
    try:
        return form.load(data)
    except Exception as error:  # each runtime has its own
        said = " ".join(str(error).split())[:300]
        single = "" if card.input["dtype"] == "float32" else "call model.float() first, or "
        remedy = f"{single}choose another ending, or leave out the check"
        raise MismatchError(card.network, f"is not taken by {form.runtime()} ({said})", remedy) from error


def _checked(
    card: ExportCard,
    form: Format,
    run: Run,
    truth: Truth,
    size: tuple[int, int],
    units: list[tuple[int, int]],
    batch: int,
) -> ExportCard:
    """The card with what running the file showed.

    Raises:
        MismatchError: the file is not the network.
    """
    multiple, whole = _multiple(card, run, truth, size, units)
    if card.tiling is not None:
        card = replace(card, tiling=_coarser(card.tiling, multiple))
    if batch > 1:
        whole = max(whole, _demanded(card, agrees(truth, run, 3, *size), "three images"), key=lambda each: each.file)
    tiled = None
    if card.tiling is not None:
        tiled = by_tiles(truth, run, {"tiling": card.tiling, "output": card.output}, multiple)
        if tiled is not None and not tiled.ok:
            how = f"is off by {tiled.file:.1e} from the whole image" if tiled != REFUSED else "does not run"
            why = f"by tiles it {how}: run whole images"
            card, tiled = replace(card, tiling=None, why_not=why), None
    checked = {
        "with": form.runtime(), "against": "float64", "whole": whole.file, "torch": whole.torch,
        "allowed": whole.allowed, "tiles": None if tiled is None else tiled.file,
    }  # fmt: skip
    return replace(card, checked=checked, input=card.input | {"multiple": list(multiple)})


def _coarser(tiling: dict[str, Any], multiple: tuple[int, int]) -> dict[str, Any]:
    """A card's tiles, none of which has a size that the file does not take."""
    stride = [lcm(*both) for both in zip(tiling["stride"], multiple, strict=True)]
    halo = [-(-each // by) * by for each, by in zip(tiling["halo"], stride, strict=True)]
    return tiling | {"stride": stride, "halo": halo}


def _multiple(
    card: ExportCard, run: Run, truth: Truth, size: tuple[int, int], units: list[tuple[int, int]]
) -> tuple[tuple[int, int], Compared]:
    """What height and width must be a multiple of, the least that does, and how far the file is off there.

    Raises:
        MismatchError: nothing does but the size that it was exported with.
    """
    for rows, cols in units:
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
