"""What is measured on a GPU, a stage a process: started by ``main.py``. Results: lines of JSON on standard output."""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits

import wholegrad as wg
from wholegrad.kernels.expression import Leaf, Program, Step
from wholegrad.kernels.stage import Part
from wholegrad.kernels.thin import Mixed
from wholegrad.losses import bce_loss
from wholegrad.nets import unet4492
from wholegrad.run import calibrate_device
from wholegrad.run import pinned as pinned_memory
from wholegrad.run.process import peak_resident
from wholegrad.run.recordings import drop_recordings, recordings_of

GIB = 1 << 30
SAMPLE = 12  # steps of the training that are taken


def say(stage: str, name: str, **found: Any) -> None:
    """One result."""
    print(json.dumps({"stage": stage, "name": name, **found}), flush=True)


def seconds(run: Callable[[], Any], times: int, warm_up: int = 1) -> list[float]:
    """Of each run after ``warm_up`` that do not count, the GPU's work included."""
    found = []
    for i in range(warm_up + times):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        if i >= warm_up:
            found.append(time.perf_counter() - start)
    return found


def measured(stage: str, name: str, run: Callable[[], Any], times: int = 3, **about: Any) -> float:
    """Time ``run`` and say it with the peak of memory; an error is said too. Returns the median, NaN after an error."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        found = seconds(run, times)
    except Exception as error:
        say(stage, name, error=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", **about)
        torch.cuda.empty_cache()
        return float("nan")
    peak = {"peak_bytes": torch.cuda.max_memory_allocated(), "process_peak_bytes": peak_resident()}
    say(stage, name, seconds=found, **peak, **about)
    return statistics.median(found)


# The machine.


def machine(size: str) -> None:
    """What the machine can do: the lines of a roofline."""
    about = torch.cuda.get_device_properties(0)
    say("machine", about.name, memory=about.total_memory, torch=torch.__version__, cuda=torch.version.cuda)
    big = torch.empty(GIB, dtype=torch.float32, device="cuda")
    other = torch.empty_like(big)
    each = statistics.median(seconds(partial(other.copy_, big), 5))
    say("machine", "copy on the device", bytes_per_second=2 * big.nbytes / each)
    del big, other
    pinned, plain = torch.empty(GIB, dtype=torch.uint8, pin_memory=True), torch.zeros(GIB, dtype=torch.uint8)
    there = torch.empty(GIB, dtype=torch.uint8, device="cuda")
    for name, run in (
        ("pinned memory to device", lambda: there.copy_(pinned, non_blocking=True)),
        ("device to pinned memory", lambda: pinned.copy_(there, non_blocking=True)),
        ("pageable memory to device", lambda: there.copy_(plain)),
        ("pageable to pinned memory, one thread's copy", lambda: pinned.copy_(plain)),
    ):
        say("machine", name, bytes_per_second=GIB / statistics.median(seconds(run, 5)))
    reached = pinned_memory.block(GIB, there.device)
    say("machine", "host memory reached by the device's ops", trusted=reached is not None)
    if reached is not None:
        edge = int((GIB // 4) ** 0.5)
        boxes = torch.empty(edge, edge // 2, device="cuda")
        half, size = reached.view(torch.float32).view(edge, edge)[:, edge // 4 : -edge // 4], boxes.nbytes
        for name, run, moved in (
            ("half of each row copied from it by an op", lambda: boxes.copy_(half), size),
            ("half of each row copied to it by an op", lambda: half.copy_(boxes), size),
            ("half of each row added to by an op", lambda: half.add_(boxes), 2 * size),
        ):
            say("machine", f"host memory, {name}", bytes_per_second=moved / statistics.median(seconds(run, 5)))
    a, b = (torch.randn(8192, 8192, device="cuda") for _ in range(2))
    for tf32 in (False, True):
        torch.backends.cuda.matmul.allow_tf32 = tf32
        each = statistics.median(seconds(lambda: a @ b, 5))
        say("machine", f"float32 product, tf32 {tf32}", flops_per_second=2 * 8192**3 / each)


# Rates.


def calibrate(size: str) -> None:
    """Rates of the device with every set of options that steps are measured with, kept for the plans to come."""
    for options in ({}, {"triton": True}, {"deterministic": True}, {"tf32": True}):
        name = " and ".join(options) or "no options"
        start = time.perf_counter()
        try:
            found = calibrate_device.calibrate(wg.open_device("cuda", **options))
        except Exception as error:
            say("calibrate", name, error=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
            continue
        say("calibrate", name, took=time.perf_counter() - start, **json.loads(found.to_json()))


# Kernels.

LAYERS = (  # of the published network at full resolution and below, and wide ones: inputs, outputs, kernel, stride
    (3, 4, 8, 4), (2, 1, 5, 1), (3, 2, 5, 1), (4, 4, 3, 1), (8, 8, 3, 1), (16, 16, 3, 1), (32, 32, 3, 1),
    (64, 64, 3, 1),
)  # fmt: skip


def kernels(size: str) -> None:
    """Convolutions forward and both gradients: cuDNN in both layouts, and Triton's of the project where there are."""
    for inputs, outputs, kernel, stride in LAYERS:
        edge = 4096 if max(inputs, outputs) <= 16 else 2048
        x = torch.randn(1, inputs, edge, edge, device="cuda")
        weight = torch.randn(outputs, inputs, kernel, kernel, device="cuda")
        about = {"inputs": inputs, "outputs": outputs, "kernel": kernel, "stride": stride, "edge": edge}
        pad = kernel // 2
        out = torch.nn.functional.conv2d(x, weight, None, stride, pad)
        grad = torch.randn_like(out)
        about["macs"] = out.numel() * inputs * kernel**2
        for layout in (torch.contiguous_format, torch.channels_last):
            given = [t.contiguous(memory_format=layout) for t in (x, weight, grad)]
            _convolution(f"cuDNN {str(layout).removeprefix('torch.')}", *given, stride, pad, about)
        _triton(x, weight, grad, stride, pad, about)


def _convolution(
    name: str, x: torch.Tensor, w: torch.Tensor, grad: torch.Tensor, stride: int, pad: int, about: dict[str, Any]
) -> None:
    back = torch.ops.aten.convolution_backward
    how = ([stride] * 2, [pad] * 2, [1, 1], False, [0, 0], 1)
    for part, run in (
        ("forward", lambda: torch.nn.functional.conv2d(x, w, None, stride, pad)),
        ("input gradient", lambda: back(grad, x, w, None, *how, [True, False, False])),
        ("weight gradient", lambda: back(grad, x, w, None, *how, [False, True, False])),
    ):
        measured("kernels", f"{name}: {part}", run, 10, **about)


def _triton(x: torch.Tensor, w: torch.Tensor, grad: torch.Tensor, stride: int, pad: int, about: dict[str, Any]) -> None:
    """The kernels of tiles (on a map, and on bytes with an activation), and those of a convolution by itself."""
    try:
        from wholegrad.kernels import triton_mixed, triton_thin
    except ImportError as error:
        say("kernels", "Triton", error=str(error), **about)
        return
    padding, window = (pad, pad, pad, pad), triton_thin.Window((stride, stride), (pad, pad, pad, pad), (1, 1))
    how, size, kernel = ((stride, stride), padding, (1, 1)), tuple(x.shape[2:]), tuple(w.shape[2:])
    program = Program((Leaf(bytes=1),), (Step("u8", (0,)), Step("leaky", (1,), (0.1,))))
    pixels = (x.abs() * 80).clamp(0, 255).to(torch.uint8)
    fused = Mixed((Part(program, x.shape[1]),), (pixels,))
    for name, run in (
        ("Triton: forward", lambda: triton_mixed.forward(x, w, None, *how)),
        ("Triton: input gradient", lambda: triton_mixed.input_gradient(grad, w, size, *how)),
        ("Triton: weight gradient", lambda: triton_mixed.weight_gradient(grad, x, kernel, *how)),
        ("Triton, bytes and activation: forward", lambda: triton_mixed.forward(fused, w, None, *how)),
        (
            "Triton, bytes and activation: weight gradient",
            lambda: triton_mixed.weight_gradient(grad, fused, kernel, *how),
        ),
        ("Triton, by itself: forward", lambda: triton_thin.forward(x, w, None, window)),
        ("Triton, by itself: input gradient", lambda: triton_thin.input_gradient(grad, w, size, window)),
        ("Triton, by itself: weight gradient", lambda: triton_thin.weight_gradient(grad, x, kernel, window)),
    ):
        measured("kernels", name, run, 10, **about)


# Steps.


def pixels(height: int, width: int, there: bool) -> tuple[Any, Any]:
    """Random bytes and labels, made on the device; on the host unless ``there``."""
    generator = torch.Generator("cuda").manual_seed(0)
    image = torch.empty(3, height, width, dtype=torch.uint8, device="cuda")
    for channel in image:  # no tensor of 2**31 elements is drawn at once
        channel.random_(0, 256, generator=generator)
    labels = torch.empty(1, height, width, dtype=torch.uint8, device="cuda").random_(0, 2, generator=generator)
    if there:
        return image, labels
    host = image.cpu().numpy(), labels.cpu().numpy()
    del image, labels
    torch.cuda.empty_cache()
    return host


def step(size: str) -> None:
    """The published network's step: image in the host's memory and on the device, every option by itself."""
    height, width = (int(edge) for edge in size.split("x"))
    variants: list[tuple[str, dict[str, Any], bool, Any]] = [
        ("image on the host", {}, False, "8GiB"),
        ("image on the host, Triton", {"triton": True}, False, "8GiB"),
        ("image on the host, Triton, graphs", {"triton": True, "graphs": True}, False, "8GiB"),
        ("image on the host, graphs", {"graphs": True}, False, "8GiB"),
        ("image on the host, 1 tile in flight", {"at_once": 1}, False, "8GiB"),
        ("image on the host, 4 tiles in flight", {"at_once": 4}, False, "8GiB"),
        ("image on the host, deterministic", {"deterministic": True}, False, "8GiB"),
        ("image on the host, tf32", {"tf32": True}, False, "8GiB"),
        ("image on the host, 2 GiB", {}, False, "2GiB"),
        ("image on the host, 2 GiB, graphs", {"graphs": True}, False, "2GiB"),
        ("image on the host, 2 GiB, Triton, graphs", {"triton": True, "graphs": True}, False, "2GiB"),
        ("image on the device", {}, True, None),
        ("image on the device, Triton", {"triton": True}, True, None),
        ("image on the device, Triton, graphs", {"triton": True, "graphs": True}, True, None),
        ("image on the device, Triton, 4 tiles in flight", {"triton": True, "at_once": 4}, True, None),
    ]
    data, where = pixels(height, width, False), False
    for name, options, there, budget in variants:
        if there != where:
            del data
            data, where = pixels(height, width, there), there
        model = unet4492(seed=0).cuda()
        held = torch.cuda.memory_allocated()
        try:
            device = wg.open_device("cuda", **options)
            plan = wg.plan(model, bce_loss, *data, device=device, budget=budget or held + 8 * GIB)
        except wg.WholegradError as error:
            say("step", name, error=str(error), size=size)
            continue
        print(plan, file=sys.stderr, flush=True)
        about = {"size": size, "projected_bytes": plan.projected, "held_bytes": held, "predicted": plan.seconds,
                 "tiles": [[*part.tile, part.tiles] for part in plan.segments]}  # fmt: skip
        device.forget_peak()
        measured("step", name, lambda m=model, d=data, p=plan: _train(m, bce_loss, d, p), 5, **about)  # type: ignore[misc]
        made = recordings_of(plan, device).count if options.get("graphs") else 0
        say("step", f"{name}: kept", device_peak_bytes=device.peak(), recordings=made)
        drop_recordings()


def _train(model: nn.Module, loss_fn: Any, data: tuple[Any, Any], plan: Any) -> None:
    model.zero_grad(set_to_none=True)
    wg.backward(model, loss_fn, *data, plan=plan)


def profile(size: str) -> None:
    """Which kernels a step's time on the device goes to, and how much of the step the device works at all."""
    height, width = (int(edge) for edge in size.split("x"))
    data = pixels(height, width, True)
    for options in ({}, {"triton": True}):
        model = unet4492(seed=0).cuda()
        try:
            device = wg.open_device("cuda", **options)
            plan = wg.plan(model, bce_loss, *data, device=device, budget=torch.cuda.memory_allocated() + 8 * GIB)
            _train(model, bce_loss, data, plan)
            torch.cuda.synchronize()
            kinds = [torch.profiler.ProfilerActivity.CUDA]
            start = time.perf_counter()
            with torch.profiler.profile(activities=kinds) as found:
                _train(model, bce_loss, data, plan)
                torch.cuda.synchronize()
            took = time.perf_counter() - start
        except Exception as error:
            say("profile", str(options), error=f"{type(error).__name__}: {error}"[:300])
            continue
        rows = sorted(found.key_averages(), key=lambda row: -row.self_device_time_total)
        busy = sum(row.self_device_time_total for row in rows) / 1e6
        say(
            "profile", f"{options}: all kernels", busy_seconds=busy, wall_seconds=took, calls=sum(r.count for r in rows)
        )
        for row in rows[:15]:
            about = {"busy_seconds": row.self_device_time_total / 1e6, "calls": row.count}
            say("profile", f"{options}: {row.key[:80]}", **about)


def training(size: str) -> None:
    """Steps of a training with a new image each: what the paper's 4940 would take, extrapolated from these."""
    height, width = (int(edge) for edge in size.split("x"))
    images = [pixels(height, width, False) for _ in range(2)]  # in turn: a step's image was not the one before
    for options in ({}, {"triton": True}, {"triton": True, "graphs": True}):
        model = unet4492(seed=0)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        try:
            plan = wg.plan(model, bce_loss, *images[0], device=wg.open_device("cuda", **options), budget="8GiB")
            taken, losses = [], []
            for i in range(SAMPLE + 1):
                start = time.perf_counter()
                optimizer.zero_grad()
                losses.append(float(wg.backward(model, bce_loss, *images[i % 2], plan=plan)))
                optimizer.step()
                taken.append(time.perf_counter() - start)
        except Exception as error:
            say("training", str(options), error=f"{type(error).__name__}: {error}"[:300])
            continue
        hours = 4940 * sum(taken[1:]) / SAMPLE / 3600
        say("training", f"{options}, {SAMPLE} steps", seconds=taken[1:], extrapolated_hours_4940_steps=hours,
            first_step=taken[0], losses=losses, size=size)  # fmt: skip
        drop_recordings()


def whole(size: str) -> None:
    """The same step by PyTorch on the whole image: planar, channels last, compiled."""
    height, width = (int(edge) for edge in size.split("x"))
    image, labels = pixels(height, width, True)
    for name, layout, compiled in (
        ("PyTorch, planar", torch.contiguous_format, False),
        ("PyTorch, channels last", torch.channels_last, False),
        ("PyTorch, torch.compile", torch.contiguous_format, True),
    ):
        model = unet4492(seed=0).cuda().to(memory_format=layout)
        run = torch.compile(model) if compiled else model

        def one(run: Any = run, model: Any = model, layout: Any = layout) -> None:
            model.zero_grad(set_to_none=True)
            x = (image[None].float() / 255).contiguous(memory_format=layout)
            bce_loss(run(x), labels[None]).backward()

        measured("whole", name, one, 3, size=size)


def wide(size: str) -> None:
    """MONAI's BasicUNet and a ResNet-50, against PyTorch on the whole image where that fits."""
    height, width = (int(edge) for edge in size.split("x"))
    image, labels = pixels(height, width, False)
    for name, build, loss_fn, target in _networks(labels):
        model = build().cuda()
        for way, options, placed in (
            ("tiles", {}, {}), ("tiles, tf32", {"tf32": True}, {}),
            ("tiles, boundaries on the host", {}, {"placement": "host"}),
        ):  # fmt: skip
            try:
                device = wg.open_device("cuda", **options)
                plan = wg.plan(
                    model, loss_fn, image, target, device=device, budget="100GiB", strategy="stream", **placed
                )
            except wg.WholegradError as error:
                say("wide", f"{name}, {way}", error=str(error), size=size)
                continue
            print(plan, file=sys.stderr, flush=True)
            about = {"size": size, "projected_bytes": plan.projected, "predicted": plan.seconds}
            measured(
                "wide", f"{name}, {way}", lambda m=model, f=loss_fn, t=target, p=plan: _train(m, f, (image, t), p),
                1, **about,
            )  # fmt: skip
        if height * width <= 1 << 28:
            _whole_wide(name, build().cuda(), loss_fn, image, target, size)


def _whole_wide(name: str, model: nn.Module, loss_fn: Any, image: Any, target: Any, size: str) -> None:
    x, given = torch.from_numpy(image).cuda()[None], torch.as_tensor(target).cuda()

    def one() -> None:
        model.zero_grad(set_to_none=True)
        loss_fn(model(x.float() / 255), given[None] if given.dim() == 3 else given).backward()

    measured("wide", f"{name}, whole image", one, 1, size=size)


def _networks(labels: Any) -> list[tuple[str, Callable[[], nn.Module], Any, Any]]:
    found: list[tuple[str, Callable[[], nn.Module], Any, Any]] = []
    try:
        from monai.networks.nets import BasicUNet

        unet = lambda: BasicUNet(spatial_dims=2, in_channels=3, out_channels=1)  # noqa: E731
        found.append(("BasicUNet", unet, _mean_bce, labels))
    except ImportError as error:
        say("wide", "BasicUNet", error=f"MONAI is not here: {error}")
    try:
        from torchvision.models import resnet50

        found.append(("ResNet-50", lambda: resnet50(num_classes=2), nn.CrossEntropyLoss(), torch.tensor([1])))
    except ImportError as error:
        say("wide", "ResNet-50", error=f"torchvision is not here: {error}")
    return found


def _mean_bce(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return binary_cross_entropy_with_logits(output, target.to(output.dtype))


def errors(size: str) -> None:
    """Errors of each parameter's gradient against whole-image float64: float32, tf32, bfloat16, PyTorch's own."""
    height, width = (int(edge) for edge in size.split("x"))
    image, labels = pixels(height, width, True)
    first = unet4492(seed=0).cuda()

    def whole_gradient(dtype: torch.dtype, tf32: bool = False) -> dict[str, torch.Tensor]:
        model = copy.deepcopy(first).to(dtype)
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
        bce_loss(model(image[None].to(dtype) / 255), labels[None]).backward()
        return {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}

    wanted = whole_gradient(torch.float64)
    found = {"PyTorch float32": whole_gradient(torch.float32), "PyTorch tf32": whole_gradient(torch.float32, True)}
    for name, dtype, options in (
        ("tiles float64", torch.float64, {}), ("tiles float32", torch.float32, {}),
        ("tiles tf32", torch.float32, {"tf32": True}), ("tiles Triton", torch.float32, {"triton": True}),
        ("tiles bfloat16", torch.bfloat16, {}), ("tiles autocast bfloat16", torch.float32, {}),
        ("tiles boundaries in bfloat16", torch.float32, {}), ("tiles recorded", torch.float32, {"graphs": True}),
    ):  # fmt: skip
        model = copy.deepcopy(first).to(dtype)
        rounds = {"boundary_dtype": torch.bfloat16} if "boundaries in bfloat16" in name else {}
        try:
            device = wg.open_device("cuda", **options)
            with torch.autocast("cpu", torch.bfloat16, enabled="autocast" in name):  # which the trace shows
                plan = wg.plan(model, bce_loss, image, labels, device=device, tile=(512, 768), **rounds)
                wg.backward(model, bce_loss, image, labels, plan=plan)
            found[name] = {key: p.grad.double() for key, p in model.named_parameters() if p.grad is not None}
        except Exception as error:
            say("errors", name, error=f"{type(error).__name__}: {error}"[:300], size=size)
    for name, grads in found.items():
        worst = {key: ((grads[key] - true).abs().max() / true.abs().max()).item() for key, true in wanted.items()}
        say("errors", name, size=size, worst=max(worst.values()), each=worst)


EVERY = (machine, calibrate, kernels, step, profile, training, whole, wide, errors)
STAGES = {each.__name__: each for each in EVERY}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--size", default="16000x64000")
    args = parser.parse_args()
    np.random.seed(0)
    STAGES[args.stage](args.size)


if __name__ == "__main__":
    main()
