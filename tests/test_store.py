"""Maps of few channels lie channel by channel, others pixel by pixel, in memory and on disk, as readers want them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import wholegrad as wg
from wholegrad.graph.geometry import Box
from wholegrad.graph.graph import Spec
from wholegrad.graph.layout import map_layout
from wholegrad.kernels.choice import THIN
from wholegrad.run.blocks import Blocks
from wholegrad.run.sources import Form, Source
from wholegrad.run.spill import Spill
from wholegrad.run.spill_store import DiskStore
from wholegrad.run.store import HostStore
from wholegrad.slide.arrays import as_reader

ROWS, COLS = 60, 70
BOX = Box(11, 47, 5, 66)


@pytest.mark.parametrize("narrow", [None, torch.bfloat16])
@pytest.mark.parametrize("channels", [2, THIN, THIN + 1])
def test_a_box_comes_in_the_layout_of_its_readers(channels: int, narrow: torch.dtype | None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    spec = Spec(map_layout((2, channels, ROWS, COLS)), torch.float32)
    whole = torch.randn(2, channels, ROWS, COLS).to(narrow or torch.float32).float()
    with_disk = DiskStore(spec, Spill(1 << 22, tmp_path, 0), ([0, 33, ROWS], [0, 31, 64, COLS]), "a map", narrow)
    for store in (HostStore(spec, Blocks(), dtype=narrow), with_disk):
        for rows in ((0, 20), (20, ROWS)):
            store.write(Box(*rows, 0, COLS), whole[:, :, rows[0] : rows[1]])
        rows, cols = BOX.slices()
        for found in (store.read(BOX), store.look(BOX)):
            assert torch.equal(found, whole[:, :, rows, cols])
            assert found.stride(3 if channels <= THIN else 1) == 1
        store.close()


@pytest.mark.parametrize(("channels", "form"), [(8, Form.PLANAR), (64, Form.INTERLEAVED)])
def test_a_tile_asks_for_an_image_as_its_convolution_reads_it(
    channels: int, form: Form, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, read = [], Source.read
    monkeypatch.setattr(Source, "read", lambda source, box, form: (asked.append(form), read(source, box, form))[1])
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, channels, 3, padding=1), torch.nn.Conv2d(channels, 1, 1))
    wg.backward(net, lambda y, target: y.square().mean(), torch.rand(3, ROWS, COLS), None, budget="8GiB")
    assert set(asked) == {form}


@pytest.mark.parametrize("scale", [False, True])
def test_an_image_is_read_in_the_form_that_is_asked_for(scale: bool) -> None:
    torch.manual_seed(0)
    pixels = torch.randint(256, (3, ROWS, COLS), dtype=torch.uint8)
    source = Source([as_reader(pixels.numpy())], torch.float32, scale)
    rows, cols = BOX.slices()
    expected = pixels[None, :, rows, cols].float() / (255 if scale else 1)
    for form, adjacent in ((Form.PLANAR, 3), (Form.INTERLEAVED, 1)):
        found = source.read(BOX, form)
        assert torch.equal(found, expected) and found.stride(adjacent) == 1
    if scale:
        found = source.read(BOX, Form.BYTES)
        assert found.dtype == torch.uint8 and torch.equal(found, pixels[None, :, rows, cols])
