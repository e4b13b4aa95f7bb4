"""Weights and checkpoints: they come back as they went, say what they are, and never appear by halves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from wholegrad.errors import ConfigError, WholegradError
from wholegrad.nets import unet4492
from wholegrad.train.optim import Mover
from wholegrad.train.state import (
    Card,
    load_checkpoint,
    load_model,
    read_card,
    save_checkpoint,
    save_weights,
    versions,
    write_whole,
)
from wholegrad.train.tables import TrainConfig


def card(network: str = "unet4492", step: int = 7) -> Card:
    return Card(network, {}, 4492, step, {"a": 0.9, "mean": 0.9}, {"data": {"mpp": 2.0}}, versions())


SETTINGS = TrainConfig(steps=10, ema=0.9)


def stepped(seed: int) -> tuple[nn.Module, Mover]:
    model = unet4492(seed=seed)
    mover = Mover(model, SETTINGS, 10)
    for _ in range(2):
        model(torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(seed))).square().mean().backward()
        mover.add()
        mover.move()
    return model, mover


def same(first: nn.Module, second: nn.Module) -> bool:
    pairs = zip(first.state_dict().items(), second.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


def test_weights_come_back_with_their_card(tmp_path: Path) -> None:
    model, _ = stepped(0)
    save_weights(tmp_path / "weights.safetensors", model, card())
    loaded = load_model(tmp_path)
    assert same(model, loaded)
    assert not loaded.training
    assert read_card(tmp_path) == card()
    assert json.loads((tmp_path / "weights.json").read_text())["parameters"] == 4492


def test_a_checkpoint_continues_to_the_same_bits(tmp_path: Path) -> None:
    model, mover = stepped(1)
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, model, mover, card(step=2), {"note": "x"})
    other = unet4492(seed=9)
    other_mover = Mover(other, SETTINGS, 10)
    loaded, state = load_checkpoint(path, other, other_mover)
    assert (loaded.step, state["note"]) == (2, "x")
    for net, each in ((model, mover), (other, other_mover)):
        net(torch.ones(1, 3, 16, 16)).square().mean().backward()
        each.add()
        each.move()
    assert same(model, other)
    assert same(load_model(path), load_model(tmp_path))
    save_checkpoint(path, model, mover, card(), {})
    mover.swap()  # averaged weights are what a checkpoint gives for predictions
    other_mover.swap()
    assert same(model, other) and same(load_model(path), model)


def test_a_file_does_not_choose_what_code_is_imported(tmp_path: Path) -> None:
    model = nn.Linear(2, 1)
    save_weights(tmp_path / "w.safetensors", model, card("evil:run"))
    with pytest.raises(ConfigError, match="holds weights of evil:run; name that network yourself"):
        load_model(tmp_path / "w.safetensors")
    assert same(model, load_model(tmp_path / "w.safetensors", nn.Linear(2, 1)))


def test_weights_of_another_network(tmp_path: Path) -> None:
    save_weights(tmp_path / "w.safetensors", unet4492(), card())
    with pytest.raises(ConfigError, match=r"bias is absent and the network has \(1,\); load it into"):
        load_model(tmp_path / "w.safetensors", nn.Linear(2, 1))


@pytest.mark.parametrize("content", [b"", b"not safetensors at all", b"\x02\0\0\0\0\0\0\0{}"])
def test_a_file_that_is_something_else(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="is not a weights file of wholegrad"):
        load_model(path)


def test_a_truncated_file(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_weights(path, unet4492(), card())
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ConfigError, match="is not a weights file of wholegrad"):
        load_model(path)


def test_a_missing_file_and_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file; check the path"):
        load_model(tmp_path / "none.safetensors")
    with pytest.raises(ConfigError, match="holds neither weights nor a checkpoint"):
        load_model(tmp_path)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "f"
    write_whole(path, b"old")

    def full(_handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("wholegrad.train.state.os.fsync", full)
    with pytest.raises(WholegradError, match=r"cannot be written \(No space left on device\)"):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
