"""Training on several ranks: the weights of one rank, to the bit, however many there are and whichever dies."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from wholegrad.cli import main
from wholegrad.errors import ConfigError, WholegradError
from wholegrad.nets import unet4492
from wholegrad.train import statistics
from wholegrad.train.batch import check_mesh
from wholegrad.train.config import check_config
from wholegrad.train.exchange import OrderedSum
from wholegrad.train.judge import divided
from wholegrad.train.plans import threads_of_rank
from wholegrad.train.state import Card, save_weights
from wholegrad.train.team import Place, Team

CONFIG = """
[data]
train = ["a", "b", "c"]
val = ["d", "e"]
test = ["f"]
crop = [96, 90]
pad = true
[augment]
flip = true
[network]
name = "nets:normed"
[train]
steps = 9
optimizer = "AdamW"
accumulate = 4
clip = 1.0
ema = 0.9
threads = 1
budget = "2GiB"
panels = false
[validation]
steps = 6
[mesh]
timeout = 60.0
"""
NETS = """
import os, signal
from pathlib import Path

import torch
from torch import nn

import wholegrad as wg



def normed():
    torch.manual_seed(0)
    strike()
    first = nn.Sequential(nn.Conv2d(3, 8, 5, padding=2), nn.BatchNorm2d(8, momentum=0.3), nn.ReLU(), nn.Dropout(0.1))
    return nn.Sequential(*first, nn.Conv2d(8, 8, 3, padding=1, stride=2), nn.BatchNorm2d(8), nn.ReLU(),
                         nn.Upsample(scale_factor=2), nn.Conv2d(8, 1, 3, padding=1))


def broad(width=3072):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, width, 8, stride=8), nn.ReLU(), nn.Conv2d(width, width, 1), nn.ReLU(),
                         nn.Conv2d(width, 1, 1), nn.Upsample(scale_factor=8))


def strike():
    # STRIKE=SIGKILL,1,2,marker: within the second slide of rank 1, once.
    what, rank, slide, marker = os.environ.get("STRIKE", "none,0,0,none").split(",")
    if what == "none" or os.environ.get("RANK") != rank or Path(marker).exists():
        return
    backward, left = wg.backward, [int(slide)]

    def struck(*args, progress, **more):
        left[0] -= 1

        def tile(event):
            if left[0] == 0:
                Path(marker).touch()
                os.kill(os.getpid(), getattr(signal, what))
            progress(event)

        return backward(*args, progress=tile, **more)

    wg.backward = struck
"""
MEASURED = ("seconds", "rss", "peak", "projected", "rank")


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory, write_case: Callable[..., None]) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    for seed, name in enumerate("abcdef"):
        write_case(folder, name, size=(96, 112), seed=seed)
    (folder / "run.toml").write_text(CONFIG)
    (folder / "nets.py").write_text(NETS)
    return folder


@pytest.fixture(scope="module")
def trained(slides: Path) -> Path:
    """The folder, with a run on one rank and one on three."""
    codes, said = runs(
        slides,
        ("train run.toml --out one", 1),
        ("train run.toml --out three", 3),  # rounds of 3 and 1 slides: two ranks have nothing to do then
    )
    assert codes == [[0], [0, 0, 0]], said
    return slides


FORKS = pytest.mark.skipif(sys.platform != "linux", reason="ranks are forked after imports, as Linux allows")


def free_port() -> int:
    """A port below those that systems give away by themselves, so that it is still free when ranks have started."""
    while True:
        port = random.SystemRandom().randrange(20000, 32000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def environment(folder: Path, **more: str) -> dict[str, str]:
    paths = [str(Path(__file__).parent.parent / "src"), str(folder)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", **more}


def runs(folder: Path, *each: tuple[str, int], **more: str) -> tuple[list[list[int]], str]:
    """The exit codes of each run's ranks, and what all wrote to standard error."""
    words = [word for arguments, ranks in each for word in (arguments, str(ranks))]
    command = [sys.executable, str(Path(__file__).parent / "ranks.py"), str(free_port()), *words]
    done = subprocess.run(
        command, cwd=folder, env=environment(folder, **more), capture_output=True, text=True, timeout=500
    )
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")], done.stderr


def tensors(folder: Path, name: str = "checkpoint") -> dict[str, torch.Tensor]:
    return dict(load_file(folder / f"{name}.safetensors"))


def log(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in MEASURED} for line in found]


def assert_same_bits(a: Path, b: Path) -> None:
    for name in ("checkpoint", "best", "weights"):
        one, other = tensors(a, name), tensors(b, name)
        assert one.keys() == other.keys()
        assert not [key for key in one if not torch.equal(one[key], other[key])], name


def assert_same_training(a: Path, b: Path) -> None:
    """Everything that is learned to the bit; running statistics, which gradients do not depend on, to rounding."""
    one, other = tensors(a), tensors(b)
    assert one.keys() == other.keys()
    for key in one:
        if "running" in key:
            torch.testing.assert_close(one[key], other[key], rtol=2e-6, atol=1e-7)
        else:
            assert torch.equal(one[key], other[key]), key


@FORKS
@pytest.mark.slow
def test_any_number_of_ranks_ends_with_the_same_weights(trained: Path) -> None:
    one, three = trained / "one", trained / "three"
    assert_same_training(one, three)
    assert log(one) == log(three)
    lines = [json.loads(line) for line in (three / "log.jsonl").read_text().splitlines()]
    assert [line["rank"] for line in lines if line["kind"] == "step"] == [0, 1, 2, 0, 0, 1, 0, 1, 0]
    assert json.loads((one / "test.json").read_text()) == json.loads((three / "test.json").read_text())


@FORKS
@pytest.mark.slow
def test_a_rank_that_freezes_is_named_and_the_run_goes_on_without_it(trained: Path) -> None:
    codes, said = runs(
        trained,
        ("STRIKE=SIGSTOP,1,3,stopped train run.toml --out broken --set mesh.timeout=4", 2),
        ("train run.toml --out broken --resume", 1),
    )
    assert codes[0][0] == 2 and codes[1] == [0], said
    (stopped,) = [line for line in said.splitlines() if line.startswith("wholegrad [rank 0]: error: ")]
    assert "rank 1: has done nothing for" in stopped and "at step 4; look at its machine" in stopped
    assert_same_training(trained / "one", trained / "broken")
    assert log(trained / "one") == log(trained / "broken")


FAKES = {
    "scontrol": """#!/bin/bash
[ "$1 $2" = "show hostnames" ] || exit 9
echo localhost; echo localhost
""",
    "srun": """#!/bin/bash
# Every node of the job is this machine.
while [[ "$1" == --* ]]; do shift; done
for node in $(seq "$SLURM_NNODES"); do "$@" & pids+=($!); done
status=0
for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
exit "$status"
""",
}


@FORKS
@pytest.mark.slow
def test_the_slurm_script_trains_on_two_nodes_and_outlives_a_killed_rank(trained: Path, capfd: Any) -> None:
    slides = trained
    for name, text in FAKES.items():
        (slides / "bin").mkdir(exist_ok=True)
        (slides / "bin" / name).write_text(text)
        (slides / "bin" / name).chmod(0o755)
    command = [
        "launch",
        str(slides / "run.toml"),
        "--nodes",
        "2",
        "--time",
        "10:00",
        "--out",
        str(slides / "run.sbatch"),
    ]
    assert main([*command, "--train", f"--out {slides / 'nodes'}"]) == 0
    assert f"written: {slides / 'run.sbatch'}" in capfd.readouterr().out
    script = (slides / "run.sbatch").read_text()
    assert "#SBATCH --nodes=2\n" in script and "#SBATCH --mem=3277M\n" in script
    subprocess.run(["bash", "-n", str(slides / "run.sbatch")], check=True)
    job = {"SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_ID": str(free_port() - 20000)}
    path = {"PATH": f"{slides / 'bin'}:{os.environ['PATH']}", "STRIKE": f"SIGKILL,0,3,{slides / 'struck'}"}
    done = subprocess.run(
        ["bash", str(slides / "run.sbatch")],
        cwd=slides,
        env=environment(slides, **job, **path),
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    assert (slides / "struck").exists()
    assert_same_bits(slides / "nodes", slides / "three")
    assert log(slides / "nodes") == log(slides / "three")


@FORKS
@pytest.mark.slow
def test_both_axes_at_once(trained: Path) -> None:
    codes, said = runs(trained, ("train run.toml --out both --set mesh.tiles=2", 4))
    assert codes == [[0] * 4], said
    both, three = log(trained / "both"), log(trained / "three")
    assert [line["step"] for line in both] == [line["step"] for line in three]
    losses = [[line["loss"] for line in lines if line["kind"] == "step"] for lines in (both, three)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)  # tiles are cut otherwise, so sums are rounded otherwise
    assert losses[0][:4] == pytest.approx(losses[1][:4], rel=1e-6)  # before the first update


@FORKS
def test_ranks_of_torchrun_predict_one_slide_together(slides: Path) -> None:
    save_weights(slides / "w.safetensors", unet4492(seed=0), Card("unet4492", {"seed": 0}, 4492, 0, {}, {}, {}))
    command = "predict slides/a.tif --weights w.safetensors --kind logits --budget 4GiB --out"
    codes, said = runs(
        slides, (f"{command} alone.npy", 1), (f"{command} both.npy", 2), (f"{command} no/both.npy", 2),
        ("predict slides/none.tif --weights w.safetensors --out both.tif", 2),
    )  # fmt: skip
    assert codes == [[0], [0, 0], [2, 2], [2, 2]], said
    alone, both = (np.load(slides / f"{name}.npy") for name in ("alone", "both"))
    assert np.abs(alone - both).max() <= 1e-5 * np.abs(alone).max() and alone.std() > 0
    errors = [line for line in said.splitlines() if ": error: " in line]
    assert len(errors) == 2 and "no/both.npy: cannot be written" in errors[0] and "none.tif" in errors[1]


@FORKS
def test_what_gradients_of_several_slides_take_is_projected(slides: Path) -> None:
    """9.4 million parameters of which nearly all a step's memory is: more than any slack."""
    flags = "--set network.name=nets:broad --set train.optimizer.name=SGD --budget 3GiB --set train.ema=0.5"
    flags += " --set data.crop=[96,88] --set train.steps=4 --set validation.steps=4"
    codes, said = runs(slides, (f"train run.toml --out broad {flags}", 2))
    assert codes == [[0, 0]], said
    lines = [json.loads(line) for line in (slides / "broad" / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "step"]
    assert {line["rank"] for line in steps} == {0, 1}
    over = [line for line in steps if not line["peak"] <= line["projected"] < 3 << 30]
    assert not over, over


# What ranks are made of, without ranks.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sum_is_in_the_order_of_slides_and_in_float64(dtype: torch.dtype) -> None:
    numbers = torch.tensor([[1.0, 1e8], [3e-8, 1.0], [-1.0, -1e8]], dtype=dtype)
    shapes = [torch.zeros(2, dtype=dtype), torch.zeros(3, dtype=dtype)]
    summed = OrderedSum(Team(), shapes)
    for each in numbers[:2]:
        summed.add([each, None], [[True, False]])
    summed = OrderedSum(Team(), shapes, summed.whole())  # as after a restart
    summed.add(None, [None])  # a slide that was skipped
    summed.add([numbers[2], None], [[True, False]])
    whole, absent = summed.whole()
    assert absent is None and whole is not None
    assert torch.equal(whole, (numbers[0].double() + numbers[1].double()) + numbers[2].double())
    assert whole[0] != 0 and whole[1] == 1  # which float32 would have lost


def test_statistics_of_slides_that_all_began_alike_are_those_of_slides_in_turn() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=0.3), nn.BatchNorm2d(4))
    model(torch.randn(2, 3, 9, 9))
    images = [torch.randn(2, 3, 9, 9) * k for k in (1, 2, 5)]
    buffers = statistics.buffers_of(model)
    before, slides = statistics.kept(buffers), []
    for image in images:
        model(image)
        slides.append(statistics.changed(before, buffers))
        statistics.put(buffers, before)
    for image in images:
        model(image)
    expected = statistics.kept(buffers)
    statistics.put(buffers, before)
    statistics.replay(model, slides)
    for name, value in expected.items():
        torch.testing.assert_close(buffers[name], value, rtol=1e-6, atol=1e-7)
    assert int(buffers["1.num_batches_tracked"]) == 4


def test_a_buffer_that_nobody_knows_is_refused_before_any_is_changed() -> None:
    model = nn.BatchNorm2d(4)
    model.register_buffer("zeal", torch.zeros(2))
    changed = {"running_mean": torch.ones(4), "zeal": torch.ones(2)}
    with pytest.raises(ConfigError, match="buffer zeal: is written by each slide, and belongs to no norm"):
        statistics.replay(model, [changed])
    assert not model.running_mean.any()


def test_slides_are_shared_out_by_size() -> None:
    assert divided([5, 1, 1, 4, 3], 2) == [[0, 1, 2], [3, 4]]
    assert divided([1], 3) == [[0], [], []]


def test_a_place_is_found_or_there_is_none() -> None:
    told = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a"}
    assert Place.found({"RANK": "3", "WORLD_SIZE": "4"}) == Place()  # left over from something else
    told |= {"MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "x"}
    assert Place.found(told) == Place(3, 4, 1, 2, launched=True)
    with pytest.raises(WholegradError, match="RANK, WORLD_SIZE are no numbers"):
        Place.found({**told, "RANK": "first"})


def test_cores_are_shared_by_the_ranks_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as torchrun sets it
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    assert threads_of_rank(Place(size=2, local_size=2)) == 4
    assert threads_of_rank(Place(size=16, local_size=16)) == 1


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"accumulate": 2}, "train.accumulate: is 2, and 3 ranks share the slides of an update; set it to 3 or more"),
        ({"tiles": 2}, "mesh.tiles: is 2, and there is no such number of groups in 3 rank(s); start a multiple of 2"),
    ],
)
def test_ranks_that_would_have_nothing_to_do_are_refused(settings: dict[str, int], said: str) -> None:
    mesh = {"tiles": settings.pop("tiles", 1)}
    config = check_config({"data": {"train": ["a"]}, "train": {"steps": 1, **settings}, "mesh": mesh}, "test")
    with pytest.raises(ConfigError) as error:
        check_mesh(config, Team(Place(size=3), tiles=mesh["tiles"]))
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--nodes", "3", "--ranks", "2"], "train.accumulate: is 4, and 6 ranks share the slides of an update"),
        (["--time", "soon"], "--time: is 'soon'"),
        (["--gpus", "4"], "--gpus: given, and train.device is None"),
        (["--nodes", "2", "--min-nodes", "3"], "--min-nodes: is 3, more than --nodes 2"),
        (["--train", "--lr never"], "argument --lr: invalid float value: 'never'"),
    ],
)
def test_what_would_fail_in_the_queue_is_refused_before(
    slides: Path, flags: list[str], said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    try:
        assert main(["launch", str(slides / "run.toml"), "--dry-run", *flags]) == 2
    except SystemExit as ended:
        assert ended.code == 2
    printed, told = capfd.readouterr()
    assert said in told and not printed


def test_a_script_asks_for_what_the_run_needs(slides: Path, capfd: pytest.CaptureFixture[str]) -> None:
    flags = ["--nodes", "2", "--min-nodes", "1", "--gpus", "2", "--time", "1-00:00:00", "--requeue", "--account", "lab"]
    device = "--device cuda --budget 20GiB --host-budget 6GiB"
    assert main(["launch", str(slides / "run.toml"), "--dry-run", *flags, "--train", device]) == 0
    text = capfd.readouterr().out
    for line in ("--nodes=1-2", "--gpus-per-node=2", "--mem=14541M", "--cpus-per-task=2", "--requeue", "--account=lab"):
        assert f"#SBATCH {line}\n" in text
    assert '--nnodes "1:$SLURM_NNODES" --nproc-per-node 2 ' in text and "-ge 86160 ]" in text
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
