"""``wholegrad cache``: a copy of a slide that is quick to read, for slides that are read many times."""

from __future__ import annotations

import argparse
from pathlib import Path

import wholegrad as wg
from wholegrad.commands.common import (
    CONSOLE,
    NOTES,
    Commands,
    add_command,
    add_level,
    add_region,
    check_out_is_new,
    make_folder,
)
from wholegrad.slide.copy import copy_slide
from wholegrad.slide.slide import open_slide
from wholegrad.train.progress import display

TEXT = """\
Write a slide at one resolution as a TIFF of uncompressed tiles: the same pixels, read without decoding. It keeps the
slide's um a pixel, and masks and outlines of the slide fit the copy too, whatever the region. Worth it when a slide
is read many times, is JPEG 2000, or has no level near the mpp in use; it takes 4 bytes a pixel of disk."""

EXAMPLES = """\
  wholegrad cache case.svs --out fast/case.tif
  wholegrad cache case.svs --mpp 1 --out case_1mpp.tif
  wholegrad cache case.ndpi --region 20000,8000,30000,30000 --out part.tif"""


def add(commands: Commands) -> None:
    parser = add_command(commands, "cache", run, "write a copy of a slide that is quick to read", TEXT, EXAMPLES)
    parser.add_argument("slide", type=Path, metavar="SLIDE", help="any slide that wholegrad reads")
    parser.add_argument("--out", type=Path, required=True, help="file to write, .tif")
    add_level(parser)
    add_region(parser)
    parser.add_argument("--slide-mpp", type=float, metavar="MPP", help="um a pixel of level 0, if the file is silent")


def run(args: argparse.Namespace) -> int:
    check_out_is_new(str(args.out), "remove it, or give another --out")
    with open_slide(args.slide, mpp=args.mpp, level=args.level, region=args.region, slide_mpp=args.slide_mpp) as slide:
        make_folder(args.out.parent)
        NOTES.print(repr(slide))
        with display(NOTES, "slide") as shown:
            copy_slide(slide, args.out, progress=lambda done, all_: shown.tile(wg.Progress("copying", done, all_)))
    CONSOLE.print(f"{args.out}: {args.out.stat().st_size / 2**20:.1f} MiB")
    return 0
