"""``wholegrad view``: a slide in the browser, with labels, errors, and the tiles of a training step."""

from __future__ import annotations

import argparse
import signal
import threading
import webbrowser
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import FrameType

from wholegrad.commands.common import CONSOLE, NOTES, TARGETS, Commands, add_command
from wholegrad.view.app import App
from wholegrad.view.run import RunFolder, StepWish
from wholegrad.view.scene import Files, Scene
from wholegrad.view.server import Server

TEXT = f"""\
Show a slide in the browser: pan and zoom over it whatever its size, with truth, prediction, probability and errors as
layers, scores, the worst regions, and the tiles and halos of a training step in the order in which it runs them.

Listens on this machine alone, at an address that holds a secret; nothing is sent anywhere, and nothing is written.
Press Ctrl-C to end it. Over ssh: give --port, and ssh -L PORT:127.0.0.1:PORT.

{TARGETS}"""

EXAMPLES = """\
  wholegrad view case.svs
  wholegrad view case.svs --mask case.geojson --prediction mask.ome.tif
  wholegrad view case.svs --mask case.mask.tif --probability p.ome.tif --threshold 0.4
  wholegrad view case.svs --report out/train
  wholegrad view case.svs --budget 1.5GiB --mpp 0.5
  wholegrad view case.svs --no-browser --port 8080 --jpeg 85"""


def add(commands: Commands) -> None:
    parser = add_command(commands, "view", run, "look at a slide, its labels and errors in the browser", TEXT, EXAMPLES)
    parser.add_argument("slide", type=Path, metavar="SLIDE", help="any slide that wholegrad reads")
    parser.add_argument("--mask", type=Path, metavar="FILE", help="true labels: label map or outlines")
    parser.add_argument("--prediction", type=Path, metavar="FILE", help="predicted labels: label map or outlines")
    help_text = "probabilities of label 1, one channel: .tif, .zarr or .npy, as predict --kind probability writes"
    parser.add_argument("--probability", type=Path, metavar="FILE", help=help_text)
    help_text = "a run's folder: its labels, prediction and scores of this slide, and the plan of its steps"
    parser.add_argument("--report", type=Path, metavar="DIR", help=help_text)
    parser.add_argument("--class", dest="classes", action="append", metavar="NAME", help="name of label 1, then 2, ...")
    help_text = "probability from which it is a prediction, where none is given (0.5); the page can change it"
    parser.add_argument("--threshold", type=float, default=0.5, help=help_text)
    parser.add_argument("--slide-mpp", type=float, help="um a pixel of level 0, where the slide does not say")
    step = parser.add_argument_group("the step whose tiles are shown, where --report does not tell")
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


def run(args: argparse.Namespace) -> int:
    files = Files(
        args.slide,
        args.mask,
        args.prediction,
        args.probability,
        args.classes,
        args.threshold,
        args.slide_mpp,
        quality=args.jpeg,
    )
    folder = RunFolder(args.report) if args.report else None
    if folder is not None:
        files = _completed(files, folder)
    step = StepWish(args.network, args.loss, args.target, args.budget, args.mpp, args.level)
    stop = threading.Event()
    with ExitStack() as stack:
        scene = Scene(files)
        stack.callback(scene.close)
        app = App(scene, folder, step)
        stack.callback(app.close)
        server = stack.enter_context(Server(app, args.port))
        stack.callback(_ending_on_signals(stop))
        NOTES.print(f"{scene.slide!r}, {', '.join(layer.title.lower() for layer in scene.layers.values())}")
        CONSOLE.print(server.url, markup=False)
        NOTES.print("Ctrl-C ends it")
        if not args.no_browser:
            webbrowser.open(server.url)
        while not stop.wait(0.5):  # in pieces, since some systems do not wake a waiting thread for a signal
            pass
    NOTES.print("closed")
    return 0


def _completed(files: Files, folder: RunFolder) -> Files:
    """The run's own labels and prediction of the slide, where none were given."""
    entry = folder.entry(files.slide)
    if entry is None:
        NOTES.print(f"{files.slide.name} is no slide of {folder.path}: only the plan of its steps is shown")
        return files
    mask = files.mask or (entry.mask if entry.mask.exists() else None)
    prediction = files.prediction
    if prediction is None and files.probability is None:
        prediction = folder.prediction(entry)
    painted = folder.card().config["data"].get("classes")
    return replace(
        files, mask=mask, prediction=prediction, slide_mpp=files.slide_mpp or entry.mpp, painted=painted or None
    )


def _ending_on_signals(stop: threading.Event) -> Callable[[], None]:
    """Ctrl-C and SIGTERM ask for the end; returns what puts back how they were handled."""

    def ask(number: int, frame: FrameType | None) -> None:
        stop.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}

    def put_back() -> None:
        for number, how in before.items():
            signal.signal(number, how)

    return put_back
