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
