"""Arrays, memmaps, raw and .npy files, tensors: the same pixels by box, and memmaps never mapped in."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from slide_helpers import picture, random_boxes
from wholegrad.errors import ShapeError, SlideError
from wholegrad.graph.geometry import Box
from wholegrad.slide.arrays import ArrayReader, Cropped, Padded, RawReader, as_reader, open_npy
from wholegrad.slide.reader import MapReader


def test_arrays_tensors_and_planes_become_readers() -> None:
    image = np.ascontiguousarray(picture(40, 60).transpose(2, 0, 1))
    for source in (image, torch.from_numpy(image), image.astype(np.float32)):
        reader = as_reader(source)
        assert isinstance(reader, MapReader)
        for box in random_boxes(image.shape, 20):
            assert np.array_equal(reader.read(box), image[(slice(None), *box.slices())])
    plane = as_reader(image[0])
    assert plane.shape == (1, 40, 60)
    assert np.array_equal(plane.read(Box(1, 9, 2, 30))[0], image[0, 1:9, 2:30])
    assert as_reader(plane) is plane


@pytest.mark.parametrize("wrong", [np.zeros((1, 3, 8, 8)), np.zeros(8), np.zeros((3, 0, 8)), "text"])
def test_other_ranks_and_things_are_refused(wrong: object) -> None:
    with pytest.raises(ShapeError):
        as_reader(wrong)


def test_memmaps_and_npy_files_are_read_by_position(tmp_path: Path) -> None:
    image = np.random.default_rng(0).normal(size=(3, 50, 70)).astype(np.float32)
    np.save(tmp_path / "a.npy", image)
    (tmp_path / "a.raw").write_bytes(b"head" + image.tobytes())
    readers = [
        as_reader(np.load(tmp_path / "a.npy", mmap_mode="r")),
        as_reader(np.memmap(tmp_path / "a.raw", np.float32, "r", 4, (3, 50, 70))),
        open_npy(tmp_path / "a.npy"),
        RawReader(tmp_path / "a.raw", (3, 50, 70), np.float32, 4),
    ]
    for reader in readers:
        assert isinstance(reader, RawReader)
        for box in random_boxes(image.shape, 20):
            assert np.array_equal(reader.read(box), image[(slice(None), *box.slices())])


def test_views_and_private_maps_fall_back_to_indexing(tmp_path: Path) -> None:
    image = np.arange(3 * 50 * 70, dtype=np.uint16).reshape(3, 50, 70)
    np.save(tmp_path / "a.npy", image)
    whole = np.load(tmp_path / "a.npy", mmap_mode="r")
    private = np.load(tmp_path / "a.npy", mmap_mode="c")
    private[0, 0, 0] = 7
    for view in (whole[1:], whole[:, 3:40, ::2], whole[0], whole.transpose(0, 2, 1), private):
        reader = as_reader(view)
        assert isinstance(reader, ArrayReader)
        expected = np.asarray(view).reshape(reader.shape)
        for box in random_boxes(reader.shape, 10):
            assert np.array_equal(reader.read(box), expected[(slice(None), *box.slices())])


def test_writable_memmap_is_flushed_first(tmp_path: Path) -> None:
    array = np.memmap(tmp_path / "a.raw", np.uint8, "w+", shape=(1, 20, 30))
    array[:] = 5
    reader = as_reader(array)
    assert isinstance(reader, RawReader)
    assert (reader.read(Box(0, 20, 0, 30)) == 5).all()


def test_buffer_is_used_again(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((3, 64, 64), np.uint8))
    reader = open_npy(tmp_path / "a.npy")
    first = reader.read(Box(0, 32, 0, 32))
    assert np.shares_memory(first, reader.read(Box(0, 16, 5, 37)))


MEASURE = """
import sys, numpy as np, psutil
from wholegrad.graph.geometry import Box
from wholegrad.slide.arrays import as_reader
reader = as_reader(np.load(sys.argv[1], mmap_mode="r"))
reader.read(Box(0, 100, 0, 1500))  # code that reads rows is loaded once
before = psutil.Process().memory_info().rss
total = 0
for y in range(0, reader.shape[1], 100):
    for x in (0, 1500):
        total += int(reader.read(Box(y, y + 100, x, x + 1500)).sum())
print(total, psutil.Process().memory_info().rss - before)
"""


def test_reading_a_memmap_does_not_map_it_in(tmp_path: Path) -> None:
    image = np.full((3, 20000, 3000), 3, np.uint8)  # 180 MB
    np.save(tmp_path / "a.npy", image)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "a.npy")], capture_output=True, text=True, check=True
    )
    total, grown = map(int, done.stdout.split())
    assert total == 3 * image.size
    assert grown < 8 << 20


def test_wrong_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "short.raw").write_bytes(bytes(99))
    with pytest.raises(SlideError, match="has 99 bytes, an array of"):
        RawReader(tmp_path / "short.raw", (1, 10, 10), np.uint8)
    with pytest.raises(SlideError, match=r"is not a \.npy file"):
        open_npy(tmp_path / "short.raw")
    with pytest.raises(SlideError, match="cannot be opened"):
        open_npy(tmp_path / "none.npy")
    np.save(tmp_path / "f.npy", np.asfortranarray(np.zeros((3, 4, 5))))
    with pytest.raises(SlideError, match="Fortran"):
        open_npy(tmp_path / "f.npy")


def test_cropped_and_padded_move_the_view() -> None:
    image = np.ascontiguousarray(picture(40, 60).transpose(2, 0, 1))
    cropped = Cropped(as_reader(image), Box(5, 35, 10, 50))
    padded = Padded(cropped, 64, 48, 255)
    expected = np.full((3, 64, 48), 255, np.uint8)
    expected[:, :30, :40] = image[:, 5:35, 10:50]
    assert padded.shape == (3, 64, 48)
    for box in random_boxes(padded.shape, 60):
        assert np.array_equal(padded.read(box), expected[(slice(None), *box.slices())]), box
    with pytest.raises(ShapeError, match="is empty or not within"):
        cropped.read(Box(0, 31, 0, 40))
    with pytest.raises(ShapeError, match="cannot be padded"):
        Padded(cropped, 29, 48)
