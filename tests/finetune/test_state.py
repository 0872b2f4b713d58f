"""A training's state: as it was written, or refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moe_lab.finetune.state import read_state, write_state


def state() -> dict[str, torch.Tensor]:
    return {
        "done": torch.tensor(4),
        "a.weight": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).T,
        "b": torch.ones(7, dtype=torch.bfloat16),
        "empty": torch.zeros(0, 2),
    }


def test_round_trip(tmp_path: Path) -> None:
    write_state(state(), tmp_path / "state")
    again = read_state(tmp_path / "state")
    assert again.keys() == state().keys()
    assert all(torch.equal(again[name], value) for name, value in state().items())
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


def test_every_flipped_byte_and_every_cut_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state"
    write_state(state(), path)
    whole = path.read_bytes()
    refused = 0
    for place in range(0, len(whole), 3):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << place % 8
        for torn in (bytes(flipped), whole[:place]):
            path.write_bytes(torn)
            try:
                again = read_state(path)
            except ValueError:
                refused += 1
                continue
            # What the format itself calls padding may change.
            assert all(torch.equal(again[name], value) for name, value in state().items())
    assert refused > len(whole) // 3 + 100


@pytest.mark.parametrize("content", [b"", b"not a state", b"{}" * 100])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "state").write_bytes(content)
    with pytest.raises(ValueError):
        read_state(tmp_path / "state")
