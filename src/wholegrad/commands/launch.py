"""``wholegrad launch``: a batch script that trains on several nodes of a SLURM cluster, for the user to read."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from wholegrad.commands import train as training
from wholegrad.commands.common import CONSOLE, NOTES, Commands, Parser, add_command, check_out_is_new
from wholegrad.errors import ConfigError
from wholegrad.train.batch import check_mesh
from wholegrad.train.config import Config, load_config
from wholegrad.train.slurm import Job, script
from wholegrad.train.state import write_whole
from wholegrad.train.team import Place, Team

TEXT = """\
Write a SLURM script that trains CONFIG on several nodes, and say where it is. Nothing is submitted: read it, change it,
and give it to sbatch. Its memory is counted from train.budget, the budget of each rank.

Flags of wholegrad train go into --train. docs/launching.md explains what the script does."""

EXAMPLES = """\
  wholegrad launch run.toml --nodes 4 --gpus 8 --time 24:00:00 --partition gpu --account lab
  wholegrad launch run.toml --nodes 2 --ranks 4 --cpus 8 --time 2-00:00:00 --requeue
  wholegrad launch run.toml --nodes 2 --dry-run --train '--steps 500 --budget 4GiB'"""


def add(commands: Commands) -> None:
    parser = add_command(commands, "launch", run, "write a script for a SLURM cluster", TEXT, EXAMPLES)
    parser.add_argument("config", type=Path, metavar="CONFIG", help="TOML file, as for wholegrad train")
    parser.add_argument("--nodes", type=int, default=1, help="how many (1)")
    parser.add_argument("--min-nodes", type=int, help="with how few the run may go on (as many)")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--ranks", type=int, help="processes on each node (1)")
    group.add_argument("--gpus", type=int, help="GPUs of each node, a process each")
    parser.add_argument("--cpus", type=int, help="cores of each process (train.threads, else 4)")
    parser.add_argument("--time", default="24:00:00", help="limit, as SLURM takes it (24:00:00)")
    parser.add_argument("--mem", help="of each node, as SLURM takes it, in place of what the budget needs")
    parser.add_argument("--partition", help="of the cluster")
    parser.add_argument("--account", help="to charge")
    parser.add_argument("--max-restarts", type=int, default=3, help="times that a rank may die in one job (3)")
    parser.add_argument("--requeue", action="store_true", help="go on in the queue when the time is over")
    parser.add_argument("--train", default="", metavar="FLAGS", help="flags of wholegrad train, in quotes")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the script (CONFIG's name with .sbatch, here)")
    parser.add_argument("--dry-run", action="store_true", help="print the script and write nothing")


def run(args: argparse.Namespace) -> int:
    job, config = _job(args, _config(args))
    text = script(config, args.config, job, shlex.split(args.train), sys.executable)
    if args.dry_run:
        print(text, end="")
        return 0
    path = args.out or Path(f"{args.config.stem}.sbatch")
    check_out_is_new(str(path), "choose another --out, or remove it")
    write_whole(path, text.encode())
    CONSOLE.print(f"written: {path}", markup=False)
    NOTES.print(f"read it, then: sbatch {path}", markup=False)
    return 0


def _config(args: argparse.Namespace) -> Config:
    """The configuration as the flags make it, so that what is wrong is said here and not in the queue."""
    parser = Parser(prog="wholegrad")
    training.add(parser.add_subparsers())
    asked = parser.parse_args(["train", str(args.config), *shlex.split(args.train)])
    return load_config(args.config, training.overrides(asked))


def _job(args: argparse.Namespace, config: Config) -> tuple[Job, Config]:
    least = args.nodes if args.min_nodes is None else args.min_nodes
    ranks = args.gpus or args.ranks or 1
    cpus = args.cpus or config.train.threads or 4
    figures = {"--nodes": args.nodes, "--min-nodes": least, "--ranks": ranks, "--cpus": cpus}
    for flag, value in figures.items():
        if value < 1:
            raise ConfigError(flag, f"is {value}", "give 1 or more")
    if least > args.nodes:
        raise ConfigError("--min-nodes", f"is {least}, more than --nodes {args.nodes}", "give fewer")
    if args.max_restarts < 0:
        raise ConfigError("--max-restarts", f"is {args.max_restarts}", "give 0 or more")
    if args.gpus and config.train.device not in ("cuda", "auto"):
        raise ConfigError("--gpus", f"given, and train.device is {config.train.device}", 'set train.device = "cuda"')
    check_mesh(config, Team(Place(size=args.nodes * ranks), tiles=config.mesh.tiles))
    job = Job(
        args.nodes, least, ranks, bool(args.gpus), cpus, args.time, args.mem, args.partition, args.account,
        args.max_restarts, args.requeue,
    )  # fmt: skip
    return job, config
