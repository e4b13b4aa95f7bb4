"""What several ranks do together, for ``test_distributed.py``: a script that forks them after one import of PyTorch.

``python rank_cases.py FOLDER SIZE CASE...`` runs each function below of that name on ``SIZE`` ranks of a Gloo group and
leaves in ``FOLDER/RANK.json`` what each returned. Where ``RANK`` is set, only that one runs here, the others on other
hosts.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import wholegrad as wg
from wholegrad.losses import LOSSES
from wholegrad.nets import unet4492
from wholegrad.plan.check import check_plan
from wholegrad.proof import Case, errors
from wholegrad.run.distributed.agreement import tensors_digest
from wholegrad.run.distributed.executor import RankExecutor
from wholegrad.run.distributed.ranks import wire_of
from wholegrad.run.reference import buffers, gradients, named
from wholegrad.verify import random_labels

PORT = int(os.environ.get("RANK_PORT", "0"))
EVERY = ["down1", "down2", "middle", "up2", "fuse2", "up1", "head"]
SEED = 11
FALLING = {"frozen": ([0, 1, 2], 2), "killed": ([0, 1, 3], 3), "host_frozen": ([0, 1], 0)}  # ranks, and who falls


@dataclass
class Here:
    """This process among the ranks: groups of the first two, three, four, made once."""

    rank: int
    groups: dict[int, dist.ProcessGroup]
    falling: dict[str, Any] = field(default_factory=dict)
    references: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)


def image_of(height: int, width: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.rand(3, height, width, dtype=dtype, generator=torch.Generator().manual_seed(0))


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(3)
    return make()


def published(height: int = 96, width: int = 112, loss: str = "bce") -> Case:
    model = unet4492(seed=0)
    return Case(model, LOSSES[loss], image_of(height, width), random_labels((height, width), 0), torch.float64, SEED)


def labelled(make: Callable[[], nn.Module], height: int, width: int, classes: int = 3) -> Case:
    target = torch.tensor(classes - 1)
    return Case(seeded(make), nn.CrossEntropyLoss(), image_of(height, width), target, torch.float64, SEED)


def classifier() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.InstanceNorm2d(16, affine=True), nn.GELU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3),
    )  # fmt: skip


def flattened() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3, stride=4),
        nn.Flatten(), nn.Linear(4 * 10 * 15, 3),
    )  # fmt: skip


def circular() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular"), nn.ReLU(), nn.Dropout(0.3),
        nn.AdaptiveMaxPool2d(2), nn.Flatten(), nn.Linear(32, 3),
    )  # fmt: skip


def attention() -> Case:
    from zoo_networks import Bottleneck

    target = (torch.rand(1, 1, 48, 64, generator=torch.Generator().manual_seed(1)) > 0.5).double()
    return Case(seeded(lambda: Bottleneck("module")), nn.BCEWithLogitsLoss(), image_of(48, 64)[None], target,
                torch.float64, SEED)  # fmt: skip


def basic_unet() -> Case:
    from monai.networks.nets import BasicUNet

    model = seeded(lambda: BasicUNet(2, 3, 2, features=(2, 2, 4, 4, 4, 2), norm=("batch", {})))
    target = torch.randint(0, 2, (1, 64, 48), generator=torch.Generator().manual_seed(1))
    return Case(model.train(), nn.CrossEntropyLoss(), image_of(64, 48)[None], target, torch.float64, SEED)


def worst(here: Here, name: str, case: Case, size: int, fixed: dict[str, Any], **options: Any) -> dict[str, Any]:
    """The largest error of a step of the first ``size`` ranks against whole-image autograd, and what else counts."""
    if here.rank >= size:
        return {}
    if name not in here.references and here.rank == 0:
        truth = case.reference().tensors
        here.references[name] = {key: value for key, value in truth.items() if not key.startswith("output")}
    group = wg.open_ranks(here.groups[size], timeout=60, **options)
    made = case.plan(ranks=group, **fixed)
    check_plan(made)
    found = step(case, made, group)
    wrong = errors(found, here.references[name]) if here.rank == 0 else {"": 0.0}
    return {
        "error": max(wrong.values()),
        "tensor": max(wrong, key=lambda key: wrong[key]),
        "bits": tensors_digest(found),
        "held": sum(held.area if (held := halo.held(here.rank)) else 0 for halo in made.halos.values()),
        "whole": sum(made.graph.spec(ref).rows * made.graph.spec(ref).cols for ref in made.halos),
    }


def step(case: Case, made: Any, group: Any) -> dict[str, torch.Tensor]:
    """Loss, gradients and buffers of one step, the model left as it was."""
    case.model.zero_grad()
    loss = wg.backward(case.model, case.loss_fn, case.image, case.target, plan=made, group=group, seed=SEED)
    found = named(loss, (), gradients(case.model, case.loss_fn), buffers(case.model, case.loss_fn))
    case.reset()
    return found


TILES = {"tile": (40, 48), "boundaries": EVERY}
STEPS: dict[str, tuple[Callable[[], Case], list[tuple[int, dict[str, Any], dict[str, Any]]]]] = {
    "published network": (published, [
        (2, {}, {}), (2, TILES, {"layout": (2, 1)}), (3, TILES, {}), (4, TILES | {"placement": "disk"}, {}),
        (4, TILES, {"layout": (2, 2)}), (3, TILES, {"shares": (1, 0, 2.5)}),
    ]),
    "published network, Dice": (lambda: published(61, 75, "dice"), [(4, TILES, {"shares": (0, 5, 1, 0)})]),
    "an image of three rows": (lambda: published(3, 40), [(4, TILES, {"layout": (4, 1)})]),
    "BasicUNet with batch norm": (basic_unet, [
        (2, {"tile": (20, 48)}, {}), (4, {"tile": (64, 11)}, {"shares": (1, 2, 0, 0.5)}),
    ]),
    "classifier": (lambda: labelled(classifier, 40, 60), [
        (2, {}, {}), (3, {"tile": (13, 17)}, {"shares": (0.2, 0, 1)}), (4, {"tile": (9, 60)}, {"layout": (2, 2)}),
    ]),
    "flatten and linear": (lambda: labelled(flattened, 40, 60), [(3, {"tile": (13, 17)}, {}), (4, {}, {})]),
    "circular, dropout, bins": (lambda: labelled(circular, 40, 60), [(3, {"tile": (13, 17)}, {}), (4, {}, {})]),
    "attention": (attention, [(2, {"tile": (16, 64)}, {}), (3, {}, {"shares": (1, 0, 1)})]),
}  # fmt: skip


def exact(here: Here) -> dict[str, Any]:
    """Every step above."""
    found = {}
    few = "RANK_FEW" in os.environ
    for name, (make, ways) in list(STEPS.items())[: 1 if few else None]:
        case = make()
        for size, fixed, options in [way for way in ways if way[0] in here.groups][: 1 if few else None]:
            found[f"{name} on {size}, {fixed}, {options}"] = worst(here, name, case, size, fixed, **options)
    return found


def apart(here: Here) -> dict[str, Any]:
    """Tiles on a device with memory of its own (a pretended one, that refuses to mix), messages through the host's."""
    if here.rank >= 2:
        return {}
    import pretend

    found = {}
    makers = {
        "bce": published,
        "dice": lambda: published(48, 64, "dice"),
        "flattened": lambda: labelled(flattened, 40, 60),
        "classifier": lambda: labelled(classifier, 40, 60),
    }
    for name, make in makers.items():
        case = make()
        case.device = pretend.device()
        for placement in ("device", "host", "disk"):
            fixed: dict[str, Any] = {"tile": (40, 48), "placement": placement} | (TILES if name in LOSSES else {})
            found[f"{name}, {placement}"] = worst(here, f"{name} apart", case, 2, fixed)["error"]
    return found


def repeated(here: Here) -> dict[str, Any]:
    """The same plan twice, and once more with the tiles of one rank."""
    case = published()
    group = wg.open_ranks(here.groups[4], layout=(2, 2))
    made = case.plan(ranks=group, **TILES)
    runs = [step(case, made, group) for _ in range(2)]
    same = all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    return {"same": same, "traffic": vars(wire_of(here.groups[4], 60).traffic)}


def _measured(here: Here, case: Case, size: int, **fixed: Any) -> dict[str, Any]:
    from wholegrad.plan.traffic import traffic

    group = wg.open_ranks(here.groups[size], timeout=60)
    made = case.plan(ranks=group, **fixed)
    wire = wire_of(here.groups[size], 60)
    before = wire.traffic.sent
    step(case, made, group)
    expected = traffic(made, here.rank)
    return {"sent": wire.traffic.sent - before, "expected": expected.total, "halos": expected.halos}


def volume(here: Here) -> dict[str, Any]:
    """Bytes sent and what the plan says."""
    cases = {"published": (published(), TILES), "flattened": (labelled(flattened, 40, 60), {})}
    cases["classifier"] = (labelled(classifier, 40, 60), {"tile": (9, 60)})
    return {name: _measured(here, case, 4, **fixed) for name, (case, fixed) in cases.items()}


def single(here: Here) -> dict[str, Any]:
    """float32, on two ranks, against float64; and boundaries stored in bfloat16, against one rank's."""
    if here.rank >= 2:
        return {}
    case = Case(unet4492(seed=0), LOSSES["bce"], image_of(96, 112), random_labels((96, 112), 0), torch.float32, SEED)
    truth = {name: value for name, value in published().reference().tensors.items() if not name.startswith("output")}
    own = errors({k: v for k, v in case.reference().tensors.items() if k in truth}, truth)
    group = wg.open_ranks(here.groups[2])
    found = errors(step(case, case.plan(ranks=group, **TILES), group), truth)
    rounded = TILES | {"boundary_dtype": torch.bfloat16}
    shared, alone = step(case, case.plan(ranks=group, **rounded), group), step(case, case.plan(**rounded), None)
    return {"ratio": max(found.values()) / max(own.values()), "rounded": max(errors(shared, alone).values())}


def mutants(here: Here) -> dict[str, float]:
    """Errors once something is left out: all must show."""
    if here.rank >= 2:
        return {}
    case = published()

    def without(name: str) -> float:
        kept = getattr(RankExecutor, name)
        setattr(RankExecutor, name, lambda self, *given: None)
        try:
            return float(worst(here, "published network", case, 2, TILES)["error"])
        finally:
            setattr(RankExecutor, name, kept)

    return {name: without(name) for name in ("_send_halo", "_bring_gradients", "_add_parameters")}


def unlike(here: Here) -> dict[str, Any]:
    """Ranks whose processors round otherwise, as if they were of another make: all leave with the same bits."""
    from wholegrad.run.small import SmallValues

    if here.rank >= 3:
        return {}
    case, kept = labelled(classifier, 40, 60), SmallValues._run

    def rounded(self: Any, node: Any, values: Any) -> Any:
        found = kept(self, node, values)
        return tuple(x * (1 + 1e-13 * here.rank) if x.is_floating_point() else x for x in found)

    SmallValues._run = rounded  # type: ignore[method-assign]
    try:
        return worst(here, "classifier", case, 3, {"tile": (13, 17)})
    finally:
        SmallValues._run = kept  # type: ignore[method-assign]


def two_axes(here: Here) -> dict[str, Any]:
    """Two slides, each shared by two ranks: the mean of both, and their sum."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("slides", "tiles"))
    model = seeded(classifier)
    loss = nn.CrossEntropyLoss()
    sizes = [(40, 60), (52, 44)]
    cases = [Case(model, loss, image_of(*size), torch.tensor(k), torch.float64, SEED) for k, size in enumerate(sizes)]
    truths = [{k: v for k, v in case.reference().tensors.items() if not k.startswith("output")} for case in cases]
    mine = cases[here.rank // 2]
    result: dict[str, Any] = {}
    for combine, share in (("mean", 0.5), ("sum", 1.0)):
        group = wg.open_ranks(mesh, combine=combine)
        found = step(mine, mine.plan(ranks=group, tile=(13, 17)), group)
        scale = {name: 0.5 if name.startswith("buffer") else share for name in truths[0]}
        wanted = {name: (truths[0][name].double() + truths[1][name].double()) * scale[name] for name in truths[0]}
        result[combine] = max(errors(found, wanted).values())
    lone = step(mine, None, mesh["slides"])
    wanted = {name: (truths[0][name].double() + truths[1][name].double()) * 0.5 for name in truths[0]}
    result["slides alone"] = max(errors(lone, wanted).values())
    return result | _batches(here, mesh)


def _batches(here: Here, mesh: Any) -> dict[str, Any]:
    """Batch norms over two slides of unequal size, as of one batch; and slides whose plans do not fit together."""
    loss, sizes = nn.CrossEntropyLoss(), [(40, 60), (52, 44)]
    images, targets = [image_of(*size) for size in sizes], [torch.tensor(k) for k in range(2)]
    whole, found = seeded(deep).double(), {}
    values = [image[None] for image in images]
    for module in whole.children():
        if isinstance(module, nn.BatchNorm2d):
            flat = torch.cat([value.transpose(0, 1).flatten(1) for value in values], 1)
            flat = module(flat[None, :, :, None])[0, :, :, 0]
            parts = flat.split([value[0, 0].numel() for value in values], 1)
            values = [part.view(1, -1, *value.shape[2:]) for part, value in zip(parts, values, strict=True)]
        else:
            values = [module(value) for value in values]
    total = torch.stack([loss(value, target[None]) for value, target in zip(values, targets, strict=True)]).mean()
    total.backward()
    wanted = {name: parameter.grad for name, parameter in whole.named_parameters()} | dict(whole.named_buffers())
    which, ranks = here.rank // 2, wg.open_ranks(mesh["slides"], statistics="batch", timeout=60)
    ways = {"both axes": (wg.open_ranks(mesh, statistics="batch", timeout=60), (13, 17)), "slides": (ranks, None)}
    for name, (group, tile) in ways.items():
        model = seeded(deep).double()
        made = wg.plan(model, loss, images[which], targets[which], budget="8GiB", ranks=group, tile=tile)
        value = wg.backward(model, loss, images[which], targets[which], plan=made, group=group)
        mine = {name: parameter.grad for name, parameter in model.named_parameters()} | dict(model.named_buffers())
        found[f"batch, {name}"] = max(errors({**mine, "loss": value}, {**wanted, "loss": total.detach()}).values())
    alone = nn.Sequential(*seeded(deep).double().children())
    alone[4].eval() if which else None
    told = _refusal(lambda: wg.backward(alone, loss, images[which], targets[which], budget="8GiB", group=ranks))
    found["order"] = 0.0 if "has other order of norms than" in told else told
    return found


def deep() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8, momentum=0.3), nn.ReLU(), nn.Conv2d(8, 6, 3, stride=2),
        nn.BatchNorm2d(6), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3),
    )  # fmt: skip


Predicted = tuple[Callable[[], nn.Module], tuple[int, int], dict[str, Any], dict[str, Any], tuple[int, ...]]
PREDICTED: dict[str, Predicted] = {
    "mask": (lambda: unet4492(seed=0), (61, 75), {"kind": "mask"}, {}, (3,)),
    "logits, small tiles": (lambda: unet4492(seed=0), (96, 112), {"kind": "logits", "tile": (16, 24)}, {}, (4,)),
    "probability, uneven": (
        lambda: unet4492(seed=0), (70, 90), {"kind": "probability", "tile": (32, 32)}, {"shares": (0, 1, 2.5)}, (3,)
    ),
    "coarser": (lambda: seeded(classes), (50, 70), {"kind": "probability", "tile": (9, 70)}, {}, (3,)),
    "three columns": (lambda: unet4492(seed=0), (40, 3), {"kind": "logits"}, {}, (4,)),
    "norms in training mode": (lambda: seeded(normed), (48, 64), {"kind": "logits", "tile": (16, 64)}, {}, (2,)),
}  # fmt: skip


def classes() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 3, 5, stride=4, padding=2)).eval()


def normed() -> nn.Module:
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 3, padding=1)]
    return nn.Sequential(*layers).train()


def predicting(here: Here) -> dict[str, Any]:
    """How far predictions over ranks are from one process's own, in float64; and what goes wrong, told to all."""
    found: dict[str, Any] = {}
    for name, (make, size, asked, options, counts) in PREDICTED.items():
        image = image_of(*size)
        for count in (count for count in counts if here.rank < count):
            group = wg.open_ranks(here.groups[count], timeout=60, **options)
            model, alone = make().double(), make().double()
            ours = wg.predict(model, image, group=group, **asked)
            if here.rank:
                assert ours is None
                continue
            truth = wg.predict(alone, image, **asked)
            assert ours is not None and truth is not None and ours.shape == truth.shape and ours.dtype == truth.dtype
            apart = float(abs(ours.astype(float) - truth.astype(float)).max())
            buffers = zip(model.buffers(), alone.buffers(), strict=True)
            found[f"{name} on {count}"] = max([apart, *(float((a - b).abs().max()) for a, b in buffers)])
    return found | _predicted_files(here)


def _predicted_files(here: Here) -> dict[str, Any]:
    """Files that rank 0 writes; measures; errors of one rank on all."""
    if here.rank >= 3:
        return {}
    folder, model = Path(os.environ["RANK_FOLDER"]), unet4492(seed=0)
    group, image = wg.open_ranks(here.groups[3], timeout=60), image_of(96, 160)
    paths = [folder / name for name in ("shared.ome.tif", "shared.npy")]
    wg.predict(model, image, out=paths, kind="probability", group=group)
    counts = {"sum": lambda output, target: (output.sigmoid() * target).sum((0, 2, 3))}
    labels = random_labels((96, 160), 0)
    ours = wg.measure(model, image, labels, metrics=counts, group=group)["sum"]

    class Unreadable:
        shape, dtype, cache_bytes, name = (3, 96, 160), image.numpy().dtype, 0, "slide.svs"

        def read(self, box: Any) -> Any:
            if here.rank == 1 and box.y0 >= 30 and box.height > 8:
                raise wg.errors.SlideError("slide.svs", "is truncated", "copy it again")
            rows, cols = box.slices()
            return image[:, rows, cols].numpy()

    told = {
        "slide": _refusal(lambda: wg.predict(model, Unreadable(), out=folder / "a.npy", tile=(32, 64), group=group)),
        "folder": _refusal(lambda: wg.predict(model, image, out=folder / "no" / "a.npy", group=group)),
        "layout": _refusal(lambda: wg.predict(model, image, group=wg.open_ranks(here.groups[3], layout=(3, 1)))),
    }
    if here.rank == 0:
        from wholegrad.slide.write import PyramidWriter

        kept, PyramidWriter.seal = PyramidWriter.seal, _full  # type: ignore[method-assign]
    told["disk"] = _refusal(lambda: wg.predict(model, image, out=folder / "b.tif", group=group))
    if here.rank == 0:
        PyramidWriter.seal = kept  # type: ignore[method-assign]
        wg.predict(model, image, out=[folder / "one.ome.tif", folder / "one.npy"], kind="probability")
        alone = wg.measure(model, image, labels, metrics=counts)["sum"]
        told["measured"] = float((ours - alone).abs().max() / alone.abs().max())
        told["left"] = sorted(path.name for path in folder.iterdir() if "json" not in path.name)
    told["afterwards"] = float(wg.measure(model, image, labels, metrics=counts, group=group)["sum"])
    return told


def _full(writer: Any) -> None:
    raise wg.errors.SlideError("b.tif", "cannot be written (no space left on device)", "make room")


def _refusal(work: Callable[[], Any]) -> str:
    try:
        work()
    except wg.WholegradError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was refused"


def disagreeing(here: Here) -> dict[str, str]:
    """Ranks that do not mean the same step: all are told the same."""
    if here.rank >= 3:
        return {}
    case, group = published(48, 64), wg.open_ranks(here.groups[3], timeout=60)
    odd = here.rank == 2
    made = case.plan(ranks=group, tile=(24, 24))
    other = case.plan(ranks=group, tile=(24, 32))

    def run(**change: Any) -> Callable[[], Any]:
        given = {"plan": made, "group": group, "seed": SEED} | (change if odd else {})
        image, target = given.pop("image", case.image), given.pop("target", case.target)
        return lambda: wg.backward(case.model, case.loss_fn, image, target, **given)

    image, target = case.image.clone(), case.target.clone()
    image[:, 24:28, 30:40] = 0
    target[:, 24:28, 30:40] = (target[:, 24:28, 30:40] + 1) % 2
    weighed = Case(case.model, partial(LOSSES["bce"], weights=(1.0, 1.5)), case.image, case.target, torch.float64, SEED)
    heavier = weighed.plan(ranks=group, tile=(24, 24))

    def with_loss() -> Any:
        mine, way = (weighed, heavier) if odd else (case, made)
        return wg.backward(case.model, mine.loss_fn, case.image, case.target, plan=way, group=group, seed=SEED)

    told = {
        "plan": _refusal(run(plan=other)),
        "loss": _refusal(with_loss),
        "seed": _refusal(run(seed=1)),
        "image": _refusal(run(image=image)),
        "labels": _refusal(run(target=target)),
    }
    with torch.no_grad():
        next(case.model.parameters())[0, 0, 0, 0] += 1e-9 * odd
    told["weights"] = _refusal(run())
    told["another number of ranks"] = _refusal(
        lambda: wg.backward(case.model, case.loss_fn, case.image, case.target, plan=case.plan(ranks=2), group=group)
    )
    case.reset()
    told["afterwards"] = str(step(case, made, group)["loss"].item())
    return told


class _Broken(nn.Module):
    """A loss whose value is not finite where the image is very bright."""

    def forward(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return (output / (output - output.detach() + target)).mean()


def erring(here: Here) -> dict[str, str]:
    """An error that only one rank meets is raised on all."""
    if here.rank >= 3:
        return {}
    case, group = published(48, 96), wg.open_ranks(here.groups[3], timeout=60)
    image = case.image.clone()
    image[:, 10, 70:] = torch.nan
    model = case.model
    made = case.plan(ranks=group, tile=(24, 24), boundaries=EVERY)
    before = [parameter.grad for parameter in model.parameters()]

    class Unreadable:
        shape, dtype, cache_bytes, name = (3, 48, 96), case.image.numpy().dtype, 0, "slide.svs"

        def read(self, box: Any) -> Any:
            if here.rank == 1 and box.x0 >= 30 and box.height > 8:
                raise wg.errors.SlideError("slide.svs", "is truncated", "copy it again")
            rows, cols = box.slices()
            return case.image[:, rows, cols].numpy()

    told = {
        "numerics": _refusal(lambda: wg.backward(model, case.loss_fn, image, case.target, plan=made, group=group)),
        "slide": _refusal(lambda: wg.backward(model, case.loss_fn, Unreadable(), case.target, plan=made, group=group)),
    }
    told["untouched"] = str(before == [parameter.grad for parameter in model.parameters()])
    told["afterwards"] = str(step(case, made, group)["loss"].item())
    return told


def _falling(here: Here, case_name: str, how: Callable[[], None], timeout: float) -> dict[str, Any]:
    """A step of some ranks, in the middle of which one falls: what the others are told, and after how long."""
    (ranks, victim), group = FALLING[case_name], here.falling.get(case_name)
    if here.rank not in ranks:
        return {}
    case, ways = published(48, 96), wg.open_ranks(group, timeout=timeout)
    made = case.plan(ranks=ways, tile=(24, 24), boundaries=EVERY)
    step(case, made, ways)
    started, fallen = time.monotonic(), []

    def progress(at: Any) -> None:
        if at.phase == "backward" and here.rank == victim and not fallen:
            fallen.append(at)
            how()

    grads = [None if p.grad is None else p.grad.clone() for p in case.model.parameters()]

    def run() -> None:
        wg.backward(case.model, case.loss_fn, case.image, case.target, plan=made, group=ways, progress=progress)

    told = _refusal(run)
    after = [None if p.grad is None else p.grad.clone() for p in case.model.parameters()]
    same = all((a is None and b is None) or torch.equal(a, b) for a, b in zip(grads, after, strict=True))
    again = _refusal(run)
    return {"told": told, "seconds": time.monotonic() - started, "untouched": same, "again": again}


def interrupted(here: Here) -> dict[str, Any]:
    """Ctrl-C on one rank: between two tiles the others are told, and the group goes on; else it is not used again."""
    if here.rank >= 2:
        return {}
    case, group = published(48, 96), wg.open_ranks(here.groups[2], timeout=6)
    made = case.plan(ranks=group, tile=(24, 24), boundaries=EVERY)
    given: dict[str, Any] = {"plan": made, "group": group, "seed": SEED}

    def stop(at: Any) -> None:
        if here.rank == 1 and at.phase == "backward":
            raise KeyboardInterrupt

    def run(**more: Any) -> str:
        try:
            return _refusal(lambda: wg.backward(case.model, case.loss_fn, case.image, case.target, **given, **more))
        except KeyboardInterrupt:
            return "interrupted"

    told = {"tile": run(progress=stop)}
    case.reset()
    told["afterwards"] = str(step(case, made, group)["loss"].item())
    kept = RankExecutor._send_halo

    def cut(self: Any, ref: Any) -> None:
        raise KeyboardInterrupt

    if here.rank == 1:
        RankExecutor._send_halo = cut  # type: ignore[method-assign]
    told["message"] = run()
    RankExecutor._send_halo = kept  # type: ignore[method-assign]
    told["again"] = run()
    if here.rank == 1:
        time.sleep(1)  # the other learns of it by the connection, or after the time-out
    return told


def frozen(here: Here) -> dict[str, Any]:
    """The third of three ranks stops in the middle of a step, and wakes after the others gave up."""
    return _falling(here, "frozen", lambda: os.kill(os.getpid(), signal.SIGSTOP), 3.0)


def host_frozen(here: Here) -> dict[str, Any]:
    """The rank that stops is the one whose store all others ask."""
    return _falling(here, "host_frozen", lambda: os.kill(os.getpid(), signal.SIGSTOP), 2.0)


def killed(here: Here) -> dict[str, Any]:
    """The last of three ranks is killed in the middle of a step."""
    return _falling(here, "killed", lambda: os.kill(os.getpid(), signal.SIGKILL), 20.0)


def _with_cut(here: Here, seconds: float, timeout: float) -> dict[str, Any]:
    """A step in whose backward sweep the switch of ``RANK_SWITCH`` (namespace, port) drops all for so long."""
    space, port = os.environ["RANK_SWITCH"].split()

    def switch(way: str) -> None:
        subprocess.run(["ip", "netns", "exec", space, "ip", "link", "set", port, way], check=True)

    case, ways = published(48, 96), wg.open_ranks(here.groups[2], timeout=timeout)
    made = case.plan(ranks=ways, tile=(24, 24), boundaries=EVERY)
    unbroken = tensors_digest(step(case, made, ways))
    done: list[Any] = []

    def progress(at: Any) -> None:
        if at.phase == "backward" and here.rank == 0 and not done:
            done.append(at)
            switch("down")
            threading.Timer(seconds, switch, ["up"]).start()

    case.model.zero_grad()
    started = time.monotonic()
    try:
        given: dict[str, Any] = {"plan": made, "group": ways, "seed": SEED, "progress": progress}
        loss = wg.backward(case.model, case.loss_fn, case.image, case.target, **given)
    except wg.WholegradError as error:
        return {"told": f"{type(error).__name__}: {error}", "seconds": time.monotonic() - started}
    found = tensors_digest(named(loss, (), gradients(case.model, case.loss_fn), {}))
    return {"same": found == unbroken, "seconds": time.monotonic() - started}


def cut(here: Here) -> dict[str, Any]:
    """The link between two hosts is cut for two seconds."""
    return _with_cut(here, 2.0, 60.0)


def cut_off(here: Here) -> dict[str, Any]:
    """It is cut for longer than ranks wait."""
    return _with_cut(here, 8.0, 3.0)


def main(rank: int, size: int, folder: Path, cases: list[str], port: int) -> None:
    torch.set_num_threads(1)
    host = os.environ.get("RANK_HOST", "127.0.0.1")
    dist.init_process_group(
        "gloo", init_method=f"tcp://{host}:{port}", rank=rank, world_size=size, timeout=timedelta(seconds=120)
    )
    here = Here(rank, {count: dist.new_group(list(range(count))) for count in range(2, size + 1)})
    for name in (name for name in cases if name in FALLING):
        here.falling[name] = dist.new_group(FALLING[name][0], timeout=timedelta(seconds=30))
    report: dict[str, Any] = {}
    for name in cases:
        started = time.process_time()
        report[name] = globals()[name](here)
        report[name + " seconds"] = time.process_time() - started
        (folder / f"{rank}.json").write_text(json.dumps(report))
    os._exit(0)  # not every rank is there any more to say goodbye to


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


if __name__ == "__main__":
    folder, size, cases = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    if "exact" in cases and "RANK_FEW" not in os.environ:
        import monai.networks.nets  # noqa: F401  (once, before there are ranks)
    if "RANK" in os.environ:  # one process a host
        main(int(os.environ["RANK"]), size, folder, cases, PORT)
    if "apart" in cases:  # before autograd counts devices
        import pretend

        pretend.install()
    fork, port = multiprocessing.get_context("fork"), PORT or free_port()
    ranks = [fork.Process(target=main, args=(rank, size, folder, cases, port)) for rank in range(size)]
    for each in ranks:
        each.start()
    stopped = {victim for name, (_, victim) in FALLING.items() if name in cases and name != "killed"}
    for number in sorted(range(size), key=lambda number: number in stopped):  # who is frozen wakes once others are done
        if number in stopped:
            os.kill(ranks[number].pid or 0, signal.SIGCONT)
        ranks[number].join()
    print([each.exitcode for each in ranks])
