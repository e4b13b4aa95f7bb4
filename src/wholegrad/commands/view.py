"""``wholegrad view``: a slide in the browser, with labels, errors, and the tiles of a training step."""

from __future__ import annotations

import argparse
import os
import signal
import tempfile
import threading
import webbrowser
from collections.abc import Callable
from contextlib import ExitStack
from html import escape
from pathlib import Path
from types import FrameType

from wholegrad.commands.common import CONSOLE, NOTES, TARGETS, Commands, add_command, region
from wholegrad.errors import ConfigError
from wholegrad.slide.slide import Region
from wholegrad.view.app import App
from wholegrad.view.live import follow
from wholegrad.view.run import RunFolder, StepWish, completed
from wholegrad.view.scene import Files, Scene
from wholegrad.view.server import Server

TEXT = f"""\
Show a slide in the browser: pan and zoom over it whatever its size, with truth, prediction, probability and errors as
layers, scores, the worst regions, and the tiles and halos of a training step in the order in which it runs them.

With --run, the folder of a run: curves, memory and speed beside its slide and the latest prediction of it, while the
run goes on or afterwards. SLIDE may then be the name of one of its slides, or left out.

Listens on this machine alone, at an address that holds a secret; nothing is sent anywhere, and nothing is written.
Press Ctrl-C to end it. Over ssh: give --port, and ssh -L PORT:127.0.0.1:PORT.

{TARGETS}"""

OTHERS = 12  # names that are listed at most

EXAMPLES = """\
  wholegrad view case.svs
  wholegrad view case.svs --mask case.geojson --prediction mask.ome.tif
  wholegrad view case.svs --mask case.mask.tif --probability p.ome.tif --threshold 0.4
  wholegrad view --run out/train
  wholegrad view case.svs --run out/train
  wholegrad view case.svs --budget 1.5GiB --mpp 0.5
  wholegrad view case.svs --no-browser --port 8080 --jpeg 85"""


def add(commands: Commands) -> None:
    parser = add_command(commands, "view", run, "look at a slide, its labels and errors in the browser", TEXT, EXAMPLES)
    help_text = "any slide that wholegrad reads; with --run also a name of its slides (the one that it predicts)"
    parser.add_argument("slide", type=Path, nargs="?", metavar="SLIDE", help=help_text)
    parser.add_argument("--mask", type=Path, metavar="FILE", help="true labels: label map or outlines")
    parser.add_argument("--prediction", type=Path, metavar="FILE", help="predicted labels: label map or outlines")
    help_text = "probabilities, one channel or several: .tif, .zarr or .npy, as predict --kind probability writes"
    parser.add_argument("--probability", type=Path, metavar="FILE", help=help_text)
    help_text = "a run's folder: its labels, prediction and scores of this slide, and the plan of its steps"
    parser.add_argument("--run", "--report", dest="folder", type=Path, metavar="DIR", help=help_text)
    help_text = "part of the slide that prediction and probability show, in level-0 pixels, where they do not tell"
    parser.add_argument("--region", type=region, metavar="X,Y,W,H", help=help_text)
    parser.add_argument("--class", dest="classes", action="append", metavar="NAME", help="name of label 1, then 2, ...")
    help_text = "probability from which it is a prediction, where none is given (0.5); the page can change it"
    parser.add_argument("--threshold", type=float, default=0.5, help=help_text)
    parser.add_argument("--slide-mpp", type=float, help="um a pixel of level 0, where the slide does not say")
    step = parser.add_argument_group("the step whose tiles are shown, where --run does not tell")
    step.add_argument("--network", default=StepWish.network, help="a network that ships, or module:factory (unet4492)")
    step.add_argument("--loss", help="as of wholegrad plan (what the factory returned, or bce+dice)")
    step.add_argument("--target", default=StepWish.target, help="what the loss gets (labels); see above")
    at = step.add_mutually_exclusive_group()
    at.add_argument("--mpp", type=float, help="um a pixel at which the step reads the slide")
    at.add_argument("--level", type=int, help="level that the step reads, 0 the largest (0)")
    step.add_argument("--budget", metavar="SIZE", help="most memory for the step, e.g. 1.5GiB, or auto (auto)")
    serve = parser.add_argument_group("serving")
    serve.add_argument("--port", type=int, default=0, help="to listen on (any that is free)")
    serve.add_argument("--no-browser", action="store_true", help="print the address and open nothing")
    help_text = "send the slide as JPEG of this quality, for slow lines, in place of its exact pixels"
    serve.add_argument("--jpeg", type=int, metavar="QUALITY", help=help_text)
    serve.add_argument("--until-closed", action="store_true", help=argparse.SUPPRESS)  # of a run's own page


def run(args: argparse.Namespace) -> int:
    if args.until_closed:
        return follow(args.folder, args.port)
    folder = RunFolder(args.folder) if args.folder else None
    files = Files(
        _slide(args.slide, folder),
        args.mask,
        args.prediction,
        args.probability,
        args.classes,
        args.threshold,
        args.slide_mpp,
        quality=args.jpeg,
        region=_four_numbers(args.region),
    )
    renewing = folder is not None and args.prediction is None and args.probability is None
    if folder is not None:
        if folder.entry(files.slide) is None:
            NOTES.print(f"{files.slide.name} is no slide of {folder.path}: only the run itself is shown")
        if args.slide is None and (others := _others(folder, files.slide)):
            NOTES.print(others, markup=False)
        files = completed(files, folder)
    step = StepWish(args.network, args.loss, args.target, args.budget, args.mpp, args.level)
    stop = threading.Event()
    with ExitStack() as stack:
        scene = Scene(files)
        stack.callback(scene.close)
        app = App(scene, folder, step, renewing)
        stack.callback(app.close)
        server = stack.enter_context(Server(app, args.port))
        stack.callback(_ending_on_signals(stop))
        NOTES.print(f"{scene.slide!r}, {', '.join(layer.title.lower() for layer in scene.layers.values())}")
        CONSOLE.print(server.url, markup=False)
        NOTES.print("Ctrl-C ends it")
        if not args.no_browser:
            stack.callback(_open_browser(server.url))
        while not stop.wait(0.5):  # in pieces, since some systems do not wake a waiting thread for a signal
            pass
    NOTES.print("closed")
    return 0


def _four_numbers(given: Region | None) -> tuple[int, int, int, int] | None:
    if given == "bounds":
        raise ConfigError("--region bounds", "is not known here", "give X,Y,WIDTH,HEIGHT in level-0 pixels")
    return given


def _slide(given: Path | None, folder: RunFolder | None) -> Path:
    """The slide that is meant: a file, or one of the run's by name."""
    if folder is None:
        if given is None:
            raise ConfigError("SLIDE", "is missing", "name a slide, or a run's folder with --run")
        return given
    if given is None:
        return folder.first().slide
    named = None if given.exists() else next((e for e in folder.entries if e.name == str(given)), None)
    return given if named is None else named.slide


def _others(folder: RunFolder, shown: Path) -> str:
    """What else of the run could be looked at, where nobody said which slide; nothing if there is no other."""
    names = [entry.name for entry in folder.entries if entry.slide != shown]
    if not names:
        return ""
    listed = ", ".join(names[:OTHERS]) + (f" and {len(names) - OTHERS} more" if len(names) > OTHERS else "")
    return f"other slides of the run: {listed}; wholegrad view NAME --run {folder.path} shows one"


def _open_browser(url: str) -> Callable[[], None]:
    """Open the page by a file that leads to it, which nobody else can read; returns what removes the file.

    The address itself would stand in the browser's command line, where every user of the machine sees it.
    """
    handle, name = tempfile.mkstemp(prefix="wholegrad-view-", suffix=".html")  # readable for this user alone
    path = Path(name)
    with os.fdopen(handle, "w") as file:
        file.write(
            f'<!doctype html><meta http-equiv="refresh" content="0; url={escape(url)}"><title>wholegrad</title>\n'
        )
    webbrowser.open(path.as_uri())
    return lambda: path.unlink(missing_ok=True)


def _ending_on_signals(stop: threading.Event) -> Callable[[], None]:
    """Ctrl-C, SIGTERM and a terminal that closes ask for the end; returns what puts back how they were handled."""

    def ask(number: int, frame: FrameType | None) -> None:
        stop.set()

    wanted = [signal.SIGINT, signal.SIGTERM]
    closing = getattr(signal, "SIGHUP", None)  # which nohup has it ignore, and some systems do not have
    if closing is not None and signal.getsignal(closing) != signal.SIG_IGN:
        wanted.append(closing)
    before = {number: signal.signal(number, ask) for number in wanted}

    def put_back() -> None:
        for number, how in before.items():
            signal.signal(number, how)

    return put_back
