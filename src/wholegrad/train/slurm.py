"""A batch script for SLURM: what ``wholegrad launch`` writes, for the user to read, change and submit.

One task a node runs ``torchrun``, whose processes find each other at the first node of the job. The script holds no
state: submitted again, or put back into the queue, the same one goes on from the run's checkpoint.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from wholegrad.errors import ConfigError
from wholegrad.run.budget import budget_bytes, is_automatic
from wholegrad.train.tables import Config

OVER = 1.1  # times the ranks' budgets, for what the system counts besides
AGENT = 1 << 30  # bytes for torchrun itself on each node
MINUTE = 60
WARNING = 120  # seconds before the time limit at which the run is told to stop
TIME = re.compile(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)|(\d+)")


@dataclass(frozen=True)
class Job:
    """What is asked of SLURM.

    Attributes:
        nodes, least: how many, and with how few the run may go on.
        ranks: of each node; each takes a GPU if ``gpus``.
        cpus: of each rank.
        time: as SLURM takes it, such as ``12:00:00``.
        mem: of each node, as SLURM takes it; None to count it from the budget.
        restarts: times that a rank may die in one job.
        requeue: whether a job whose time is over goes back into the queue.
    """

    nodes: int
    least: int
    ranks: int
    gpus: bool
    cpus: int
    time: str
    mem: str | None = None
    partition: str | None = None
    account: str | None = None
    restarts: int = 3
    requeue: bool = False


def seconds_of(time: str) -> int:
    """Of a time as SLURM takes it: minutes, MM:SS, HH:MM:SS, D-HH:MM:SS.

    Raises:
        ConfigError: it is none.
    """
    found = TIME.fullmatch(time)
    if found is None:
        raise ConfigError("--time", f"is {time!r}", "write minutes, HH:MM:SS or D-HH:MM:SS")
    if found[5] is not None:
        return int(found[5]) * MINUTE
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups()[:4])
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def memory_of_node(config: Config, job: Job) -> tuple[str, str]:
    """What to ask for, and how that comes about."""
    if job.mem is not None:
        return job.mem, "as asked for"
    train = config.train
    budget = train.host_budget if job.gpus else train.budget
    name = "train.host_budget" if job.gpus else "train.budget"
    if is_automatic(budget):
        return "0", f"all of a node's, since {name} is automatic"
    needed = int(job.ranks * budget_bytes(budget) * OVER) + AGENT
    return f"{-(-needed // (1 << 20))}M", f"{job.ranks} times {name} = {budget}, a tenth more, and 1 GiB for torchrun"


def script(config: Config, file: Path, job: Job, flags: Sequence[str], python: str) -> str:
    """The text of the script.

    Args:
        file: the configuration's.
        flags: of ``wholegrad train`` besides.
        python: the interpreter that has wholegrad, the same on every node.
    """
    memory, why = memory_of_node(config, job)
    limit, out = seconds_of(job.time), config.out.absolute()
    head = [
        f"#SBATCH --job-name=wholegrad-{re.sub(r'[^A-Za-z0-9_.-]', '-', file.stem)}",
        f"#SBATCH --nodes={job.nodes}" if job.least == job.nodes else f"#SBATCH --nodes={job.least}-{job.nodes}",
        "# One task a node: torchrun, which starts the ranks.",
        "#SBATCH --ntasks-per-node=1",
        f"#SBATCH --cpus-per-task={job.cpus * job.ranks}",
        f"# Memory of a node: {why}.",
        f"#SBATCH --mem={memory}",
        f"#SBATCH --time={job.time}",
        f"# Told {WARNING} seconds before that, the run writes a checkpoint and stops.",
        f"#SBATCH --signal=TERM@{WARNING}",
        "#SBATCH --output=%x-%j.log",
        "#SBATCH --open-mode=append",
    ]
    asked = [("gpus-per-node", job.ranks if job.gpus else None), ("partition", job.partition), ("account", job.account)]
    head += [f"#SBATCH --{name}={value}" for name, value in asked if value is not None]
    if job.requeue:
        head.append("#SBATCH --requeue")
    nodes = '"$SLURM_NNODES"' if job.least == job.nodes else f'"{job.least}:$SLURM_NNODES"'
    train = shlex.join([str(file.absolute()), *flags])
    again = f"""
# The time was over: back into the queue, to go on from the checkpoint.
if [ "$status" -ne 0 ] && [ "$SECONDS" -ge {max(0, limit - 2 * WARNING)} ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi"""
    return f"""#!/bin/bash
# {job.nodes} node(s) of {job.ranks} rank(s): the {config.train.accumulate} slides of each update are shared by them.
# Slides, this configuration and {out} must be on a disk that every node has.
# Submit: sbatch THIS_FILE. Submitted again, the run goes on from its checkpoint.
{chr(10).join(head)}

set -euo pipefail

# The ranks find each other at the first node, at a port of this job's own.
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
port=$((20000 + SLURM_JOB_ID % 20000))
export OMP_NUM_THREADS={job.cpus}

# A rank that dies takes all back to the last step, up to {job.restarts} times.
status=0
srun --ntasks-per-node=1 --kill-on-bad-exit=0 \\
  {shlex.quote(python)} -m torch.distributed.run \\
  --nnodes {nodes} --nproc-per-node {job.ranks} --max-restarts {job.restarts} \\
  --rdzv-backend c10d --rdzv-endpoint "$head:$port" --rdzv-id "$SLURM_JOB_ID" \\
  -m wholegrad train {train} --resume || status=$?
{again if job.requeue else ""}
exit "$status"
"""
