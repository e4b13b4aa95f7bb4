"""``wholegrad view`` in headless Chromium: pan, zoom, layers, links, keys, the training step, and what goes wrong."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from wholegrad.slide.write import PyramidWriter
from wholegrad.view import paint
from wholegrad.view.app import App
from wholegrad.view.run import StepWish
from wholegrad.view.scene import Files, Scene
from wholegrad.view.server import Server

if sys.platform == "win32":
    pytest.skip("the browser is driven over inherited pipes, which Windows lacks", allow_module_level=True)

from browser import Browser

HEIGHT, WIDTH = 1400, 2000
GLASS = (240, 238, 242)
SETTLED = """(() => { const page = window.page; return page && page.ready && [...page.slide.images.values()].every(
    (entry) => entry.image && (entry.image.getOpacity() === 0 || entry.image.getFullyLoaded()))
    && !page.drawing && Math.abs(page.slide.view().x - page.slide.view(true).x) < 0.5
    && Math.abs(page.slide.view().w - page.slide.view(true).w) < 0.5; })()"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A slide of glass, its mask (a square) and a prediction (the square, 200 pixels to the right)."""
    path = tmp_path_factory.mktemp("page")
    with PyramidWriter(path / "case.tif", (3, HEIGHT, WIDTH), mpp=0.5, compression="deflate") as writer:
        writer.write_rows(np.broadcast_to(np.uint8(GLASS), (HEIGHT, WIDTH, 3)))
    for name, left in (("case.mask.tif", 400), ("said.tif", 600)):
        labels = np.zeros((HEIGHT, WIDTH), np.uint8)
        labels[400:1000, left : left + 800] = 1
        with PyramidWriter(path / name, (1, HEIGHT, WIDTH), mpp=0.5, label=True) as writer:
            writer.write_rows(labels)
    return path


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    scene = Scene(Files(folder / "case.tif", folder / "case.mask.tif", folder / "said.tif"))
    app = App(scene, step=StepWish(budget="8GiB"))
    with Server(app) as one:
        yield one
    app.close()
    scene.close()


@pytest.fixture
def page(browser: Browser, server: Server) -> Browser:
    """The page as it opens, all tiles there."""
    return show(browser, server.url)


def show(browser: Browser, url: str) -> Browser:
    browser.resize(1400, 900)
    browser.dark(False)
    browser.open("about:blank")
    browser.problems.clear()
    browser.requests.clear()
    browser.open(url)
    browser.until(SETTLED)
    return browser


def view(page: Browser) -> dict[str, float]:
    page.until(SETTLED)
    found: dict[str, float] = page.run("page.slide.view()")
    return found


def there(page: Browser, x: float, y: float) -> tuple[float, float]:
    """Where a level-0 point is on the page."""
    left, top = page.run(f"page.slide.placer()({x}, {y})")
    return left + page.run("page.slide.size.left"), top + page.run("page.slide.size.top")


def colour(page: Browser, x: float, y: float) -> tuple[int, ...]:
    """What is seen of a level-0 pixel."""
    page.until(SETTLED)
    page.listen(0.3)  # tiles fade in
    left, top = there(page, x, y)
    picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    found: Any = picture.getpixel((int(left), int(top)))
    return tuple(found)


def visible(page: Browser, selector: str) -> bool:
    """Whether an element takes room."""
    return bool(page.run(f"document.querySelector({json.dumps(selector)}).getClientRects().length"))


def test_the_page_is_sound_and_asks_nobody_else(page: Browser, server: Server) -> None:
    page.until("document.querySelectorAll('#worst img').length")
    page.listen(0.5)
    assert page.problems == []
    assert page.requests and all(url.startswith((server.url, "blob:")) for url in page.requests)
    assert page.run("document.getElementById('name').textContent") == "case.tif"
    assert page.run("document.title") == "case.tif - wholegrad view"
    assert not visible(page, "#banner")


def test_dragging_pans(page: Browser) -> None:
    page.run("page.slide.zoomTo(1)")
    before = view(page)
    page.drag((900, 500), (700, 420))
    after = view(page)
    assert after["w"] == pytest.approx(before["w"])
    assert after["x"] > before["x"] + 150 and after["y"] > before["y"] + 40


def test_the_wheel_zooms_to_the_pointer(page: Browser) -> None:
    at = "page.slide.pixelAt(700, 300)"
    before, there = view(page), page.run(at)
    page.mouse("mouseWheel", 700, 300, deltaX=0, deltaY=-240)
    page.listen(0.2)
    after, still = view(page), page.run(at)
    assert after["w"] < 0.8 * before["w"]
    assert abs(still["x"] - there["x"]) < 0.02 * WIDTH and abs(still["y"] - there["y"]) < 0.02 * HEIGHT


def test_keys_move_and_zoom(page: Browser) -> None:
    whole = view(page)
    page.key("1")
    near = view(page)
    assert near["w"] == pytest.approx(page.run("page.slide.size.width"), rel=0.01), "a pixel to a pixel"
    page.key("ArrowRight")
    right = view(page)
    assert right["x"] == pytest.approx(near["x"] + 90, abs=2)
    page.key("ArrowUp")
    assert view(page)["y"] < right["y"] - 50
    page.key("+")
    assert view(page)["w"] == pytest.approx(near["w"] / 1.4, rel=0.01)
    page.key("0")
    assert view(page) == pytest.approx(whole, rel=0.01)


def test_buttons_zoom(page: Browser) -> None:
    before = view(page)
    page.click("#zoom-in")
    assert view(page)["w"] == pytest.approx(before["w"] / 1.6, rel=0.01)
    page.click("#fit")
    assert view(page)["w"] == pytest.approx(before["w"], rel=0.01)


def test_layers_have_exactly_their_colours(page: Browser) -> None:
    page.run("page.layers.set('error', { opacity: 1 })")
    verdicts = {name: c for _, (name, c) in paint.VERDICTS.items()}
    assert colour(page, 500, 700) == verdicts["False negative"]
    assert colour(page, 900, 700) == verdicts["True positive"]
    assert colour(page, 1300, 700) == verdicts["False positive"]
    assert colour(page, 1700, 700) == GLASS
    page.run("page.layers.set('error', { opacity: 0.5 })")
    half = tuple((a + b) / 2 for a, b in zip(verdicts["True positive"], GLASS, strict=True))
    assert colour(page, 900, 700) == pytest.approx(half, abs=2)


def test_toggles_by_switch_key_and_legend(page: Browser) -> None:
    shown = colour(page, 1300, 700)
    assert shown != GLASS
    page.click("#on-error")
    assert colour(page, 1300, 700) == GLASS
    page.key("e")
    assert colour(page, 1300, 700) == shown
    page.click("[data-layer=error] .key:nth-of-type(2)")  # false positives
    page.until("page.layers.states.get('error').hidden === 2")
    page.listen(1.2)
    assert colour(page, 1300, 700) == GLASS and colour(page, 500, 700) != GLASS
    assert page.run("document.querySelectorAll('[data-layer=error] .key')[1].getAttribute('aria-pressed')") == "false"


def test_outlines(page: Browser) -> None:
    for key in "et":
        page.key(key)
    page.key("o")
    page.listen(1.2)
    page.run("page.slide.go({ x: 400, y: 700, w: 100 }, true)")
    assert colour(page, 450, 700) == GLASS, "inside"
    assert colour(page, 401.5, 700) != GLASS, "on the edge"


def test_opacity_by_slider_and_keys(page: Browser) -> None:
    page.key("]")
    assert page.run("page.layers.states.get('error').opacity") == pytest.approx(0.7)
    slider = "document.querySelector('[data-layer=error] [type=range]')"
    page.run(f"{slider}.value = 20; {slider}.dispatchEvent(new Event('input'))")
    assert page.run("page.slide.images.get('error').image.getOpacity()") == pytest.approx(0.2)


def test_a_link_restores_the_view(page: Browser, server: Server) -> None:
    page.run("page.slide.go({ x: 620, y: 480, w: 700 }, true)")
    page.run(
        "page.layers.set('error', { on: false }); page.layers.set('truth', { on: true, opacity: 0.35, line: true })"
    )
    view(page)
    page.until("location.hash.includes('truth.35.line')")
    link = page.run("location.hash")
    again = show(page, server.url + link)
    assert view(again) == pytest.approx({"x": 620, "y": 480, "w": 700}, rel=0.01)
    states = again.run(
        "Object.fromEntries([...page.layers.states].map(([key, s]) => [key, [s.on, s.opacity, s.line]]))"
    )
    assert states["truth"] == [True, 0.35, True] and states["error"][0] is False
    assert again.run("location.hash") == link


def test_a_changed_link_is_followed(page: Browser) -> None:
    page.run("location.hash = '#x=300&y=300&w=400&layers=prediction.50'")
    page.until("page.layers.states.get('prediction').on")
    assert view(page) == pytest.approx({"x": 300, "y": 300, "w": 400}, rel=0.01)


@pytest.mark.parametrize(
    "link", ["#x=a&y=1&w=2", "#x=1&y=1&w=-5", "#layers=nothing.7,truth.x.hide9999", "#tile=999999999", "#%"]
)
def test_a_broken_link_breaks_nothing(browser: Browser, server: Server, link: str) -> None:
    page = show(browser, server.url + link)
    page.listen(0.3)
    assert page.problems == [] and view(page)["w"] > 0


def test_the_scale_bar_is_as_long_as_it_says(page: Browser) -> None:
    for width in (2500, 900, 60):
        page.run(f"page.slide.go({{ x: 1000, y: 700, w: {width} }}, true)")
        view(page)
        page.listen(0.1)
        said, um, bar = page.run(
            "[document.getElementById('scale-said').textContent, Number(document.getElementById('scale').dataset.um),"
            " document.getElementById('scale-bar').getBoundingClientRect().width]"
        )
        assert said == (f"{um / 1000:g} mm" if um >= 1000 else f"{um:g} µm")
        assert bar * width / page.run("page.slide.size.width") * 0.5 == pytest.approx(um, rel=0.02)


def test_scores_are_shown(page: Browser) -> None:
    page.until("!!document.getElementById('dice')")
    overlap = 2 * 600 * 600 / (2 * 600 * 800)
    assert page.run("document.getElementById('dice').textContent") == f"{overlap:.4f}"
    page.until("document.querySelectorAll('#scores dt').length === 6 && !document.querySelector('#scores .spinner')")


def test_worst_regions_are_jumped_to(page: Browser) -> None:
    page.until("page.scores.regions.length")
    page.key("n")
    x, y, width, height = page.run("page.scores.regions[0].box")
    seen = view(page)
    assert seen["x"] == pytest.approx(x + width / 2, abs=2) and seen["y"] == pytest.approx(y + height / 2, abs=2)
    assert width < seen["w"] < 12 * width
    page.key("n")
    page.key("N", shift=True)
    assert page.run("page.scores.at") == 0
    page.click("#worst li:nth-child(3) button")
    assert page.run("[page.scores.at, document.querySelectorAll('#worst [aria-current=true]').length]") == [2, 1]
    assert page.run("[...document.querySelectorAll('#worst img')].every((i) => i.naturalWidth > 20)")


def test_what_is_under_the_pointer(page: Browser) -> None:
    left, top = there(page, 500.5, 700.5)
    page.mouse("mouseMoved", left, top)
    said = page.until("document.getElementById('readout').textContent")
    assert "truth Tissue" in said and "prediction background" in said and f"RGB {' '.join(map(str, GLASS))}" in said
    page.mouse("mouseMoved", 20, 20)
    page.until("document.getElementById('readout').textContent === ''")


def test_the_training_step_is_drawn_and_played(page: Browser) -> None:
    page.key("g")
    page.until("page.step.plan")
    tiles = page.run("page.step.tiles")
    assert tiles == page.run("page.step.plan.passes.reduce((sum, pass) => sum + pass.tiles, 0)") > 0
    page.listen(0.3)
    assert page.run(
        drawn := "document.getElementById('overlay').getContext('2d').getImageData(0, 0, 1000, 800).data.some((v) => v)"
    )
    page.key(".")
    if tiles > 1:
        assert page.run("page.step.at") == 1
    page.key(",")
    assert page.run("page.step.at") == 0
    assert page.until("location.hash.endsWith('tile=0')")
    page.key("g")
    page.listen(0.3)
    assert not page.run(drawn)
    page.run("page.step.lasts = 1")
    page.key(" ")
    page.until("page.step.at === page.step.tiles - 1 && !page.step.playing", 60)


def test_a_click_chooses_the_tile_beneath(page: Browser) -> None:
    page.key("g")
    page.until("page.step.plan")
    page.run("page.step.goTo(0)")
    x, y = page.run("(s => [s.cols[0][0] + 5, s.rows.at(-1)[1] - 5])(page.step.find(0).segment)")
    left, top = there(page, x, y)
    for kind in ("mousePressed", "mouseReleased"):
        page.mouse(kind, left, top, button="left", clickCount=1)
    page.until("page.step.find(page.step.at).row === page.step.find(0).segment.rows.length - 1")
    assert page.run("page.step.find(page.step.at).col") == 0


def test_shortcuts_are_listed(page: Browser) -> None:
    assert not visible(page, "#shortcuts")
    page.key("?", shift=True)
    assert visible(page, "#shortcuts")
    listed = page.run("[...document.querySelectorAll('#shortcuts kbd')].map((k) => k.textContent)")
    assert {"t", "p", "e", "n", "g", "space", "?"} <= set(listed)
    page.key("e")
    assert page.run("page.layers.states.get('error').on"), "keys do nothing behind the list"
    page.key("Escape")
    assert not visible(page, "#shortcuts")


def test_light_and_dark(page: Browser) -> None:
    ground = "getComputedStyle(document.getElementById('panel')).backgroundColor"
    light = page.run(ground)
    page.dark(True)
    dark = page.run(ground)
    assert light == "rgb(255, 255, 255)" and dark != light
    page.key("d")
    assert page.run(ground) == light, "what was chosen wins over what the system says"
    page.key("d")
    assert page.run(ground) == dark
    page.run("localStorage.clear()")


CONTRAST = """(() => {
  const linear = (v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = (css) => { const [r, g, b] = css.match(/[\\d.]+/g).map(Number); return 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b); };
  const behind = (e) => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor; if (!/, 0\\)$/.test(c)) return c; } return "rgb(255, 255, 255)"; };
  return [...document.querySelectorAll("#panel *")].filter((e) => e.getClientRects().length && [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim()))
    .map((e) => { const [a, b] = [light(getComputedStyle(e).color), light(behind(e))].sort((x, y) => y - x); return [(a + 0.05) / (b + 0.05), e.textContent.trim().slice(0, 30)]; })
    .filter(([ratio]) => ratio < 4.5);
})()"""  # noqa: E501


@pytest.mark.parametrize("dark", [False, True])
def test_text_has_contrast(page: Browser, dark: bool) -> None:
    page.dark(dark)
    page.until("!!document.getElementById('dice')")
    page.listen(0.3)
    assert page.run(CONTRAST) == []


def test_everything_that_can_be_used_has_a_name(page: Browser) -> None:
    page.until("document.querySelectorAll('#worst img').length")
    nameless = page.run(
        "[...document.querySelectorAll('button, input')].filter((e) => !(e.getAttribute('aria-label')"
        " || e.textContent.trim() || e.title || e.labels?.length)).map((e) => e.outerHTML)"
    )
    assert nameless == []
    assert page.run("document.documentElement.lang") == "en"


def test_the_panel_makes_room(page: Browser) -> None:
    before = page.run("page.slide.size.width")
    page.key("\\")
    page.until(f"page.slide.size.width > {before} + 300")
    assert not visible(page, "#panel")
    page.click("#toggle-panel")
    page.until(f"page.slide.size.width === {before}")


def test_a_narrow_window_starts_with_the_slide(browser: Browser, server: Server) -> None:
    show(browser, server.url)
    browser.resize(500, 800)
    browser.open("about:blank")
    browser.open(server.url)
    browser.until(SETTLED)
    assert not visible(browser, "#panel")
    assert browser.run("document.documentElement.scrollWidth") <= 500
    browser.click("#toggle-panel")
    assert visible(browser, "#panel")


def test_a_slide_alone(browser: Browser, folder: Path) -> None:
    scene = Scene(Files(folder / "case.tif"))
    app = App(scene)
    with Server(app) as one:
        page = show(browser, one.url)
        assert visible(page, "#no-layers") and not visible(page, "#scores-part") and not visible(page, "#worst-part")
        for key in "tpbeon[]":
            page.key(key)
        page.listen(0.2)
        assert page.problems == []
    app.close()
    scene.close()


def test_a_damaged_slide_says_so(browser: Browser, folder: Path, tmp_path: Path) -> None:
    data = bytearray((folder / "case.tif").read_bytes())
    with tifffile.TiffFile(folder / "case.tif") as tiff:
        page_of = tiff.pages.first
        assert isinstance(page_of, tifffile.TiffPage)
        for at, size in zip(page_of.dataoffsets, page_of.databytecounts, strict=True):
            data[at : at + size] = bytes(size)
    (tmp_path / "bad.tif").write_bytes(data)
    scene = Scene(Files(tmp_path / "bad.tif"))
    app = App(scene)
    with Server(app) as one:
        page = show(browser, one.url)  # on the smaller levels, which are whole
        page.key("1")
        page.until("!document.getElementById('banner').hidden")
        assert "bad.tif: tile row" in page.run("document.getElementById('banner-text').textContent")
        page.click("#banner-close")
        page.key("ArrowRight")
        page.listen(1.5)
        assert not visible(page, "#banner") or "bad.tif" in page.run(
            "document.getElementById('banner-text').textContent"
        )
    app.close()
    scene.close()


def test_a_step_that_cannot_be_planned_says_so(browser: Browser, folder: Path) -> None:
    scene = Scene(Files(folder / "case.tif"))
    app = App(scene, step=StepWish(budget="1MiB"))
    with Server(app) as one:
        page = show(browser, one.url)
        page.click("#step-show")
        page.until("!document.getElementById('step-problem').hidden")
        assert "1.0 MiB" in page.run("document.getElementById('step-problem').textContent")
    app.close()
    scene.close()


def test_a_viewer_that_was_closed_says_so(browser: Browser, folder: Path) -> None:
    scene = Scene(Files(folder / "case.tif"))
    app = App(scene)
    with Server(app) as one:
        page = show(browser, one.url)
    app.close()
    scene.close()
    page.mouse("mouseMoved", 800, 450)
    page.until("!document.getElementById('banner').hidden")
    assert "was closed" in page.run("document.getElementById('banner-text').textContent")
