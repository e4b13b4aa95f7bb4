"""The files that a network can become, each made in memory and opened again by the runtime that reads it.

``.onnx`` is for ONNX Runtime and whatever else reads ONNX; ``.pt2`` is what ``torch.export`` saves, PyTorch's own
format for programs; ``.pt`` is TorchScript, which PyTorch has deprecated and libraries of other languages still open.
"""

from __future__ import annotations

import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from wholegrad.errors import ConfigError

Array = npt.NDArray[np.floating[Any]]
Run = Callable[[Array], Array]
INPUT, OUTPUT, CARD = "image", "output", "wholegrad"
LARGEST = (1 << 31) - (1 << 20)  # bytes of one ONNX file, which is one message of protobuf
QUIET = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")


class Format(NamedTuple):
    """One kind of file.

    Attributes:
        name: in words.
        build: the format's own object, from the network, an image ``(N, C, H, W)`` such as it will get, and the opset.
        pack: the file's bytes, from that object and the card.
        load: what runs those bytes, as the format's own runtime does.
        runtime: who that is, with its version.
        needs: packages that writing and running take.
    """

    name: str
    build: Callable[[nn.Module, torch.Tensor, int | None], Any]
    pack: Callable[[Any, str], bytes]
    load: Callable[[bytes], Run]
    runtime: Callable[[], str]
    needs: tuple[str, ...] = ()


@contextmanager
def quiet() -> Iterator[None]:
    """Exporters tell of themselves by warnings and logs, which are not about the user's network."""
    levels = {name: logging.getLogger(name).level for name in QUIET}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for name in levels:
                logging.getLogger(name).setLevel(logging.ERROR)
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)


def _program(model: nn.Module, image: torch.Tensor) -> torch.export.ExportedProgram:
    """The network as one graph of any height and width, and of any batch if the image is one of several."""
    axes = (0, 2, 3) if len(image) > 1 else (2, 3)
    free = dict.fromkeys(axes, torch.export.Dim.DYNAMIC)
    return torch.export.export(model, (image,), dynamic_shapes={INPUT: free}, strict=False)


def _onnx(model: nn.Module, image: torch.Tensor, opset: int | None) -> Any:
    made = torch.onnx.export(
        _program(model, image), (image,), dynamo=True, verbose=False, opset_version=opset,
        input_names=[INPUT], output_names=[OUTPUT],
    )  # fmt: skip
    assert made is not None
    proto = made.model_proto
    got = next(each.version for each in proto.opset_import if each.domain in ("", "ai.onnx"))
    if opset is not None and got != opset:
        raise ConfigError("opset", f"is {opset}, and the exporter gives {got}", "choose that, or leave it out")
    if proto.ByteSize() > LARGEST:
        cause = f"takes {proto.ByteSize()} bytes, and an ONNX file has less than 2 GiB"
        raise ConfigError("network", cause, "name a file .pt2")
    _name_axes(proto)
    _forget_sources(proto)
    return proto


def _pack_onnx(proto: Any, card: str) -> bytes:
    del proto.metadata_props[:]
    entry = proto.metadata_props.add()
    entry.key, entry.value = CARD, card
    return bytes(proto.SerializeToString(deterministic=True))


def _name_axes(proto: Any) -> None:
    """Plain names for the axes that are free, in place of the exporter's symbols."""
    free, axes = {}, proto.graph.input[0].type.tensor_type.shape.dim
    for axis, name in zip(axes, ("batch", "channels", "height", "width"), strict=True):
        if axis.dim_param:
            free[axis.dim_param] = name
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        for axis in value.type.tensor_type.shape.dim:
            if axis.dim_param:
                axis.dim_param = re.sub(r"\b\w+\b", lambda word: free.get(word[0], word[0]), axis.dim_param)


def _forget_sources(proto: Any) -> None:
    """Nodes come with the lines of code that made them, paths on this machine included."""
    for node in proto.graph.node:
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info, *proto.graph.initializer):
        value.ClearField("metadata_props")
        value.ClearField("doc_string")
    proto.graph.ClearField("metadata_props")
    proto.graph.ClearField("doc_string")
    proto.ClearField("metadata_props")


def _run_onnx(data: bytes) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return lambda image: session.run(None, {INPUT: image})[0]


def _onnx_runtime() -> str:
    import onnxruntime

    return f"onnxruntime {onnxruntime.__version__}"


def _pt2(model: nn.Module, image: torch.Tensor, opset: int | None) -> Any:
    made = _program(model, image)
    for node in made.graph.nodes:
        for told in ("stack_trace", "nn_module_stack", "source_fn_stack"):  # lines and paths on this machine
            node.meta.pop(told, None)
    return made


def _pack_pt2(made: Any, card: str) -> bytes:
    file = io.BytesIO()
    torch.export.save(made, file, extra_files={f"{CARD}.json": card})
    return file.getvalue()


def _run_pt2(data: bytes) -> Run:
    return _by_torch(torch.export.load(io.BytesIO(data)).module())


def _torchscript(model: nn.Module, image: torch.Tensor, opset: int | None) -> Any:
    return torch.jit.trace(model, (image,), check_trace=False)  # type: ignore[no-untyped-call]


def _pack_torchscript(made: Any, card: str) -> bytes:
    file = io.BytesIO()
    torch.jit.save(made, file, _extra_files={f"{CARD}.json": card})
    return file.getvalue()


def _run_torchscript(data: bytes) -> Run:
    return _by_torch(torch.jit.load(io.BytesIO(data)))  # type: ignore[no-untyped-call]


def _by_torch(network: Callable[[torch.Tensor], torch.Tensor]) -> Run:
    def run(image: Array) -> Array:
        with torch.no_grad():
            return network(torch.from_numpy(image)).numpy()

    return run


def _torch() -> str:
    return f"torch {torch.__version__}"


ONNX = Format("ONNX", _onnx, _pack_onnx, _run_onnx, _onnx_runtime, ("onnx", "onnxscript", "onnxruntime"))
PT2 = Format("PyTorch's exported program", _pt2, _pack_pt2, _run_pt2, _torch)
TORCHSCRIPT = Format("TorchScript", _torchscript, _pack_torchscript, _run_torchscript, _torch)
FORMATS = {".onnx": ONNX, ".pt2": PT2, ".pt": TORCHSCRIPT}


def format_of(path: Path) -> Format:
    """The format that a file's ending names.

    Raises:
        ConfigError: none does.
    """
    form = FORMATS.get(path.suffix.lower())
    if form is None:
        known = ", ".join(f"{ending} ({each.name})" for ending, each in FORMATS.items())
        raise ConfigError(str(path), "has no ending of a format that networks are exported to", f"choose from {known}")
    return form
