"""What can go wrong in the middle of a run: one line that names it, and a run that goes on or stops as configured."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from wholegrad.errors import ConfigError, SlideError, WholegradError
from wholegrad.train.config import Config, check_config
from wholegrad.train.events import Skip, Step, Watch
from wholegrad.train.loop import train
from wholegrad.train.state import load_model, read_card


@pytest.fixture
def slides(tmp_path: Path, write_case: Callable[..., None]) -> Path:
    for seed, name in enumerate("abc"):
        write_case(tmp_path, name, size=(400, 448), seed=seed)
    return tmp_path


def configure(folder: Path, out: str = "out", **settings: Any) -> Config:
    data = {"train": ["a", "b"], "test": ["c"], **settings.pop("data", {})}
    more = {key: settings.pop(key) for key in ("validation", "augment", "network") if key in settings}
    given = {"steps": 6, "panels": False, "out": out, "budget": "2GiB", **settings}
    return check_config({"data": data, "train": given, **more}, "test", folder)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def corrupt_tile(slide: Path, row: int, column: int, across: int) -> None:
    """Rewrite a slide with JPEG tiles, one of them overwritten with what is no JPEG."""
    pixels = tifffile.imread(slide)
    tifffile.imwrite(slide, pixels, tile=(64, 64), photometric="rgb", compression="jpeg")
    with tifffile.TiffFile(slide) as file:
        page = file.pages[0]
        offset, count = page.dataoffsets[row * across + column], page.databytecounts[row * across + column]
    with slide.open("r+b") as file:
        file.seek(offset)
        file.write(b"\0" * count)


def test_a_corrupt_tile_stops_the_run_and_is_named(slides: Path) -> None:
    corrupt_tile(slides / "slides/b.tif", row=1, column=0, across=7)  # the middle, which is tried before, is good
    with pytest.raises(SlideError) as error:
        train(configure(slides))
    said = str(error.value)
    assert "b.tif: tile row 1, column 0 of level 0 is corrupt" in said and "\n" not in said
    taken = read_card(slides / "out/checkpoint.safetensors").step
    assert taken == len(lines(slides / "out/log.jsonl")) <= 1


def test_or_is_skipped_where_the_configuration_says_so(slides: Path) -> None:
    corrupt_tile(slides / "slides/b.tif", row=1, column=0, across=7)
    skips: list[Skip] = []
    config = configure(slides, on_error="skip", accumulate=2, checkpoint_minutes=0)
    outcome = train(config, Watch(on_skip=skips.append))
    log = lines(slides / "out/log.jsonl")
    assert [line["step"] for line in log] == list(range(6))
    assert [line["kind"] for line in log].count("skip") == 3 == len(skips)
    assert all(line["slide"] == "b" and "tile row 1, column 0" in line["reason"] for line in log if "reason" in line)
    assert len(outcome.scores) == 1
    whole = load_model(outcome.weights).state_dict()

    def stop(step: Step) -> None:
        if step.step >= 2:
            raise KeyboardInterrupt

    config = configure(slides, out="broken", on_error="skip", accumulate=2, checkpoint_minutes=0)
    assert train(config, Watch(on_step=stop)).interrupted
    broken = load_model(train(config, resume=True).weights).state_dict()
    assert all((whole[name] == broken[name]).all() for name in whole)


@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_a_slide_removed_in_the_middle(slides: Path, on_error: str) -> None:
    def remove(step: Step) -> None:
        (slides / "slides/a.tif").unlink(missing_ok=True)

    config = configure(slides, on_error=on_error)
    if on_error == "stop":
        with pytest.raises(SlideError, match=r"a\.tif: cannot be opened \(no such file or directory\); check the path"):
            train(config, Watch(on_step=remove))
        assert read_card(slides / "out/checkpoint.safetensors").step == len(lines(slides / "out/log.jsonl")) >= 1
        return
    train(config, Watch(on_step=remove))
    kinds = [(line["kind"], line["slide"]) for line in lines(slides / "out/log.jsonl")]
    assert ("skip", "a") in kinds[1:] and ("step", "b") in kinds
    notes: list[str] = []
    more = configure(slides, on_error="skip", steps=8)
    train(more, Watch(on_note=notes.append), resume=True)  # which finds it gone at its start
    assert any(note.startswith("a is skipped: ") for note in notes)
    assert [line["step"] for line in lines(slides / "out/log.jsonl")] == list(range(8))


def test_a_run_without_a_single_good_slide_does_not_start(slides: Path) -> None:
    for name in "ab":
        (slides / "slides" / f"{name}.tif").write_bytes(b"no slide")
    with pytest.raises(SlideError):
        train(configure(slides, on_error="skip"))
    assert not (slides / "out").exists()


def test_a_folder_that_cannot_be_written_to_is_refused_before_any_slide_is_read(slides: Path) -> None:
    (slides / "file").write_text("")
    (slides / "slides/a.tif").write_bytes(b"nothing that is read")
    with pytest.raises(ConfigError, match=r"file: is not a folder; choose another --out, or change its rights"):
        train(configure(slides, out="file/out"))


def test_a_full_disk_leaves_the_last_checkpoint(slides: Path) -> None:
    """A real limit: no file may grow beyond some bytes, as if the disk were full."""
    out = slides / "out"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(step: Step) -> None:
        if step.step == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))

    config = configure(slides, checkpoint_minutes=0)
    try:
        with pytest.raises(WholegradError, match=r"checkpoint\.safetensors: cannot be written \(File too large\)"):
            train(config, Watch(on_step=fill))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert read_card(out / "checkpoint.safetensors").step == 2
    assert not list(out.glob(".*"))
    train(config, resume=True)
    assert [line["step"] for line in lines(out / "log.jsonl")] == list(range(6))


def test_a_full_disk_while_the_log_is_written(slides: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(step: Step) -> None:
        if step.step == 2:
            size = (slides / "out/log.jsonl").stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, before[1]))

    config = configure(slides)
    try:
        with pytest.raises(WholegradError, match=r"log\.jsonl: cannot be written \(File too large\); check space"):
            train(config, Watch(on_step=fill))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    train(config, resume=True)
    assert [line["step"] for line in lines(slides / "out/log.jsonl")] == list(range(6))


def test_validation_needs_slides(slides: Path) -> None:
    with pytest.raises(ConfigError, match=r"has an interval but no slides; give data\.val or data\.split\.val"):
        train(configure(slides, validation={"steps": 2}))


def test_validation_chooses_and_stops(slides: Path) -> None:
    config = configure(
        slides, steps=40, lr=1e-6, ema=0.5, data={"val": ["c"], "test": []}, validation={"steps": 2, "patience": 2}
    )
    config = config.model_copy(update={"validation": config.validation.model_copy(update={"delta": 0.5})})
    outcome = train(config)
    judged = [line for line in lines(slides / "out/log.jsonl") if line["kind"] == "validation"]
    assert [line["best"] for line in judged] == [True, False, False]
    assert outcome.steps == 6
    assert read_card(outcome.weights).step == 2
    best, last = (load_model(slides / "out" / f"{name}.safetensors") for name in ("best", "checkpoint"))
    used = load_model(outcome.weights)
    assert all((a == b).all() for a, b in zip(used.parameters(), best.parameters(), strict=True))
    assert any((a != b).any() for a, b in zip(best.parameters(), last.parameters(), strict=True))


def test_a_normalised_network_is_so_wherever_it_is_loaded(slides: Path) -> None:
    import wholegrad as wg

    config = configure(slides, steps=2, network={"mean": [0.6, 0.5, 0.6], "std": [0.2, 0.3, 0.2]}, data={"test": []})
    model = load_model(train(config).weights)
    pixels = np.full((3, 64, 64), 153, np.uint8)
    logits = wg.predict(model, pixels, kind="logits")
    plain = load_model(slides / "out").network  # type: ignore[union-attr]
    mean, std = (np.array(v, np.float32)[:, None, None] for v in ([0.6, 0.5, 0.6], [0.2, 0.3, 0.2]))
    expected = wg.predict(plain, (pixels / np.float32(255) - mean) / std, kind="logits")
    assert logits is not None and expected is not None
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)


def test_every_change_at_once_trains(slides: Path) -> None:
    augment = {"flip": True, "turn": True, "stain": 0.1, "stain_shift": 0.05, "contrast": 0.1, "blur": 1.0}
    config = configure(slides, steps=8, lr=0.02, augment=augment, data={"crop": [500, 300], "pad": True})
    train(config)
    log = lines(slides / "out/log.jsonl")
    assert log[-1]["loss"] < log[0]["loss"]
