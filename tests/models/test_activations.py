"""Tensors in memory up to a limit and on disk beyond it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moe_lab.models.activations import Activations
from moe_lab.types import UserError


def test_activations_keep_to_their_limit(tmp_path: Path) -> None:
    one = torch.arange(10.0)
    cache = Activations(limit=2 * one.nbytes, folder=tmp_path)
    for number in range(5):
        cache["state", number] = one + number
    assert cache.held == 2 * one.nbytes
    assert cache.spilled == 3 * one.nbytes
    assert all(torch.equal(cache["state", number], one + number) for number in range(5))
    assert len(list(tmp_path.glob("activations_*/*"))) == 3
    cache["state", 4] = one.bfloat16()
    assert cache["state", 4].dtype == torch.bfloat16
    for number in range(5):
        cache.pop(("state", number))
    assert cache.held == 0
    assert not list(tmp_path.glob("activations_*/*"))
    with pytest.raises(KeyError):
        cache["state", 0]


def test_what_is_needed_is_said_before(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = Activations(limit=2**30, folder=tmp_path)
    with caplog.at_level("INFO"):
        cache.announce({"states": 3 * 2**30})
    assert "states up to 3.00 GiB; 2.00 GiB of it in files under" in caplog.text
    with pytest.raises(UserError, match=r"are free: ask for fewer"):
        cache.announce({"states": 2**60})


def test_the_device_is_filled_first(tmp_path: Path) -> None:
    one = torch.arange(10.0)
    cache = Activations(one.nbytes, tmp_path, device_limit=2 * one.nbytes)
    for number in range(4):
        cache["state", number] = one + number
    assert (cache.on_device, cache.held, cache.spilled) == (80, 40, 40)
    assert all(torch.equal(cache["state", number], one + number) for number in range(4))
    cache["state", 0] = one - 1  # what took its place on the device gives it back
    assert (cache.on_device, cache.held, cache.spilled) == (80, 40, 40)
    cache.pop(("state", 1))
    assert cache.on_device == 40 and torch.equal(cache["state", 0], one - 1)


def test_a_tensor_is_written_and_read_wherever_it_lies(tmp_path: Path) -> None:
    one = torch.arange(10.0)
    cache = Activations(one.nbytes, tmp_path, device_limit=one.nbytes)
    other = Activations(limit=2**20)
    for number in range(3):
        cache["state", number] = one.bfloat16() if number == 1 else one + number
        file = tmp_path / str(number)
        cache.write(("state", number), file)
        cache["state", number] = one * 0  # the file is another's now
        other.read(number, file)
        assert torch.equal(other[number].float(), one + (number if number != 1 else 0))
    assert other[1].dtype == torch.bfloat16
