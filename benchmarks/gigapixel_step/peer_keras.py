"""Whole-image TensorFlow/Keras, as the published experiment trained: the same network, one step a call.

Before it is timed, the network is given the weights of the PyTorch one and must reproduce its loss and gradients on a
small image. Runs in an environment of its own (``requirements-keras.txt``), without PyTorch and wholegrad. Started by
``main.py``; the last line of output is the result as JSON.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from common import area, peer_inputs, report, timed
from keras import layers

LOSS_TOLERANCE = 1e-5  # float32 against float64, relative
GRADIENT_TOLERANCE = 1e-4  # of the tensor's largest element
PARAMETERS = 4492

Gradient = Callable[[Any, Any], tuple[Any, list[Any]]]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--image", type=Path, required=True)
    parser.add_argument("--mask", type=Path, required=True)
    parser.add_argument("--size", required=True)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--check", type=Path, required=True, help="weights, and the loss and gradients to reproduce")
    return parser.parse_args()


def conv(name: str, channels: int, kernel: int, stride: int = 1) -> layers.Layer:
    return layers.Conv2D(channels, kernel, strides=stride, padding="same", name=name)


def up(name: str, channels: int) -> layers.Layer:
    return layers.Conv2DTranspose(channels, 8, strides=4, padding="same", name=name)


def network(height: int, width: int) -> keras.Model:
    """``wholegrad.nets.unet4492``, layer by layer; for multiples of 16, where "same" pads as that network does."""

    def act(x: Any) -> Any:
        return layers.LeakyReLU(negative_slope=0.1)(x)

    image = keras.Input((height, width, 3), batch_size=1)
    ink = 1 - image
    low1 = act(conv("down1", 3, 8, 4)(ink))
    low2 = act(conv("down2", 6, 8, 4)(low1))
    deep = act(conv("middle", 6, 5)(low2))
    up2 = act(up("up2", 3)(deep))
    mid = act(conv("fuse2", 3, 3)(layers.Concatenate()([up2, low1])))
    up1 = act(up("up1", 2)(mid))
    full = act(conv("fuse1", 2, 3)(layers.Concatenate()([up1, ink])))
    model = keras.Model(image, conv("head", 1, 5)(full))
    assert model.count_params() == PARAMETERS, model.count_params()
    return model


def as_keras(array: np.ndarray) -> np.ndarray:
    """A PyTorch kernel ``(O, I, h, w)``, or ``(I, O, h, w)`` of a transposed one, as Keras keeps it; biases as is."""
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array


def torch_name(variable: Any) -> str:
    """What PyTorch calls a variable: ``down1/kernel`` is ``down1.weight``."""
    layer, kind = variable.path.split("/")[-2:]
    return f"{layer}.{'weight' if kind == 'kernel' else 'bias'}"


def load(model: keras.Model, check: Any) -> None:
    for variable in model.trainable_variables:
        variable.assign(as_keras(check[f"weight:{torch_name(variable)}"]))


def gradient_of(model: keras.Model) -> Gradient:
    """Loss and gradients, forward and backward: mean binary cross-entropy with logits."""
    loss_fn = keras.losses.BinaryCrossentropy(from_logits=True)

    def gradient(image: Any, labels: Any) -> tuple[Any, list[Any]]:
        with tf.GradientTape() as tape:
            loss = loss_fn(labels, model(image, training=True))
        return loss, tape.gradient(loss, model.trainable_variables)

    return gradient


def verify(path: Path) -> dict[str, float]:
    """How far the network is from PyTorch's in loss and gradients; too far ends the process."""
    check = np.load(path)
    model = network(*check["image"].shape[1:3])
    load(model, check)
    loss, grads = gradient_of(model)(tf.constant(check["image"]), tf.constant(check["labels"]))
    apart = abs(float(loss) - float(check["loss"])) / float(check["loss"])
    worst = 0.0
    for variable, grad in zip(model.trainable_variables, grads, strict=True):
        wanted = as_keras(check[f"grad:{torch_name(variable)}"])
        worst = max(worst, float(np.abs(grad.numpy() - wanted).max() / np.abs(wanted).max()))
    if not (apart <= LOSS_TOLERANCE and worst <= GRADIENT_TOLERANCE):
        sys.exit(f"the Keras network is another: loss {apart:.1e} apart, gradients {worst:.1e}")
    return {"check_loss_difference": apart, "check_gradient_difference": worst}


def main() -> None:
    args = arguments()
    found = verify(args.check)
    height, width = area(args.size)
    pixels, target = peer_inputs(args.image, args.mask, height, width)
    image, labels = tf.constant(pixels), tf.constant(target)
    del pixels, target
    model = network(height, width)
    load(model, np.load(args.check))
    optimizer = keras.optimizers.Adam(1e-3)
    gradient = gradient_of(model)

    @tf.function
    def step(image: Any, labels: Any) -> Any:
        loss, grads = gradient(image, labels)
        optimizer.apply_gradients(zip(grads, model.trainable_variables, strict=True))
        return loss

    timings = timed(lambda: float(step(image, labels)), args.steps)
    versions = {"tensorflow": tf.__version__, "keras": keras.__version__}
    report(shape=[3, height, width], versions=versions, **found, **timings)


if __name__ == "__main__":
    main()
