"""``wholegrad view`` as a browser meets it over HTTP: what it serves, what it refuses, and how it ends."""

from __future__ import annotations

import hashlib
import http.client
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import tifffile
from PIL import Image
from torch import nn

import wholegrad as wg
from wholegrad.cli import main
from wholegrad.commands.view import _open_browser
from wholegrad.graph.geometry import Box
from wholegrad.graph.graph import Kind
from wholegrad.losses import LOSSES
from wholegrad.slide.mask import open_lower_levels
from wholegrad.slide.placement import whole_slide
from wholegrad.slide.resample import Resampled
from wholegrad.slide.write import PyramidWriter
from wholegrad.view import paint
from wholegrad.view.app import App
from wholegrad.view.jobs import Jobs
from wholegrad.view.ladder import TILE, Ladder, rungs, tile_box
from wholegrad.view.lru import Lru
from wholegrad.view.run import RunFolder, StepWish
from wholegrad.view.scene import Files, Scene
from wholegrad.view.server import CONNECTIONS, Server
from wholegrad.view.step import as_passes

HEIGHT, WIDTH = 1500, 2300
RESOLUTION: dict[str, Any] = {"resolution": (20000.0, 20000.0), "resolutionunit": "CENTIMETER"}  # 0.5 um a pixel


def make_slide(path: Path, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray[Any, Any]:
    """A slide of random pixels with a pyramid of 1, 1/2, 1/4; returns its pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)
    with PyramidWriter(path, (3, height, width), mpp=0.5, compression="deflate") as writer:
        writer.write_rows(pixels)
    return pixels


def make_labels(path: Path, labels: np.ndarray[Any, Any]) -> None:
    with PyramidWriter(path, (1, *labels.shape), mpp=0.5 * WIDTH / labels.shape[1], label=True) as writer:
        writer.write_rows(labels)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A slide, a true mask with every label, a prediction, probabilities."""
    path = tmp_path_factory.mktemp("view")
    make_slide(path / "case.tif")
    truth = np.zeros((HEIGHT, WIDTH), np.uint8)
    truth[100:900, 100:1300] = 1
    truth[700:1000, 1500:1600] = 255
    said = np.zeros((HEIGHT, WIDTH), np.uint8)
    said[100:900, 400:1550] = 1
    make_labels(path / "case.mask.tif", truth)
    make_labels(path / "said.tif", said)
    make_labels(path / "p.tif", (said * np.linspace(0, 255, WIDTH)).astype(np.uint8))
    return path


@contextmanager
def serving(files: Files, keep: int = 64 << 20, **more: Any) -> Iterator[Server]:
    scene = Scene(files, keep)
    app = App(scene, **more)
    try:
        with Server(app) as server:
            yield server
    finally:
        app.close()
        scene.close()


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with serving(Files(folder / "case.tif", folder / "case.mask.tif", folder / "said.tif")) as one:
        yield one


def get(server: Server, path: str, method: str = "GET", **headers: str) -> tuple[int, bytes, http.client.HTTPMessage]:
    """Status, body and headers of an address below the token, or, from a slash on, of one from the root."""
    where = urlsplit(server.url)
    connection = http.client.HTTPConnection("127.0.0.1", where.port, timeout=30)
    try:
        connection.putrequest(method, path if path.startswith("/") else where.path + path, skip_host="Host" in headers)
        for name, value in headers.items():
            connection.putheader(name, value)
        connection.endheaders()
        response = connection.getresponse()
        return response.status, response.read(), response.headers
    finally:
        connection.close()


def body(server: Server, path: str) -> bytes:
    status, data, _ = get(server, path)
    assert status == 200, (path, status)
    return data


def told(server: Server, path: str) -> Any:
    return json.loads(body(server, path))


def finished(server: Server, path: str) -> dict[str, Any]:
    """The state of a piece of work once it has ended."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        state: dict[str, Any] = told(server, path)
        if state["state"] != "running":
            return state
        time.sleep(0.05)
    raise TimeoutError(path)


def rgb(data: bytes) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def rgba(data: bytes) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGBA"))


# Who gets an answer.


def test_without_the_token_there_is_nothing(server: Server) -> None:
    token = urlsplit(server.url).path.strip("/")
    assert len(token) >= 32
    nothing = get(server, "/")[1]
    for path in (
        "/", f"/{token}", "/scene.json", "//scene.json", f"/{token[:-1]}/scene.json", f"/{token}x/scene.json",
        f"/{token.swapcase()}/scene.json", f"/x/{token}/scene.json", "/%C3%A9/scene.json",
    ):  # fmt: skip
        status, data, _ = get(server, path)
        assert (status, data) == (404, nothing), path
    assert told(server, "scene.json")["name"] == "case.tif"


def test_tokens_differ(folder: Path) -> None:
    with serving(Files(folder / "case.tif")) as one, serving(Files(folder / "case.tif")) as other:
        assert urlsplit(one.url).path != urlsplit(other.url).path


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "0.0.0.0", "", "[::1"])
def test_another_host_is_refused(server: Server, host: str) -> None:
    assert get(server, "scene.json", Host=host)[0] == 404


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost:8080", "LOCALHOST", "[::1]:9"])
def test_this_machine_is_served_on_any_port_of_a_tunnel(server: Server, host: str) -> None:
    assert get(server, "scene.json", Host=host)[0] == 200


def test_two_hosts_are_refused(server: Server) -> None:
    where = urlsplit(server.url)
    with socket.create_connection(("127.0.0.1", where.port or 0)) as line:
        line.sendall(
            f"GET {where.path} HTTP/1.1\r\nHost: localhost\r\nHost: evil\r\nConnection: close\r\n\r\n".encode()
        )
        assert line.recv(100).startswith(b"HTTP/1.1 404")


def test_only_loopback_listens(server: Server) -> None:
    assert server.socket.getsockname()[0] == "127.0.0.1"


def test_headers_forbid_everything_from_elsewhere(server: Server) -> None:
    for path in ("", "scene.json", "tiles/slide/0/0_0", "nothing"):
        headers = get(server, path)[2]
        policy = dict(part.strip().split(" ", 1) for part in headers["Content-Security-Policy"].split(";"))
        assert policy["default-src"] == "'none'" and policy["script-src"] == "'self'"
        assert "unsafe" not in headers["Content-Security-Policy"] and "*" not in headers["Content-Security-Policy"]
        assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
        assert headers["X-Content-Type-Options"] == "nosniff" and headers["Referrer-Policy"] == "no-referrer"
        assert headers["X-Frame-Options"] == "DENY" and headers["Cross-Origin-Opener-Policy"] == "same-origin"
        assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
        assert not [name for name in headers if name.lower().startswith("access-control")]


def test_what_changes_is_not_kept_by_the_browser_and_tiles_are(server: Server) -> None:
    for path in ("", "scene.json", "problems.json", "score.json", "at/5_5", "main.js", "nothing"):
        assert get(server, path)[2]["Cache-Control"] == "no-store", path
    for path in ("tiles/slide/0/0_0", "tiles/error/1/0_0", "thumb/0_0_200_200"):
        assert get(server, path)[2]["Cache-Control"].startswith("private, max-age="), path


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH", "BREW"])
def test_other_methods_are_refused(server: Server, method: str) -> None:
    assert get(server, "scene.json", method)[0] == 404


def test_head_is_get_without_its_body(server: Server) -> None:
    _, data, _ = get(server, "scene.json")
    status, nothing, headers = get(server, "scene.json", "HEAD")
    assert (status, nothing) == (200, b"") and int(headers["Content-Length"]) == len(data)


@pytest.mark.parametrize(
    "path",
    [
        "../pyproject.toml", "..%2f..%2fetc/passwd", "assets/../../app.py", "....//app.py", "%2e%2e/app.py",
        "/etc/passwd", "app.py", "__init__.py", "NOTICE.txt/..", "index.html/", "style.css%00",
        "tiles/slide/0/../../scene.json", "case.tif", "tiles/slide/0/0_0.tif", "tiles/slide/9/0_0",
        "tiles/slide/0/5_0", "tiles/slide/0/0_3", "tiles/slide/0/-1_0", "tiles/slide/00000000/0_0",
        "tiles/slide/0/99999999_0", "tiles/secret/0/0_0", "tiles/slide/0/0_0?file=x", "tiles/slide/0/0_0?t=0",
        "tiles/slide/0/0_0?t=256", "tiles/slide/0/0_0?line=2", "tiles/slide/0/0_0?hide=9999999999",
        "tiles/slide/0/0_0?t",
        "at/2300_0", "at/0_1500", "thumb/0_0_2301_10", "thumb/5_5_0_5", "thumb/0_0_10",
        "x" * 3000,
    ],
)  # fmt: skip
def test_what_is_not_there_is_not_found_and_nothing_more(server: Server, path: str) -> None:
    status, data, _ = get(server, path if path.startswith("/") else urlsplit(server.url).path + path)
    assert (status, data) == (404, b"Not found\n")


def test_no_answer_names_a_folder(server: Server, folder: Path) -> None:
    for path in ("", "scene.json", "problems.json", "score.json", "at/5_5", "nothing"):
        data = get(server, path)[1]
        assert str(folder).encode() not in data and b"wholegrad/view" not in data


def test_an_address_that_is_none_is_not_found(server: Server) -> None:
    where = urlsplit(server.url)
    for address in ("http://[/", "http://[::1/x/"):
        with socket.create_connection(("127.0.0.1", where.port or 0)) as line:
            line.sendall(f"GET {address} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
            assert line.makefile("rb").read().startswith(b"HTTP/1.1 404 ")


def test_a_request_that_is_no_http_gets_no_page(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.server_address[1])) as line:
        line.sendall(b"<script>alert(1)</script>\r\n\r\n")
        answer = line.recv(1000)
    assert b"script" not in answer


# What is shown.


def test_tiles_are_the_readers_pixels(server: Server, folder: Path) -> None:
    with wg.open_slide(folder / "case.tif") as slide:
        for rung, (height, width) in enumerate(server.app.scene.ladder.sizes):
            assert (height, width) == (-(-HEIGHT // 2**rung), -(-WIDTH // 2**rung))
            level = slide.at(rung) if rung < len(slide.level_shapes) else None
            reader = level or Resampled(slide, height, width)  # type: ignore[arg-type]
            for row in range(-(-height // TILE)):
                for col in range(-(-width // TILE)):
                    box = tile_box((height, width), col, row)
                    assert box is not None
                    status, data, headers = get(server, f"tiles/slide/{rung}/{col}_{row}")
                    assert status == 200 and headers["Content-Type"] == "image/bmp"
                    np.testing.assert_array_equal(rgb(data), reader.read(box).transpose(1, 2, 0))


def test_jpeg_on_request(folder: Path) -> None:
    with serving(Files(folder / "case.tif", quality=90)) as server:
        status, data, headers = get(server, "tiles/slide/0/0_0")
        assert status == 200 and headers["Content-Type"] == "image/jpeg"
        assert Image.open(io.BytesIO(data)).size == (TILE, TILE)
        assert len(data) < len(body(server, "scene.json")) + 3 * TILE * TILE


COLOURS = {name: (*colour, 255) for _, (name, colour) in paint.VERDICTS.items()}


def test_errors_have_the_colours_of_the_legend(server: Server) -> None:
    """Truth is x 100 to 1299, y 100 to 899; the prediction x 400 to 1549; not counted x 1500 to 1599, y 700 to 999."""
    legend = {each["name"]: each["colour"] for each in layer(server, "error")["legend"]}
    tiles = np.concatenate(
        [np.concatenate([rgba(body(server, f"tiles/error/0/{x}_{y}")) for x in range(5)], axis=1) for y in range(3)]
    )
    expected = np.zeros((HEIGHT, WIDTH, 4), np.uint8)
    expected[100:900, 100:400] = COLOURS["False negative"]
    expected[100:900, 400:1300] = COLOURS["True positive"]
    expected[100:900, 1300:1550] = COLOURS["False positive"]
    expected[700:1000, 1500:1600] = COLOURS["Not counted"]
    shown = tiles * (tiles[..., 3:] > 0)
    np.testing.assert_array_equal(shown, expected)
    assert legend == {name: "#{:02x}{:02x}{:02x}".format(*COLOURS[name]) for name in legend}
    assert set(legend) == {"True positive", "False positive", "False negative", "Not counted"}


def layer(server: Server, key: str) -> dict[str, Any]:
    found: dict[str, Any] = next(each for each in told(server, "scene.json")["layers"] if each["key"] == key)
    return found


def test_what_is_hidden_is_transparent(server: Server) -> None:
    all_of_it = rgba(body(server, "tiles/error/0/0_0"))
    without = rgba(body(server, f"tiles/error/0/0_0?hide={1 << paint.MISSED - 1}"))
    missed = (all_of_it == COLOURS["False negative"]).all(axis=-1)
    assert missed.any() and (without[missed][:, 3] == 0).all()
    np.testing.assert_array_equal(without[~missed][:, 3], all_of_it[~missed][:, 3])


@pytest.mark.parametrize(("x", "y"), [(0, 0), (1, 0), (2, 1)])
def test_outlines_do_not_know_of_tiles(server: Server, x: int, y: int) -> None:
    whole = np.zeros((HEIGHT, WIDTH), np.uint8)
    whole[100:900, 100:1300] = 1
    whole[700:1000, 1500:1600] = 255
    box = tile_box((HEIGHT, WIDTH), x, y)
    assert box is not None
    expected = paint.rims(whole)[box.slices()] > 0
    np.testing.assert_array_equal(rgba(body(server, f"tiles/truth/0/{x}_{y}?line=1"))[..., 3] > 0, expected)
    assert 0 < expected.sum() < expected.size / 20


def test_rims_are_as_wide_as_they_say() -> None:
    labels = np.zeros((30, 30), np.uint8)
    labels[10:20, 10:20] = 2
    edge = paint.rims(labels, 3)
    assert (edge[13:17, 13:17] == 0).all() and (edge[10:13, 10:20] == 2).all() and edge.sum() == 2 * (100 - 16)


@pytest.mark.parametrize("threshold", [1, 128, 200])
def test_a_threshold_makes_the_prediction(folder: Path, threshold: int) -> None:
    opened = Files(folder / "case.tif", folder / "case.mask.tif", probability=folder / "p.tif")
    stored = tifffile.imread(folder / "p.tif")[:TILE, TILE : 2 * TILE]
    with serving(opened) as server:
        shown = rgba(body(server, f"tiles/prediction/0/1_0?t={threshold}"))[..., 3] > 0
        np.testing.assert_array_equal(shown, stored >= threshold)
        score = finished(server, f"score.json?t={threshold}")
        assert score["classes"][0]["tp"] == (tifffile.imread(folder / "p.tif")[100:900, 100:1300] >= threshold).sum()


@pytest.mark.parametrize(("given", "stored"), [(0.5, 128), (0.4, 102), (0.001, 1), (1.0, 255)])
def test_a_threshold_is_the_least_stored_value_that_reaches_it(folder: Path, given: float, stored: int) -> None:
    scene = Scene(Files(folder / "case.tif", threshold=given))
    assert scene.threshold == stored and stored / 255 >= given > (stored - 1) / 255
    scene.close()


def test_probabilities_are_a_scale(folder: Path) -> None:
    table = paint.scale_palette()
    assert table[0, 3] == 0 and (table[64:, 3] == 255).all()
    with serving(Files(folder / "case.tif", probability=folder / "p.tif")) as server:
        assert set(server.app.scene.layers) == {"slide", "prediction", "probability"}
        tile = rgba(body(server, "tiles/probability/0/1_0"))
    stored = tifffile.imread(folder / "p.tif")[:TILE, TILE : 2 * TILE]
    solid = stored >= 64
    assert solid.any()
    np.testing.assert_array_equal(tile[solid], table[stored[solid]])


def test_probabilities_of_an_array(folder: Path, tmp_path: Path) -> None:
    values = np.zeros((1, HEIGHT // 2, WIDTH // 2), np.float32)
    values[:, 100:200, 100:200] = 0.5
    np.save(tmp_path / "p.npy", values)
    with serving(Files(folder / "case.tif", probability=tmp_path / "p.npy")) as server:
        assert told(server, "at/250_250") == {
            "rgb": told(server, "at/250_250")["rgb"], "prediction": "Tissue", "probability": 0.502
        }  # fmt: skip


def test_what_is_at_a_pixel(server: Server, folder: Path) -> None:
    with wg.open_slide(folder / "case.tif") as slide:
        colour = slide.read(Box(200, 201, 200, 201))[:, 0, 0].tolist()
    assert told(server, "at/200_200") == {"rgb": colour, "truth": "Tissue", "prediction": "background"}
    assert told(server, "at/1550_750")["truth"] == "Ignore*"


def test_classes_by_name(folder: Path, tmp_path: Path) -> None:
    labels = np.zeros((HEIGHT, WIDTH), np.uint8)
    labels[:, :300], labels[:, 300:600] = 1, 2
    make_labels(tmp_path / "m.tif", labels)
    make_labels(tmp_path / "p.tif", labels[::-1, ::-1])
    with serving(
        Files(folder / "case.tif", tmp_path / "m.tif", tmp_path / "p.tif", classes=["Stroma", "Tumour"])
    ) as one:
        assert [each["name"] for each in layer(one, "truth")["legend"]] == ["Stroma", "Tumour"]
        assert "Wrong class" in [each["name"] for each in layer(one, "error")["legend"]]
        assert [each["name"] for each in finished(one, "score.json")["classes"]] == ["Stroma", "Tumour"]
    with serving(Files(folder / "case.tif", tmp_path / "m.tif")) as other:
        assert [each["name"] for each in layer(other, "truth")["legend"]] == ["Class 1", "Class 2"]


def test_outlines_of_geojson(folder: Path, tmp_path: Path) -> None:
    ring = [[100, 100], [1300, 100], [1300, 900], [100, 900], [100, 100]]
    feature = {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]}, "properties": {}}
    (tmp_path / "m.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": [feature]}))
    with serving(Files(folder / "case.tif", tmp_path / "m.geojson", folder / "said.tif")) as one:
        tile = rgba(body(one, "tiles/truth/0/0_0"))[..., 3] > 0
        assert not tile[:100].any() and not tile[:, :100].any() and tile[100:, 100:].all()
        assert finished(one, "score.json")["classes"][0]["fn"] == 300 * 800


def test_scores_and_worst_regions(server: Server) -> None:
    state = finished(server, "score.json")
    assert state["state"] == "done" and state["grid"] == [HEIGHT, WIDTH]
    (one,) = state["classes"]
    ignored = 50 * 200  # of the prediction, x 1500 to 1549, y 700 to 899
    assert (one["tp"], one["fp"], one["fn"]) == (900 * 800, 250 * 800 - ignored, 300 * 800)
    assert state["metrics"]["dice"] == pytest.approx(2 * one["tp"] / (2 * one["tp"] + one["fp"] + one["fn"]))
    assert state["metrics"]["hausdorff95_um"] == pytest.approx(150, rel=0.01)  # 300 pixels of 0.5 um
    first, *rest = state["worst"]
    assert first["missed"] == first["box"][2] * first["box"][3] and first["extra"] == 0
    wrong = [each["missed"] + each["extra"] + each["mixed"] for each in state["worst"]]
    assert wrong == sorted(wrong, reverse=True) and len(rest) == 11
    boxes = [each["box"] for each in state["worst"]]
    for i, (x, y, w, h) in enumerate(boxes):
        for a, b, c, d in boxes[i + 1 :]:
            assert x + w <= a or a + c <= x or y + h <= b or b + d <= y, "two regions overlap"
    thumb = rgb(body(server, "thumb/{}_{}_{}_{}".format(*first["box"])))
    washed = 0.45 * 127.5 + 0.55 * np.array(paint.VERDICTS[paint.MISSED][1])  # over pixels that are grey on average
    assert np.abs(thumb.mean(axis=(0, 1)) - washed).max() < 12


def test_equal_masks_have_no_worst_region(folder: Path) -> None:
    mask = folder / "case.mask.tif"
    with serving(Files(folder / "case.tif", folder / "said.tif", folder / "said.tif")) as one:
        state = finished(one, "score.json")
    assert state["metrics"]["dice"] == 1 and state["worst"] == [] and mask.exists()


def test_labels_that_are_none_are_said_and_not_waited_for(folder: Path) -> None:
    with serving(
        Files(folder / "case.tif", folder / "said.tif", folder / "case.mask.tif")
    ) as one:  # 255 is no prediction
        state = finished(one, "score.json")
    assert state["state"] == "failed" and "255" in state["problem"]


# The plan.


def test_the_plans_tiles_share_out_the_slide_and_halos_hold_them(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wg, "plan", partial(wg.plan, tile=(128, 256), strategy="stream"))  # several, on any machine
    with serving(Files(folder / "case.tif"), step=StepWish(budget="8GiB", level=1)) as one:
        state = finished(one, "plan.json")
    plan = state["plan"]
    assert state["state"] == "done" and plan["image"] == [1, 3, HEIGHT // 2, WIDTH // 2]
    sweeps = [(each["segment"], each["sweep"]) for each in plan["passes"]]
    assert sweeps[-1][1] in ("backward", "one pass") and len(set(sweeps)) == len(sweeps)
    for segment in plan["segments"]:
        for axis, size in (("rows", HEIGHT), ("cols", WIDTH)):
            ends = segment[axis]
            assert ends[0][0] == 0 and ends[-1][1] == size, "level 1 covers all of level 0"
            assert all(before[1] == after[0] for before, after in pairwise(ends))
            assert all(0 <= read0 <= own0 and own1 <= read1 <= size for own0, own1, read0, read1 in ends)
    for axis in ("rows", "cols"):
        assert any(read1 - read0 > own1 - own0 for s in plan["segments"] for own0, own1, read0, read1 in s[axis])


@pytest.mark.parametrize("boundaries", [[], ["0"], ["0", "2"]])
def test_passes_are_in_the_order_in_which_a_step_runs(boundaries: list[str]) -> None:
    """Of each tile that it runs the executor tells the phase; the page's passes say the same."""
    layers = [nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 1, 3, padding=1)]
    net, loss = nn.Sequential(*layers), LOSSES["bce"]
    image = np.random.default_rng(0).integers(0, 256, (3, 96, 128)).astype(np.uint8)
    target = (image[:1] > 128).astype(np.uint8)
    plan = wg.plan(net, loss, image, target, tile=(32, 64), boundaries=boundaries, strategy="stream")
    ran: list[str] = []
    wg.backward(net, loss, image, target, plan=plan, progress=lambda event: ran.append(event.phase))
    shown = as_passes(plan, whole_slide((96, 128), (96, 128)))
    passes = shown["passes"]
    segments = [part.segment for part in plan.segments]
    of_image = [any(plan.graph.nodes[ref.node].kind is Kind.IMAGE for ref in segment.maps) for segment in segments]
    assert [each["reads"] == "image" for each in shown["segments"]] == of_image and any(of_image)
    phases = {"one pass": "fused"}
    assert ran == [phases.get(each["sweep"], each["sweep"]) for each in passes for _ in range(each["tiles"])]
    assert len(plan.segments) > len(boundaries)


# Caches and threads.


def test_the_cache_stays_in_its_bound(folder: Path) -> None:
    keep = 3 << 20  # of tiles of 0.75 MiB
    with serving(Files(folder / "case.tif", folder / "case.mask.tif"), keep=keep) as one:
        scene = one.app.scene
        for _ in range(2):
            for y in range(3):
                for x in range(5):
                    body(one, f"tiles/slide/0/{x}_{y}")
                    assert scene.tiles.nbytes <= keep
        assert scene.tiles.made > 15 and 0 < len(scene.tiles) <= 5
        before = scene.tiles.made
        body(one, "tiles/slide/0/4_2")
        assert scene.tiles.made == before, "the last one was kept"


def test_a_new_prediction_is_drawn_in_place_of_kept_tiles(folder: Path) -> None:
    with serving(Files(folder / "case.tif", folder / "case.mask.tif", folder / "said.tif")) as one:
        before = {key: body(one, f"tiles/{key}/0/0_0") for key in ("slide", "truth", "prediction", "error")}
        thumb = body(one, "thumb/0_0_512_512")
        one.app.scene.renew(folder / "case.mask.tif")
        after = {key: body(one, f"tiles/{key}/0/0_0?v=1") for key in before}
        assert {key for key in before if before[key] != after[key]} == {"prediction", "error"}
        assert (rgba(after["prediction"])[..., 3] > 0).sum() == (512 - 100) ** 2
        assert body(one, "thumb/0_0_512_512") != thumb


class Value:
    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes


def test_the_least_recently_used_goes_first() -> None:
    kept: Lru[Value] = Lru(10)
    a, b = kept.get("a", lambda: Value(4)), kept.get("b", lambda: Value(4))
    assert kept.get("a", lambda: Value(0)) is a
    kept.get("c", lambda: Value(4))
    assert kept.get("a", lambda: Value(0)) is a and kept.get("b", lambda: Value(3)) is not b
    assert kept.get("large", lambda: Value(11)).nbytes == 11 and kept.nbytes <= 10


def test_threads_that_ask_at_once_share_the_work_and_the_error() -> None:
    kept: Lru[Value] = Lru(10)
    started, go = threading.Event(), threading.Event()
    found: list[object] = []

    def make() -> Value:
        started.set()
        go.wait(10)
        raise ValueError("once")

    def ask() -> None:
        try:
            found.append(kept.get("k", make))
        except ValueError as error:
            found.append(str(error))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    started.wait(10)
    time.sleep(0.1)
    go.set()
    for thread in threads:
        thread.join()
    assert found == ["once"] * 4 and kept.made == 0
    assert kept.get("k", lambda: Value(1)).nbytes == 1


def test_many_browsers_at_once_get_what_one_gets(folder: Path) -> None:
    opened = Files(folder / "case.tif", folder / "case.mask.tif", folder / "said.tif")
    with serving(opened) as one:
        paths = [f"tiles/{key}/{rung}/0_0" for key in ("slide", "truth", "error") for rung in range(3)]
        alone = {path: body(one, path) for path in paths}
    with serving(opened) as one:
        found: dict[tuple[str, int], bytes] = {}

        def ask(path: str, i: int) -> None:
            found[path, i] = body(one, path)

        threads = [threading.Thread(target=ask, args=(path, i)) for i in range(4) for path in paths]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == {(path, i): alone[path] for path in paths for i in range(4)}


# Slides without levels, and masks with them.


def test_a_slide_without_levels_is_halved_exactly(tmp_path: Path) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (5000, 700, 3)).astype(np.uint8)
    tifffile.imwrite(tmp_path / "s.tif", pixels, tile=(256, 256), photometric="rgb", **RESOLUTION)
    with wg.open_slide(tmp_path / "s.tif") as slide:
        ladder = Ladder(slide, 16 << 20)
        assert ladder.sizes == rungs(5000, 700) and ladder.sizes[-1] == (313, 44)
        quarter = ladder.read(2, Box(0, 1250, 0, 175))
        blocks = pixels.reshape(1250, 4, 175, 4, 3).sum(axis=(1, 3), dtype=np.int64)
        np.testing.assert_array_equal(quarter, (blocks + 8) // 16)
        eighth = ladder.tile(3, 0, 0)  # of 2 x 2 of the rung before, 175 columns of which the last stands alone
        wide = np.pad(quarter, ((0, 0), (0, 1), (0, 0)), mode="edge")[:1024].astype(np.int64)
        mean = (wide[0::2, 0::2] + wide[0::2, 1::2] + wide[1::2, 0::2] + wide[1::2, 1::2] + 2) // 4
        np.testing.assert_array_equal(eighth, mean)
        assert ladder.tile(3, 0, 0) is eighth, "kept"
        ladder.close()


def test_an_overview_of_all_pixels_is_said_to_be(folder: Path, tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "bare.tif", np.zeros((64, 9000, 3), np.uint8), tile=(64, 64), photometric="rgb")
    with serving(Files(tmp_path / "bare.tif")) as bare, serving(Files(folder / "case.tif")) as layered:
        assert told(bare, "scene.json")["from_all"] and not told(layered, "scene.json")["from_all"]


def test_a_level_that_is_a_pixel_smaller_is_padded(tmp_path: Path) -> None:
    pixels = np.random.default_rng(2).integers(0, 256, (1025, 1025, 3)).astype(np.uint8)
    with tifffile.TiffWriter(tmp_path / "s.tif") as tiff:
        tiff.write(pixels, tile=(256, 256), photometric="rgb", **RESOLUTION)
        tiff.write(np.ascontiguousarray(pixels[:1024:2, :1024:2]), tile=(256, 256), photometric="rgb", subfiletype=1)
    with wg.open_slide(tmp_path / "s.tif") as slide:
        assert slide.level_shapes == ((1025, 1025), (512, 512))
        ladder = Ladder(slide, 1 << 20)
        np.testing.assert_array_equal(ladder.tile(1, 0, 0), pixels[:1024:2, :1024:2])
        for col, row, shape in ((1, 0, (512, 1, 3)), (0, 1, (1, 512, 3)), (1, 1, (1, 1, 3))):
            tile = ladder.tile(1, col, row)
            assert tile.shape == shape
            np.testing.assert_array_equal(tile[-1, -1], pixels[1022, 1022])
        ladder.close()


def test_smaller_levels_of_our_own_masks_are_used_and_those_of_others_are_not(folder: Path, tmp_path: Path) -> None:
    labels = np.zeros((HEIGHT, WIDTH), np.uint8)
    labels[:, ::2] = 1
    lie = np.full((HEIGHT // 2, WIDTH // 2), 7, np.uint8)
    with tifffile.TiffWriter(tmp_path / "m.tif") as tiff:
        tiff.write(labels, tile=(256, 256), **RESOLUTION)
        tiff.write(lie, tile=(256, 256), subfiletype=1)
    with wg.open_slide(folder / "case.tif") as slide:
        assert len(open_lower_levels(tmp_path / "m.tif", slide)) == 1
        assert [mask.stored_shape for mask in open_lower_levels(folder / "said.tif", slide)] == [  # type: ignore[attr-defined]
            (HEIGHT // 2, WIDTH // 2), (HEIGHT // 4, WIDTH // 4), (188, 288)
        ]  # fmt: skip
    with serving(Files(folder / "case.tif", tmp_path / "m.tif")) as one:
        assert [each["name"] for each in layer(one, "truth")["legend"]] == ["Tissue"]
    scene = Scene(Files(folder / "case.tif", folder / "said.tif"))
    assert scene._screens[0]._rungs[1].stored_shape == (HEIGHT // 2, WIDTH // 2)  # type: ignore[attr-defined]
    scene.close()


# The end, and what goes wrong.


def test_a_damaged_slide_is_said_in_one_line(folder: Path, tmp_path: Path) -> None:
    data = bytearray((folder / "case.tif").read_bytes())
    with tifffile.TiffFile(folder / "case.tif") as tiff:
        page = tiff.pages.first
        assert isinstance(page, tifffile.TiffPage)
        at, size = page.dataoffsets[0], page.databytecounts[0]
    data[at : at + size] = bytes(size)
    (tmp_path / "bad.tif").write_bytes(data)
    with serving(Files(tmp_path / "bad.tif")) as one:
        status, said, _ = get(one, "tiles/slide/0/0_0")
        assert (status, said) == (500, b"Unreadable\n")
        (problem,) = told(one, "problems.json")["problems"]
        assert "bad.tif: tile row 0, column 0 of level 0 is corrupt" in problem and "\n" not in problem
        assert get(one, "tiles/slide/0/4_0")[0] == 200, "the rest is still shown"
        assert get(one, "tiles/slide/0/0_0")[0] == 500 and len(told(one, "problems.json")["problems"]) == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"mask": Path("gone.tif")}, "cannot be opened"),
        ({"threshold": 0.0}, "threshold: is 0.0"),
        ({"threshold": 1.5}, "threshold: is 1.5"),
        ({"quality": 0}, "quality: is 0"),
        ({"classes": ["A", "A"]}, "classes"),
    ],
)
def test_what_cannot_be_opened_is_refused(folder: Path, change: dict[str, Any], said: str) -> None:
    with pytest.raises(wg.WholegradError, match=said):
        Scene(Files(folder / "case.tif", **change))


def test_another_slides_mask_is_refused(folder: Path, tmp_path: Path) -> None:
    make_labels(tmp_path / "m.tif", np.zeros((300, 300), np.uint8))
    with pytest.raises(wg.WholegradError, match="another scale"):
        Scene(Files(folder / "case.tif", tmp_path / "m.tif"))


def test_closing_is_quick_and_leaves_nothing_running(folder: Path) -> None:
    before = set(threading.enumerate())
    with serving(Files(folder / "case.tif")) as one:
        port = one.server_address[1]
        idle = socket.create_connection(("127.0.0.1", port))
        body(one, "tiles/slide/0/0_0")
        start = time.monotonic()
    assert time.monotonic() - start < 3
    idle.settimeout(5)
    assert idle.recv(10) == b"", "a connection that was open was hung up"
    idle.close()
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", port), timeout=2)
    end = time.monotonic() + 5
    while (left := set(threading.enumerate()) - before) and time.monotonic() < end:
        time.sleep(0.05)
    assert not left


def test_a_browser_that_has_given_up_costs_nothing(folder: Path) -> None:
    with serving(Files(folder / "case.tif")) as one:
        asked, go, paths = threading.Event(), threading.Event(), []
        answer = one.app.answer

        def slow(path: str, query: str) -> Any:
            paths.append(path)
            asked.set()
            go.wait(10)
            return answer(path, query)

        one.app.answer = slow  # type: ignore[method-assign]
        where = urlsplit(one.url)
        request = f"GET {where.path}{{}} HTTP/1.1\r\nHost: localhost\r\n\r\n"
        with socket.create_connection(("127.0.0.1", where.port or 0)) as line:
            line.sendall(request.format("problems.json").encode())
            assert asked.wait(10)
            line.sendall(request.format("tiles/slide/0/1_0").encode())
            line.shutdown(socket.SHUT_WR)  # while the first is worked on
            time.sleep(0.2)
            go.set()
            line.settimeout(10)
            while line.recv(1 << 16):
                pass
        assert paths == ["problems.json"], "what nobody waits for is not made"
        with socket.create_connection(("127.0.0.1", where.port or 0)) as line:
            line.sendall(request.format("tiles/slide/0/2_0").encode())
        assert body(one, "tiles/slide/0/3_0"), "one that hangs up does no harm"


def test_work_ends_when_nobody_waits() -> None:
    jobs, began = Jobs(), threading.Event()

    def work(publish: Callable[[dict[str, Any]], None]) -> None:
        while True:
            publish({"seen": True})
            began.set()
            time.sleep(0.01)

    assert jobs.state("k", work)["state"] == "running"
    assert began.wait(10) and jobs.state("k", work)["seen"]
    start = time.monotonic()
    jobs.close()
    assert time.monotonic() - start < 2 and not any(thread.is_alive() for thread in jobs._threads)


def test_work_that_nobody_asks_after_gives_way() -> None:
    """As a slider's earlier values do: the last one asked for is not behind all of them."""
    jobs, finished = Jobs(patience=0.2), threading.Event()

    def endless(publish: Callable[[dict[str, Any]], None]) -> None:
        while True:
            publish({})
            time.sleep(0.01)

    for value in range(4):
        jobs.state(value, endless)
    end = time.monotonic() + 20
    while jobs.state("wanted", lambda publish: finished.set())["state"] != "done" and time.monotonic() < end:
        time.sleep(0.05)
    assert finished.is_set()
    assert jobs.state(0, endless) == {"state": "running"}, "and may be asked for again"
    time.sleep(0.5)
    assert jobs.state(0, endless) == {"state": "running"}, "alone, it may take as long as it likes"
    jobs.close()


def test_connections_are_bounded(folder: Path) -> None:
    """Each has a thread: another user of the machine, who has no token, cannot take thousands."""
    with serving(Files(folder / "case.tif")) as one:
        port = urlsplit(one.url).port or 0
        lines = [socket.create_connection(("127.0.0.1", port)) for _ in range(CONNECTIONS + 20)]
        time.sleep(0.5)
        assert len(one._open) <= CONNECTIONS
        assert sum(thread.name.startswith("Thread") for thread in threading.enumerate()) < CONNECTIONS + 20
        for line in lines:
            line.close()
        end = time.monotonic() + 20
        while len(one._open) and time.monotonic() < end:
            time.sleep(0.05)
        assert body(one, "scene.json")


def test_those_without_the_token_lock_nobody_out(folder: Path) -> None:
    """Where strangers hold every connection, the oldest of theirs makes room; one that showed the token never does."""
    with serving(Files(folder / "case.tif")) as one:
        where = urlsplit(one.url)
        mine = http.client.HTTPConnection("127.0.0.1", where.port, timeout=30)
        mine.request("GET", where.path + "scene.json")
        assert mine.getresponse().read()
        lines = [socket.create_connection(("127.0.0.1", where.port or 0)) for _ in range(CONNECTIONS + 20)]
        assert body(one, "scene.json")
        mine.request("GET", where.path + "scene.json")
        assert mine.getresponse().status == 200
        lines[0].settimeout(10)
        assert lines[0].recv(1) == b"", "the oldest was hung up"
        for line in (mine, *lines):
            line.close()


def test_all_work_together_gets_the_time_to_end() -> None:
    """Not each: a page that is closed must not keep the terminal for the sum of them."""
    jobs, go = Jobs(), threading.Event()
    for value in range(4):
        jobs.state(value, lambda publish: bool(go.wait(20)) and None)
    start = time.monotonic()
    jobs.close(seconds=0.4)
    assert time.monotonic() - start < 1.2
    go.set()


def test_work_that_fails_by_a_mistake_is_not_waited_for() -> None:
    jobs = Jobs()

    def work(publish: Callable[[dict[str, Any]], None]) -> None:
        raise KeyError("oops")

    jobs.state("k", work)
    end = time.monotonic() + 10
    while (state := jobs.state("k", work))["state"] == "running" and time.monotonic() < end:
        time.sleep(0.01)
    assert state == {"state": "failed", "problem": "KeyError: 'oops'"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)], ids=str)
def test_the_command_ends_on_ctrl_c(folder: Path, number: signal.Signals) -> None:
    if signal.getsignal(number) == signal.SIG_IGN:
        pytest.skip("the tests were started to ignore it, and so are their processes")
    command = [sys.executable, "-m", "wholegrad", "view", str(folder / "case.tif"), "--no-browser"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ)
    assert process.stdout is not None
    url = process.stdout.readline().strip()
    where = urlsplit(url)
    assert where.hostname == "127.0.0.1"
    connection = http.client.HTTPConnection("127.0.0.1", where.port, timeout=30)  # and left open
    connection.request("GET", where.path + "scene.json")
    assert connection.getresponse().status == 200
    start = time.monotonic()
    process.send_signal(number)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 0 and errors.endswith("closed\n") and "Traceback" not in errors
    assert time.monotonic() - start < 15, "an open connection is not waited for, however busy the machine"
    connection.close()


def test_the_secret_is_in_no_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The browser gets a file to open, which this user alone can read and which leads to the page."""
    opened: list[str] = []
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("webbrowser.open", opened.append)
    remove = _open_browser("http://127.0.0.1:1/t0ken/")
    (path,) = tmp_path.iterdir()
    assert opened == [path.as_uri()] and "t0ken" not in opened[0]
    assert 'url=http://127.0.0.1:1/t0ken/"' in path.read_text()
    assert os.name != "posix" or path.stat().st_mode & 0o077 == 0
    remove()
    assert not list(tmp_path.iterdir())


def test_any_of_many_classes_can_be_hidden(folder: Path, tmp_path: Path) -> None:
    labels = np.zeros((HEIGHT, WIDTH), np.uint8)
    labels[:200, :200] = 12
    make_labels(tmp_path / "many.tif", labels)
    with serving(Files(folder / "case.tif", tmp_path / "many.tif")) as one:
        (layer,) = (each for each in told(one, "scene.json")["layers"] if each["key"] == "truth")
        assert [each["bit"] for each in layer["legend"]] == list(range(1, 13))
        assert rgba(body(one, "tiles/truth/0/0_0"))[0, 0, 3] == 255
        assert rgba(body(one, f"tiles/truth/0/0_0?hide={1 << 11}"))[0, 0, 3] == 0
        assert get(one, f"tiles/truth/0/0_0?hide={1 << 32}")[0] == 404


def test_a_port_that_is_taken(server: Server, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["view", str(folder / "case.tif"), "--no-browser", "--port", str(server.server_address[1])]) == 2
    assert "cannot be listened on" in capsys.readouterr().err


def test_a_folder_that_is_no_run(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["view", str(folder / "case.tif"), "--no-browser", "--report", str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err


def test_assets_are_complete_and_name_their_licence() -> None:
    assets = files("wholegrad.view") / "assets"
    page = (assets / "index.html").read_text()
    for name in ("style.css", "main.js", "theme.js", "openseadragon.min.js", "icon.svg"):
        assert f'"{name}"' in page and (assets / name).is_file()
    assert "http://" not in page and "https://" not in page and "<script>" not in page and "style=" not in page
    notice, licence = (assets / "NOTICE.txt").read_text(), (assets / "openseadragon.LICENSE.txt").read_text()
    assert hashlib.sha256((assets / "openseadragon.min.js").read_bytes()).hexdigest() in notice
    assert "6.1.1" in notice and "OpenSeadragon" in licence


def test_a_runs_log_is_read_as_it_grows(folder: Path, tmp_path: Path) -> None:
    step = {"kind": "step", "step": 0, "slide": "case", "loss": 1.5, "dice": 0.25, "seconds": 2.0, "rss": 1, "peak": 2}
    first = json.dumps({**step, "projected": 3, "lr": 0.1, "norm": None}) + "\n"
    judged = json.dumps({"kind": "validation", "step": 1, "dice": 0.5, "slides": {"case": 0.5}}) + "\n"
    entry = {"name": "case", "slide": str(folder / "case.tif"), "mask": str(folder / "case.mask.tif"), "group": "case"}
    (tmp_path / "split.json").write_text(json.dumps({"train": [{**entry, "part": "train"}], "val": [], "test": []}))
    log = tmp_path / "log.jsonl"
    log.write_text(first + judged[:9])
    with serving(Files(folder / "case.tif"), run=RunFolder(tmp_path)) as one:
        found = told(one, "log/0")
        assert found["steps"] == [[0, "case", 1.5, 0.25, 2.0, 1, 2, 3, 0.1]] and found["validations"] == []
        assert found["next"] == len(first), "half a line is left for the next look"
        log.write_text(first + judged)
        assert told(one, f"log/{len(first)}")["validations"] == [[1, 0.5]]
        assert told(one, "scene.json")["run"]["steps"]["count"] == 1
        log.write_text("")
        assert told(one, f"log/{len(first)}")["again"]
