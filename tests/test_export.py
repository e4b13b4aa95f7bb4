"""Exported networks: reach is exact, tiles agree with the whole slide, the card says all that it takes."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import sys
import zipfile
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import wholegrad as wg
from wholegrad.cli import main
from wholegrad.errors import WholegradError
from wholegrad.export import MismatchError, run_tiled
from wholegrad.export.card import scale_of, tiling_of, weights_digest
from wholegrad.export.formats import FORMATS, TORCHSCRIPT, quiet
from wholegrad.given import given
from wholegrad.graph.capture import capture
from wholegrad.graph.geometry import Box
from wholegrad.graph.graph import Graph
from wholegrad.graph.reach import AxisReach, Reach, Unbounded, reach
from wholegrad.nets import unet4492
from wholegrad.nets.tissue import tissue4492
from wholegrad.slide.slide import open_slide
from wholegrad.train.networks import Normalized
from wholegrad.train.state import Card, save_weights


class Skip(nn.Module):
    """Down by 2 and 3, up again, joined with what was there."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 2, 3, stride=2, padding=1), nn.AvgPool2d(3))
        self.up = nn.Sequential(nn.ConvTranspose2d(2, 2, 6, stride=3, padding=1), nn.Upsample(scale_factor=2))
        self.last = nn.Conv2d(5, 1, (3, 1), padding=(1, 0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        up = self.up(self.down(x))
        return self.last(torch.cat([up[..., : x.shape[2], : x.shape[3]], x], 1))  # type: ignore[no-any-return]


class Mirrored(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + x.flip(-1)


class Part(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[..., :100]


class Branch(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) if x.mean() > 0 else x


LOCAL: dict[str, Callable[[], nn.Module]] = {
    "unet4492": unet4492,
    "no padding": lambda: nn.Sequential(nn.Conv2d(3, 4, 5), nn.ReLU(), nn.Conv2d(4, 1, 4, 2)),
    "stride 3": lambda: nn.Conv2d(3, 2, 5, stride=3, padding=1),
    "dilated": lambda: nn.Sequential(
        nn.Conv2d(3, 2, 3, dilation=3, padding=3), nn.Conv2d(2, 1, (1, 5), padding=(0, 2))
    ),
    "uneven padding": lambda: nn.Sequential(nn.ZeroPad2d((3, 0, 0, 1)), nn.Conv2d(3, 1, (2, 4))),
    "bilinear": lambda: nn.Sequential(nn.Conv2d(3, 2, 4, 4), nn.Upsample(scale_factor=4, mode="bilinear")),
    "shuffle": lambda: nn.Sequential(nn.PixelUnshuffle(4), nn.Conv2d(48, 16, 3, padding=1), nn.PixelShuffle(4)),
    "skip": Skip,
}
ENDLESS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "instance norm": (lambda: nn.Sequential(nn.Conv2d(3, 2, 3), nn.InstanceNorm2d(2)), "1 (aten.var_mean.correction)"),
    "classifier": (
        lambda: nn.Sequential(nn.Conv2d(3, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2)),
        "3 (aten.addmm.default)",
    ),
    "corners": (
        lambda: nn.Sequential(nn.Conv2d(3, 2, 2, 2), nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)),
        "1 (aten.upsample_bilinear2d.default)",
    ),
    "mirrored": (Mirrored, "model (aten.flip.default)"),
    "part": (Part, "model (aten.slice.Tensor)"),
}


def captured(model: nn.Module) -> Callable[[int], Graph]:
    def at(size: int) -> Graph:
        return capture(model, None, given(np.broadcast_to(np.uint8(0), (3, size, size)), None, torch.float32).inputs)

    return at


def positive(model: nn.Module) -> nn.Module:
    """The same network with weights that let no gradient cancel."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.abs_().add_(0.1)
    return model.double().eval()


def by_gradient(model: nn.Module, found: Reach, size: int, axes: tuple[int, ...]) -> list[tuple[int, int]]:
    """Before and after along each axis, as whole-image autograd has them, in the middle of an image."""
    image = torch.rand(1, 3, size, size, dtype=torch.float64, requires_grad=True)
    out = model(image)
    result = []
    for axis in axes:
        along = (found.rows, found.cols)[axis]
        period = int(along.stride / along.scale)
        middle = [int(size // 2 / each.scale) // int(each.stride / each.scale) for each in (found.rows, found.cols)]
        at = [m * int(each.stride / each.scale) for m, each in zip(middle, (found.rows, found.cols), strict=True)]
        before, after = -(1 << 30), -(1 << 30)
        for o in range(at[axis], at[axis] + period):
            place = (o, at[1]) if axis == 0 else (at[0], o)
            (grad,) = torch.autograd.grad(out[0, 0, place[0], place[1]], image, retain_graph=True)
            touched = grad[0].abs().sum(dim=(0, 2 - axis)).nonzero()
            before = max(before, int(o * along.scale) - int(touched.min()))
            after = max(after, int(touched.max()) + 1 - -int(-(o + 1) * along.scale // 1))
        result.append((before, after))
    return result


@pytest.mark.parametrize("name", LOCAL)
def test_reach_is_what_gradients_touch(name: str) -> None:
    model = LOCAL[name]()
    found = reach(captured(model.eval()))
    assert isinstance(found, Reach)
    size, axes = (256, (1,)) if name == "unet4492" else (120, (0, 1))  # of it rows are as columns: see below
    expected = [(each.before, each.after) for each in (found.rows, found.cols)]
    assert by_gradient(positive(model), found, size, axes) == [expected[axis] for axis in axes]


def test_the_published_network_reaches_as_far_as_its_layers_say() -> None:
    found = reach(captured(unet4492().eval()))
    assert isinstance(found, Reach)
    assert found.rows == found.cols and found.rows.stride == 16
    assert (found.rows.before, found.rows.after, found.rows.halo) == (74, 74, 80)


@pytest.mark.parametrize("name", ENDLESS)
def test_what_looks_at_all_of_the_image_has_no_reach(name: str) -> None:
    make, place = ENDLESS[name]
    found = reach(captured(make().eval()))
    assert isinstance(found, Unbounded)
    assert found.place == place


def loaded(path: Path) -> Callable[..., Any]:
    """The file's network, without what PyTorch says of TorchScript."""
    with quiet():
        return FORMATS[path.suffix].load(path.read_bytes())


def told(model: nn.Module) -> dict[str, Any]:
    """What a card says of tiles."""
    found = reach(captured(model))
    return {"tiling": tiling_of(found)[0], "output": {"scale": scale_of(found)}}


def but(card: dict[str, Any], **changed: Any) -> dict[str, Any]:
    """The same with another stride or halo."""
    return {**card, "tiling": {**card["tiling"], **changed}}


def eager(model: nn.Module) -> Callable[..., Any]:
    return lambda image: model(torch.from_numpy(image)).detach().numpy()


@pytest.mark.parametrize("name", ["no padding", "uneven padding", "skip", "bilinear"])
def test_tiles_agree_with_the_whole_and_a_smaller_halo_does_not(name: str) -> None:
    torch.manual_seed(1)
    model = LOCAL[name]().eval()
    card, run = told(model), eager(model)
    image = np.random.default_rng(0).random((2, 3, 96, 132), np.float32)
    whole = run(image)
    assert np.abs(run_tiled(run, image, card, (24, 36)) - whole).max() < 1e-5
    tiling = card["tiling"]
    smaller = [max(halo - stride, 0) for halo, stride in zip(tiling["halo"], tiling["stride"], strict=True)]
    short = run_tiled(run, image, but(card, halo=smaller), (24, 36))
    assert short.shape != whole.shape or np.abs(short - whole).max() > 1e-4


def test_a_tile_that_starts_beside_the_stride_does_not_agree() -> None:
    model = unet4492(seed=1).eval()
    image = np.random.default_rng(0).random((1, 3, 256, 320), np.float32)
    card, run = told(model), eager(model)
    whole = run(image)
    scale = np.abs(whole).max()
    assert np.abs(run_tiled(run, image, card, (96, 96)) - whole).max() < 1e-5 * scale
    assert np.abs(run_tiled(run, image, but(card, halo=[64, 64]), (96, 96)) - whole).max() > 1e-5 * scale
    beside = run_tiled(run, image, but(card, stride=[8, 8], halo=[88, 88]), (104, 104))
    assert np.abs(beside - whole).max() > 1e-3 * scale


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The network that ships, as ONNX, by the command."""
    path = tmp_path_factory.mktemp("onnx") / "tissue.onnx"
    assert main(["export", "tissue4492", "--out", str(path)]) == 0
    return path


def test_onnx_by_the_cards_tiles_is_what_predict_gives(
    shipped: Path, tmp_path: Path, write_case: Callable[..., None]
) -> None:
    write_case(tmp_path, "a", size=(500, 433))
    card = json.loads(shipped.with_suffix(".json").read_text())
    with open_slide(tmp_path / "slides/a.tif") as slide:
        expected = wg.predict(tissue4492(), slide, kind="logits")
        image = slide.read(Box(0, 500, 0, 433))[None].astype(np.float32) / 255
    assert expected is not None and 0 < (expected > 0).mean() < 1
    found = run_tiled(loaded(shipped), image, card, (192, 160))
    assert np.abs(found[0] - expected).max() < 1e-5 * np.abs(expected).max()


def test_the_card_says_all_that_running_it_takes(shipped: Path) -> None:
    import onnx

    card = json.loads(shipped.with_suffix(".json").read_text())
    data = shipped.read_bytes()
    assert card["file"] == {"name": "tissue.onnx", "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert card["network"] == "tissue4492" and card["parameters"] == 4492 and card["licence"] == "Apache-2.0"
    assert card["input"]["mpp"] == 4.0 and card["input"]["balance"]["white"] == 240
    assert card["input"]["multiple"] == [1, 1] and card["output"]["classes"] == ["background", "Tissue"]
    assert card["tiling"]["halo"] == [80, 80] and card["checked"]["with"].startswith("onnxruntime")
    assert 0 < card["checked"]["tiles"] < card["checked"]["allowed"]
    proto = onnx.load_from_string(data)
    onnx.checker.check_model(proto)
    inside = json.loads({each.key: each.value for each in proto.metadata_props}["wholegrad"])
    assert inside == {**card, "file": None}
    (image,) = proto.graph.input
    assert [axis.dim_param or axis.dim_value for axis in image.type.tensor_type.shape.dim] == [
        "batch",
        3,
        "height",
        "width",
    ]
    assert image.name == card["input"]["name"] and proto.graph.output[0].name == card["output"]["name"]


def test_a_file_tells_nothing_of_the_machine_that_made_it(shipped: Path, tmp_path: Path) -> None:
    sources = str(Path(wg.__file__).parent).encode()
    assert b".py" not in shipped.read_bytes() and sources not in shipped.read_bytes()
    wg.export(nn.Conv2d(3, 1, 3).eval(), tmp_path / "n.pt2")
    with zipfile.ZipFile(tmp_path / "n.pt2") as file:
        texts = [file.read(name) for name in file.namelist()]
        assert json.loads(next(file.read(n) for n in file.namelist() if n.endswith("wholegrad.json")))["card"] == 1
    assert not any(sources in text or b"/torch/" in text for text in texts)


@pytest.mark.parametrize("ending", [".pt", ".pt2"])
def test_torchs_own_formats_load_without_us(ending: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Normalized(nn.Conv2d(3, 2, 3, padding=1), [0.5, 0.4, 0.3], [0.2, 0.2, 0.3]).eval()
    path = tmp_path / f"n{ending}"
    card = wg.export(model, path, kind="probability", classes=["Tumor"], name="mine")
    image = torch.rand(2, 3, 37, 50)
    if ending == ".pt":
        extra = {"wholegrad.json": ""}
        with pytest.warns(DeprecationWarning):
            network = torch.jit.load(io.BytesIO(path.read_bytes()), _extra_files=extra)
        assert json.loads(extra["wholegrad.json"])["network"] == "mine"
    else:
        network = torch.export.load(path).module()
    assert torch.allclose(network(image), torch.softmax(model(image), 1), atol=1e-6)
    assert card.input["mean"] == [0.5, 0.4, 0.3] and card.input["axes"] == ["batch", 3, "height", "width"]
    assert card.output["classes"] == ["background", "Tumor"] and card.output["threshold"] is None
    assert card.checked is not None and card.checked["with"].startswith("torch ")


def test_a_network_without_reach_runs_whole(tmp_path: Path) -> None:
    make, place = ENDLESS["instance norm"]
    card = wg.export(make().eval(), tmp_path / "n.pt")
    assert card.tiling is None and card.output["scale"] is None
    assert card.why_not == f"{place} depends on the whole image: run whole images"
    assert json.loads((tmp_path / "n.json").read_text())["tiling"] is None


def test_sizes_that_the_network_does_not_take_are_told(tmp_path: Path) -> None:
    card = wg.export(LOCAL["shuffle"]().eval(), tmp_path / "n.pt", channels=3)
    assert card.input["multiple"] == [4, 4]


class Demanding(nn.Conv2d):
    """Takes multiples of a number alone, though no op of it does."""

    multiple = 3

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[2] % self.multiple or x.shape[3] % self.multiple:
            raise ValueError("another size, please")
        return super().forward(x)


def test_sizes_that_only_the_networks_code_refuses_are_told_and_tiles_keep_to_them(tmp_path: Path) -> None:
    card = wg.export(Demanding(3, 1, 3, padding=1).eval(), tmp_path / "n.pt")
    assert card.input["multiple"] == [3, 3]
    assert card.tiling is not None and (card.tiling["stride"], card.tiling["halo"]) == ([3, 3], [3, 3])
    assert card.checked is not None and card.checked["tiles"] is not None


class Seven(nn.Module):
    """Down seven times and up again, joined with what was there: images of multiples of 128 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.down = nn.Conv2d(3, 2, 3, padding=1), nn.ModuleList(nn.Conv2d(2, 2, 2, 2) for _ in range(7))
        self.up = nn.ModuleList(nn.ConvTranspose2d(2, 2, 2, 2) for _ in range(7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        maps = [self.first(x)]
        for down in self.down:
            maps.append(down(maps[-1]))
        found = maps.pop()
        for up in self.up:
            found = up(found) + maps.pop()
        return found


def test_a_deep_network_is_captured_at_a_size_that_it_takes() -> None:
    found = reach(captured(Seven().eval()))
    assert isinstance(found, Reach) and found.rows == found.cols
    assert found.rows.stride == 128 and found.rows.halo == 128


def test_a_network_that_takes_no_size_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Demanding, "multiple", 315)  # which the size of the capture is a multiple of
    with pytest.raises(WholegradError, match=r"runs on no image of about .* \(ValueError: another size, please\)"):
        wg.export(Demanding(3, 1, 3, padding=1).eval(), tmp_path / "n.pt")


class Single(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) if len(x) == 1 else x[:, None]


def test_a_network_of_one_image_at_a_time_is_said_to_be(tmp_path: Path) -> None:
    card = wg.export(Single(3, 1, 3, padding=1).eval(), tmp_path / "n.pt")
    assert card.input["axes"] == [1, 3, "height", "width"] and card.output["axes"] == [1, 1, "height", "width"]


def test_a_file_that_is_off_for_several_images_takes_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = TORCHSCRIPT.load

    def off(data: bytes) -> Callable[..., Any]:
        run = load(data)
        return lambda image: run(image) * np.float32(1 if len(image) < 3 else 1.001)

    monkeypatch.setitem(FORMATS, ".pt", TORCHSCRIPT._replace(load=off))
    assert wg.export(conv(), tmp_path / "n.pt").input["axes"][0] == 1


def test_one_channel_of_probability_is_a_sigmoid(tmp_path: Path) -> None:
    model, image = conv(), torch.rand(1, 3, 20, 24)
    card = wg.export(model, tmp_path / "n.pt", kind="probability")
    found = loaded(tmp_path / "n.pt")(image.numpy())
    assert np.allclose(found, torch.sigmoid(model(image)).detach().numpy(), atol=1e-6)
    assert card.output["probability"] == "sigmoid" and card.output["threshold"] == 0.5


class Endless(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * float("inf")


def test_what_is_no_number_agrees_with_nothing(tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match="is off by inf"):
        wg.export(Endless(3, 1, 3).eval(), tmp_path / "n.pt")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_its_runtime_does_not_take_is_told(tmp_path: Path) -> None:
    """ONNX Runtime has no convolution of float64."""
    with pytest.raises(MismatchError, match=r"is not taken by onnxruntime .*; call model.float\(\) first, or choose"):
        wg.export(conv().double(), tmp_path / "n.onnx")
    assert list(tmp_path.iterdir()) == []


def test_tiles_that_the_file_refuses_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = TORCHSCRIPT.load

    def large(data: bytes) -> Callable[..., Any]:
        run = load(data)

        def some(image: Any) -> Any:
            if image.shape[2] < 60 or image.shape[3] < 60:
                raise RuntimeError("too small")
            return run(image)

        return some

    monkeypatch.setitem(FORMATS, ".pt", TORCHSCRIPT._replace(load=large))
    card = wg.export(conv(), tmp_path / "n.pt")
    assert card.tiling is None and card.why_not == "by tiles it does not run: run whole images"


def test_a_network_that_cannot_be_copied_is_refused(tmp_path: Path) -> None:
    with pytest.warns(FutureWarning):
        model = torch.nn.utils.weight_norm(conv())
    with pytest.raises(WholegradError, match=r"model: cannot be copied .*; take off torch\.nn\.utils\.weight_norm"):
        wg.export(model, tmp_path / "n.pt")


class Talking(nn.Conv2d):
    def get_extra_state(self) -> dict[str, int]:
        return {"seen": 3}

    def set_extra_state(self, state: dict[str, int]) -> None: ...


def test_what_a_module_keeps_beside_its_weights_is_not_of_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain, talking = nn.Conv2d(3, 1, 3), Talking(3, 1, 3)
    assert weights_digest(plain) != weights_digest(talking)
    talking.load_state_dict(plain.state_dict(), strict=False)
    assert weights_digest(plain) == weights_digest(talking)


def test_without_a_check_the_card_says_nothing_of_it(tmp_path: Path) -> None:
    card = wg.export(conv(), tmp_path / "n.pt", check=False)
    assert card.checked is None and card.input["multiple"] is None


def test_a_file_that_computes_something_else_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = TORCHSCRIPT.load

    def off(data: bytes) -> Callable[..., Any]:
        run = load(data)
        return lambda image: run(image) * np.float32(1.001)

    monkeypatch.setitem(FORMATS, ".pt", TORCHSCRIPT._replace(load=off))
    with pytest.raises(
        MismatchError, match=r"Conv2d: is off by .* on the size that it was exported with once exported"
    ):
        wg.export(nn.Conv2d(3, 1, 3).eval(), tmp_path / "n.pt")
    assert list(tmp_path.iterdir()) == []


def test_tiles_that_do_not_agree_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever geometry says: the check has the last word."""
    axis = AxisReach(Fraction(1), stride=1, before=0, after=0, halo=0)
    monkeypatch.setattr(sys.modules["wholegrad.export.network"], "reach", lambda _: Reach(axis, axis))
    card = wg.export(nn.Conv2d(3, 1, 5, padding=2).eval(), tmp_path / "n.pt")
    assert card.tiling is None and card.why_not is not None and card.why_not.startswith("by tiles it is off by")


def conv() -> nn.Module:
    return nn.Conv2d(3, 1, 3).eval()


@pytest.mark.parametrize(
    ("model", "name", "options", "said"),
    [
        (conv, "n.pth", {}, "n.pth: has no ending of a format that networks are exported to; choose from .onnx (ONNX)"),
        (lambda: nn.Conv2d(3, 1, 3), "n.pt", {}, "model: is in training mode"),
        (conv, "n.pt", {"kind": "mask"}, "kind: is 'mask'; choose from logits, probability"),
        (conv, "n.pt", {"threshold": 1}, "threshold: is 1; choose a probability between 0 and 1"),
        (lambda: conv().half(), "n.pt", {}, "model: computes in torch.float16; call model.float() first"),
        (lambda: nn.ReLU().eval(), "n.pt", {}, "channels: cannot be told from the network"),
        (lambda: Branch(3, 1, 3).eval(), "n.pt", {}, "code must not look at pixel values"),
        (conv, "n.pt", {"classes": ["a", "b"]}, "classes: are 2 names for 1 labels"),
        (conv, "n.pt", {"classes": "Tumor"}, "classes: is 'Tumor'; give a list of names"),
        (conv, "n.pt", {"classes": [""]}, "classes: is ['']; give a list of names"),
        (lambda: nn.Conv2d(3, 3, 3).eval(), "n.pt", {"classes": ["a", "a"]}, "has a name twice: a, a"),
        (conv, "n.pt", {"channels": 0}, "channels: is 0; give a whole number of 1 or more"),
        (conv, "n.pt", {"mpp": 0.0}, "mpp: is 0.0; give um a pixel, more than 0"),
        (conv, "n.pt", {"mpp": float("nan")}, "mpp: is nan; give um a pixel, more than 0"),
        (conv, "n.pt", {"opset": 18}, "opset: is of ONNX; name a file .onnx, or leave it out"),
        (conv, "n.onnx", {"opset": 99}, "opset: is 99, and the exporter gives "),
        (conv, "no/n.pt", {}, "no/n.pt: has no folder to go to; make "),
        (3, "n.pt", {}, "model: is a int; give an nn.Module"),
    ],
)
def test_refusals(model: Any, name: str, options: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(WholegradError) as refused:
        wg.export(model() if callable(model) else model, tmp_path / name, **options)
    assert said in str(refused.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--out", "."], ".: has no ending of a format"),
        (["--out", "/"], "/: has no ending of a format"),
        (["--out", "n.pt", "--mpp", "2"], "--mpp: is known of tissue4492; leave it out"),
        (["--out", "n.pt", "--network", "unet4492"], "--network: is known of tissue4492; leave it out"),
    ],
)
def test_the_command_refuses_in_one_line(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["export", "tissue4492", *words]) == 2
    assert said in capsys.readouterr().err and list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "onnxruntime" else find(name))
    with pytest.raises(
        WholegradError, match=r"ONNX: needs onnxruntime, .*'wholegrad\[export\]', or leave out the check"
    ):
        wg.export(conv(), tmp_path / "n.onnx")


def test_weights_of_a_run_with_what_their_card_knows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = unet4492(seed=2)
    data = {"mpp": 2.0, "balance": True, "classes": {"fat": 0, "tumour": 1}}
    card = Card("unet4492", {}, 4492, 7, {}, {"data": data}, {}, mean=[0.5] * 3, std=[0.25] * 3)
    save_weights(tmp_path / "weights.safetensors", model, card)
    out = tmp_path / "net.pt"
    assert main(["export", str(tmp_path), "--out", str(out), "--licence", "CC0-1.0"]) == 0
    said = capsys.readouterr().out
    assert "unet4492, 4492 parameters, as TorchScript: logits of batch x 3 x height x width at 2 um a pixel" in said
    assert "tiles: start at multiples of 16 x 16 pixels, with a halo of 80 x 80 around" in said
    assert "glass and ink evened out before" in said
    told = json.loads(out.with_suffix(".json").read_text())
    assert told["input"]["mean"] == [0.5] * 3 and told["licence"] == "CC0-1.0"
    assert told["output"]["classes"] == ["background", "tumour"]
    for flag, value in (("--mpp", "0"), ("--mpp", "-2")):
        assert main(["export", str(tmp_path), "--out", str(tmp_path / "other.pt"), flag, value]) == 2
        assert "mpp: is " in capsys.readouterr().err
    assert main(["export", str(tmp_path), "--out", str(out)]) == 2
    assert "net.pt: exists already; choose another --out, or give --force" in capsys.readouterr().err
    assert main(["export", str(tmp_path), "--out", str(out), "--force", "--no-check"]) == 0
    assert json.loads(out.with_suffix(".json").read_text())["checked"] is None
