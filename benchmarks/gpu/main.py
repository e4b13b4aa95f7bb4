"""Everything that a GPU has to show, in one call of at most ten minutes; what it did not reach, in a second one.

    PYTHONPATH=src python benchmarks/gpu/main.py --out out/gpu [--minutes 9.5] [--only step,whole]
    PYTHONPATH=src python benchmarks/gpu/main.py --out out/gpu --rest --minutes 4

Each stage is a process of its own with a share of the time, so that one that fails, hangs or runs out of memory takes
nothing from the others. Results are lines of JSON in ``results.jsonl`` under ``--out``, beside ``log.txt``; the table
is printed at the end and lies in ``table.md`` there, with one of how far each step is from the machine's limits.
``--table results.jsonl`` makes both again from kept results.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
PYTEST = ("-m", "pytest", "-q", "-n", "8", "-p", "no:cacheprovider")  # processes, whose references are the CPU's work
GPU, TRITON = "tests/test_gpu.py", ("tests/test_triton.py", "tests/test_triton_mixed.py")
STAGES = (  # name, command, seconds at most: the claims first
    ("machine", ["stages.py", "machine"], 60),
    ("calibrate", ["stages.py", "calibrate"], 60),
    ("step", ["stages.py", "step"], 150),
    ("whole", ["stages.py", "whole"], 60),
    ("errors", ["stages.py", "errors", "--size", "2048x3072"], 40),
    ("profile", ["stages.py", "profile"], 40),
    ("training", ["stages.py", "training"], 45),
    ("kernels", ["stages.py", "kernels"], 45),
    ("tests", [*PYTEST, GPU, *TRITON, "-k", "not every_supported_op and not zoo"], 100),
    ("tests of ops", [*PYTEST, GPU, "-k", "every_supported_op"], 100),
    ("tests of networks", [*PYTEST, GPU, "-k", "zoo"], 150),
    ("wide", ["stages.py", "wide", "--size", "16384x16384"], 60),
    ("explore", ["-m", "wholegrad", "explore", "--devices", "cuda", "--sizes", "1,16,64,256,1024", "--seconds", "10",
                 "--out", "{out}/explore"], 90),
    ("wide65536", ["stages.py", "wide", "--size", "65536x65536"], 120),
)  # fmt: skip
MACS = 577  # of the published network for each pixel of the image, forward and backward, nothing computed twice


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "out/gpu", help="folder of results and logs")
    parser.add_argument("--minutes", type=float, default=9.5, help="for everything (default %(default)s)")
    order = ", ".join(stage[0] for stage in STAGES)
    parser.add_argument("--only", help=f"stages, by commas; default all, in this order: {order}")
    parser.add_argument("--rest", action="store_true", help="only stages of which --out has no end yet, added to it")
    parser.add_argument("--size", default="16000x64000", help="of the published network's step (default %(default)s)")
    parser.add_argument("--table", type=Path, help="make the table of these results and measure nothing")
    return parser.parse_args()


def command(words: list[str], size: str, out: Path) -> list[str]:
    """A stage's command line."""
    words = [word.format(out=out) for word in words]
    if words[0] != "stages.py":
        return [sys.executable, *words]
    given = words[1:] if "--size" in words else [*words[1:], "--size", size]
    return [sys.executable, str(HERE / "stages.py"), *given]


def run(name: str, words: list[str], limit: float, args: argparse.Namespace, log: Path) -> list[dict[str, Any]]:
    """One stage: its results, and one that says how it ended."""
    started = time.monotonic()
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    environment["WHOLEGRAD_CACHE"] = str(args.out.resolve() / "cache")  # rates stay with the results, for later stages
    with log.open("a") as errors, tempfile.TemporaryFile("w+") as output:
        errors.write(f"==== {name}\n")
        errors.flush()
        child = subprocess.Popen(
            command(words, args.size, args.out), cwd=ROOT, env=environment, stdout=output, stderr=errors,
            start_new_session=True,
        )  # fmt: skip
        try:
            ended = str(child.wait(limit))
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)  # with what it started
            child.wait()
            ended = f"stopped after {limit:.0f} s"
        output.seek(0)
        lines = output.read().splitlines()
        if words[0] == "-m":
            errors.write("\n".join(lines) + "\n")
    found = [json.loads(line) for line in lines if line.startswith("{")]
    last = next((line for line in reversed(lines) if line.strip()), "") if words[0] == "-m" else ""
    found.append({"stage": name, "name": "end", "exit": ended, "took": time.monotonic() - started, "last": last})
    return found


def about() -> dict[str, Any]:
    """The machine, the code and the time, for the table's foot."""

    def said(*words: str) -> str:
        try:
            return subprocess.run(words, capture_output=True, text=True, timeout=20, cwd=ROOT).stdout.strip()
        except (OSError, subprocess.TimeoutExpired):
            return ""

    gpu = said("nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.max.sm", "--format=csv,noheader")
    return {
        "stage": "about", "name": "about", "gpu": gpu, "commit": said("git", "rev-parse", "--short", "HEAD"),
        "date": time.strftime("%Y-%m-%d"), "machine": platform.platform(), "cores": os.cpu_count(),
        "python": platform.python_version(), "command": " ".join(sys.argv),
    }  # fmt: skip


def table(found: list[dict[str, Any]]) -> str:
    """All results as Markdown."""
    lines = ["| stage | what | median | spread | device peak | projected | more |", "|---|---|---|---|---|---|---|"]
    for each in found:
        rest = {k: v for k, v in each.items() if k not in ("stage", "name", "seconds", "peak_bytes", "projected_bytes",
                                                           "process_peak_bytes", "each")}  # fmt: skip
        times = each.get("seconds", [])
        median = f"{statistics.median(times):.4g} s" if times else ""
        spread = f"{min(times):.4g} to {max(times):.4g}" if len(times) > 1 else ""
        more = ", ".join(f"{key} {_number(value)}" for key, value in rest.items())
        sizes = [_bytes(each.get(key)) for key in ("peak_bytes", "projected_bytes")]
        lines.append(f"| {each['stage']} | {each['name']} | {median} | {spread} | {sizes[0]} | {sizes[1]} | {more} |")
    return "\n".join(lines) + "\n"


def roofline(found: list[dict[str, Any]]) -> str:
    """Each step of the published network beside what the machine's measured rates allow.

    Arithmetic: every multiply-add once at the rate of a float32 product of matrices. Memory: image and labels once, and
    one map of every convolution's output written, read, and its gradient written and read, in float32. Transfer: the
    bytes of image and labels over the bus.
    """
    rates = {each["name"]: each for each in found if each["stage"] == "machine"}
    try:
        flops = rates["float32 product, tf32 False"]["flops_per_second"]
        copies = rates["copy on the device"]["bytes_per_second"]
        across = rates["pinned memory to device"]["bytes_per_second"]
    except KeyError:
        return "no roofline: the stage `machine` did not finish\n"
    lines = ["| step | median | arithmetic | memory | transfer | of the limit |", "|---|---|---|---|---|---|"]
    for each in found:
        if each["stage"] not in ("step", "whole") or not each.get("seconds"):
            continue
        height, width = (int(edge) for edge in each["size"].split("x"))
        pixels, here = height * width, "on the device" in each["name"] or each["stage"] == "whole"
        maps = 3 / 16 + 6 / 256 + 6 / 256 + 3 / 16 + 3 / 16 + 2 + 2 + 1  # elements of all outputs for each pixel
        limits = [2 * MACS * pixels / flops, pixels * (4 + 4 * 4 * maps) / copies, 0 if here else 4 * pixels / across]
        median, cells = statistics.median(each["seconds"]), [f"{limit * 1e3:.0f} ms" for limit in limits]
        share = max(limits) / median
        lines.append(f"| {each['name']} | {median * 1e3:.0f} ms | {' | '.join(cells)} | {share:.0%} |")
    return "\n".join(lines) + "\n"


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _bytes(value: int | None) -> str:
    return "" if value is None else f"{value / 2**30:.2f} GiB"


def main() -> None:
    args = arguments()
    if args.table:
        kept = [json.loads(line) for line in args.table.read_text().splitlines()]
        print(table(kept) + "\n" + roofline(kept))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    wanted = args.only.split(",") if args.only else [stage[0] for stage in STAGES]
    unknown = set(wanted) - {stage[0] for stage in STAGES}
    if unknown:
        sys.exit(f"no such stage: {', '.join(sorted(unknown))}")
    end = time.monotonic() + 60 * args.minutes
    results = args.out / "results.jsonl"
    found = [json.loads(line) for line in results.read_text().splitlines()] if args.rest and results.exists() else []
    ended = {each["stage"] for each in found if each["name"] == "end" and each["exit"] == "0"}
    wanted = [name for name in wanted if name not in ended]
    found = [each for each in found if each["stage"] in ended or each["stage"] == "about"] + [about()]
    if not args.rest:
        (args.out / "log.txt").write_text("")
    results.write_text("".join(json.dumps(each) + "\n" for each in found))
    for name, words, limit in STAGES:
        left = end - time.monotonic()
        if name not in wanted or left < 5:
            continue
        new = run(name, words, min(limit, left), args, args.out / "log.txt")
        found += new
        with results.open("a") as file:
            file.writelines(json.dumps(each) + "\n" for each in new)
        print(f"{name}: {new[-1]['exit']} after {new[-1]['took']:.0f} s {new[-1]['last']}", flush=True)
    text = table(found) + "\n" + roofline(found)
    (args.out / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
