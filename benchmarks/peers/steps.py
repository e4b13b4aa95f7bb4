"""One training step by each peer: set up once, then ``step()`` leaves gradients in the model."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import sys
import types
import warnings
from collections.abc import Callable

import numpy as np
import torch
from network import LABEL, Classifier
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

Step = Callable[[], torch.Tensor]


def as_floats(image: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """``(1, C, H, W)`` in [0, 1], as wholegrad hands 8-bit pixels to a model."""
    return torch.from_numpy(image).to(dtype).div_(255).unsqueeze(0)


def pytorch(model: Classifier, image: np.ndarray, dtype: torch.dtype) -> Step:
    """Whole-image autograd."""

    def step() -> torch.Tensor:
        loss = cross_entropy(model(as_floats(image, dtype)), LABEL)
        loss.backward()
        return loss.detach()

    return step


def checkpointed(model: Classifier, image: np.ndarray, dtype: torch.dtype) -> Step:
    """Whole-image autograd that keeps one map a layer or stage and computes the rest again: slower, smaller, same."""

    def step() -> torch.Tensor:
        features = as_floats(image, dtype).requires_grad_()  # or checkpoints would see nothing to differentiate
        stem, stages = model.encoder[:4], list(model.encoder[4:])
        for part in (stem, *(block for stage in stages for block in stage)):
            features = checkpoint(part, features, use_reentrant=False)
        loss = cross_entropy(model.head(features), LABEL)
        loss.backward()
        return loss.detach()

    return step


def import_lightstream() -> type:
    """lightstream's converter. Its top package imports Lightning, which the core neither declares nor needs."""
    spec = importlib.util.find_spec("lightstream")
    if spec is None or spec.submodule_search_locations is None:
        raise SystemExit("lightstream is not installed: see benchmarks/peers/README.md")
    package = types.ModuleType("lightstream")
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules["lightstream"] = package
    return importlib.import_module("lightstream.core.constructor").StreamingConstructor


def lightstream(model: Classifier, image: np.ndarray, dtype: torch.dtype, tile: int) -> Step:
    """The encoder is streamed forwards, the head runs on its map, the encoder is streamed again and pulled back."""
    constructor = import_lightstream()(
        model.encoder,
        tile,
        verbose=False,
        statistics_on_cpu=True,  # "False" moves the model to CUDA here
        normalize_on_gpu=True,  # tiles are scaled to [0, 1] one by one, so that the image stays 8-bit
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        add_keep_modules=[torch.nn.BatchNorm2d],  # as lightstream's own ResNet does
    )
    constructor.statistics_on_cpu = False  # "True" moves it there when the statistics are done
    with contextlib.redirect_stdout(io.StringIO()):
        streamed = constructor.prepare_streaming_model()
    model.encoder = streamed.stream_module  # its convolutions are others now
    pixels = torch.from_numpy(image).unsqueeze(0)

    def step() -> torch.Tensor:
        features = streamed(pixels).requires_grad_()
        loss = cross_entropy(model.head(features), LABEL)
        loss.backward()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*CUDA is not available.*")  # it asks for CUDA's autocast
            streamed.backward(pixels, features.grad)
        return loss.detach()

    return step


def wholegrad(model: Classifier, image: np.ndarray, budget: str) -> Step:
    """Model and loss as they are; the plan is made once."""
    import wholegrad as wg

    plan = wg.plan(model, cross_entropy, image, LABEL, budget=budget)
    print(plan, file=sys.stderr)
    return lambda: wg.backward(model, cross_entropy, image, LABEL, plan=plan)
