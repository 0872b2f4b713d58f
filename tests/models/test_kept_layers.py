"""What was found of a layer comes back as it was, or not at all."""

from __future__ import annotations

from pathlib import Path

import damages
import pytest
import torch

from moe_lab.models.kept_layers import KeptLayers

TENSORS = {"a.weight": torch.arange(12.0).view(3, 4), "b": torch.tensor([7], dtype=torch.uint8)}


def kept(folder: Path) -> KeptLayers:
    layers = KeptLayers(folder)
    layers.keep(3, TENSORS, [2, 5])
    layers.keep(4, {"c": torch.ones(2)}, None)
    return layers


def test_what_is_kept_comes_back_in_another_attempt(tmp_path: Path) -> None:
    kept(tmp_path / "layers")
    later = KeptLayers(tmp_path / "layers")
    found = later.read(3)
    assert found is not None and found[1] == [2, 5] and found[0].keys() == TENSORS.keys()
    assert all(torch.equal(found[0][name], one) for name, one in TENSORS.items())
    assert later.read(2) is None
    later.remove()
    assert not (tmp_path / "layers").exists() and later.read(3) is None
    later.remove()


@pytest.mark.parametrize("damage", [damages.truncated, damages.flipped, damages.emptied])
@pytest.mark.parametrize("name", ["003.safetensors", "003.json"])
def test_what_has_changed_since_is_not_given_back(name: str, damage, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    layers = kept(tmp_path)
    before = (tmp_path / name).read_bytes()
    for where in range(0, 8 * len(before), 37):
        (tmp_path / name).write_bytes(damage(before, where))
        assert layers.read(3) is None or (tmp_path / name).read_bytes() == before
    (tmp_path / name).write_bytes(before)
    assert layers.read(3) is not None
    (tmp_path / name).write_bytes((tmp_path / name.replace("3", "4")).read_bytes())
    assert layers.read(3) is None
    (tmp_path / name).unlink()
    assert layers.read(3) is None and layers.read(4) is not None


def test_nothing_is_kept_where_nothing_is_dear(tmp_path: Path) -> None:
    layers = KeptLayers(None)
    layers.keep(3, TENSORS, None)
    assert layers.read(3) is None and not list(tmp_path.iterdir())
    layers.remove()
