"""MTP layers beside narrower experts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from mtp_checkpoints import DECODERS, WITH_EXPERTS, stored, write_with_mtp
from narrowing import UNEVEN, narrow_plan
from safetensors.torch import load_file, save_file

from moe_lab.models.checkpoint import Checkpoint, load
from moe_lab.models.edits.plan import apply_plan
from moe_lab.models.layers import moe_layers
from moe_lab.models.mtp import find_mtp
from moe_lab.models.mtp_saving import foresee_mtp
from moe_lab.models.mtp_widths import Narrowed, cut_units, kept_units, units_left
from moe_lab.models.saving import save_checkpoint
from moe_lab.models.weight_files import weight_files
from moe_lab.types import UserError

PARTS = ("gate_proj", "up_proj", "down_proj")


def longest(made: dict, path: str, number: int) -> list[int]:
    """By hand: the hidden units with the longest weights, of all three projections together."""
    gate, up, down = (made[f"{path}.{part}.weight"].double() for part in PARTS)
    length = (gate**2).sum(1) + (up**2).sum(1) + (down**2).sum(0)
    return sorted(sorted(range(len(length)), key=lambda unit: -length[unit])[:number])


@pytest.mark.parametrize("family", WITH_EXPERTS)
def test_their_experts_keep_the_units_with_the_longest_weights(family: str, tmp_path: Path) -> None:
    made = write_with_mtp(family, tmp_path / "source")
    model = load(tmp_path / "source")
    apply_plan(model, narrow_plan(model, (8,) * 8))
    form = save_checkpoint(model, tmp_path / "made", tmp_path / "source", 0.0)
    assert form.stock and "their experts narrowed from 16 to 8 hidden units" in form.mtp
    read, path = stored(tmp_path / "made"), f"{DECODERS[family]}mlp.experts"
    for expert in range(8):
        kept = longest(made, f"{path}.{expert}", 8)
        for part in PARTS:
            whole = made[f"{path}.{expert}.{part}.weight"]
            cut = whole[:, kept] if part == "down_proj" else whole[kept]
            assert torch.equal(read[f"{path}.{expert}.{part}.weight"], cut)
    others = [name for name in made if ".mlp.experts." not in name]
    assert others and all(torch.equal(read[name], made[name]) for name in others)


def test_shared_experts_are_as_wide_as_the_config_has_them(tmp_path: Path) -> None:
    made = write_with_mtp("deepseek_v3", tmp_path / "source")
    model = load(tmp_path / "source")
    apply_plan(model, narrow_plan(model, (12,) * 8))  # shared ones, 16 wide, become 24
    form = save_checkpoint(model, tmp_path / "made", tmp_path / "source", 1.0)
    assert form.stock and "filled up with zeros from 16 to 24" in form.mtp
    read, path = stored(tmp_path / "made"), f"{DECODERS['deepseek_v3']}mlp.shared_experts"
    assert read[f"{path}.up_proj.weight"].shape == (24, 32)
    assert torch.equal(read[f"{path}.up_proj.weight"][:16], made[f"{path}.up_proj.weight"])
    assert not read[f"{path}.down_proj.weight"][:, 16:].any()
    again = write_with_mtp("deepseek_v3", tmp_path / "other")
    model = load(tmp_path / "other")
    apply_plan(model, narrow_plan(model, (12,) * 8, shared=12))
    form = save_checkpoint(model, tmp_path / "less", tmp_path / "other", 0.0)
    assert form.stock and "shared experts narrowed from 16 to 12" in form.mtp
    kept = longest(again, path, 12)
    read = stored(tmp_path / "less")
    assert torch.equal(read[f"{path}.gate_proj.weight"], again[f"{path}.gate_proj.weight"][kept])


def test_beside_experts_of_different_widths_they_stay_whole(tmp_path: Path) -> None:
    made = write_with_mtp("qwen3_next", tmp_path / "source")
    model = load(tmp_path / "source")
    apply_plan(model, narrow_plan(model, UNEVEN))
    form = save_checkpoint(model, tmp_path / "made", tmp_path / "source", 0.0)
    read = stored(tmp_path / "made")
    assert not form.stock and all(torch.equal(read[name], one) for name, one in made.items())
    config = json.loads((tmp_path / "made" / "config.json").read_text())["moe_lab"]["config"]
    assert config["moe_intermediate_size"] == 16, "of the MTP layers too"


def test_left_whole_beside_narrower_ones_is_refused_before_any_work(tmp_path: Path) -> None:
    write_with_mtp("glm4_moe", tmp_path)
    checkpoint, model = Checkpoint(tmp_path), load(tmp_path)
    edits = narrow_plan(model, (8,) * 8).edits
    with pytest.raises(UserError, match=r"experts 16 hidden units wide .* have 8"):
        foresee_mtp(checkpoint, edits, "keep")
    foresee_mtp(checkpoint, edits, "prune")
    foresee_mtp(checkpoint, narrow_plan(model, UNEVEN).edits, "keep")  # in our own form


def test_fused_tensors_are_cut_in_both_halves(tmp_path: Path) -> None:
    made = write_with_mtp("qwen3_next", tmp_path)
    path, tensors = (
        f"{DECODERS['qwen3_next']}mlp.experts",
        load_file(tmp_path / "model.safetensors"),
    )
    gate, up, down = (
        torch.stack([made[f"{path}.{expert}.{part}.weight"] for expert in range(8)])
        for part in PARTS
    )
    rest = {name: one for name, one in tensors.items() if not name.startswith(path)}
    fused = {f"{path}.gate_up_proj": torch.cat([gate, up], dim=1), f"{path}.down_proj": down}
    save_file(rest | fused, tmp_path / "model.safetensors", {"format": "pt"})
    mtp, left = find_mtp(Checkpoint(tmp_path).config, weight_files(tmp_path)), Narrowed((16, 8))
    kept = kept_units(mtp, left, lambda name: fused[name])
    name = f"{path}.gate_up_proj"
    cut = cut_units(mtp, name, fused[name], left, kept)
    for expert in range(8):
        units = longest(made, f"{path}.{expert}", 8)
        assert kept[path.removesuffix(".experts"), expert].tolist() == units
        assert torch.equal(cut[expert], torch.cat([gate[expert][units], up[expert][units]]))


def test_tensors_that_do_not_say_where_their_units_are_are_refused(tmp_path: Path) -> None:
    write_with_mtp("qwen3_next", tmp_path)
    mtp = find_mtp(Checkpoint(tmp_path).config, weight_files(tmp_path))
    with pytest.raises(UserError, match=r"not known where the hidden units .* method\.mtp=drop"):
        kept_units(mtp, Narrowed((17, 8)), lambda name: torch.zeros(mtp.shapes[name]))


def test_nothing_changes_where_nothing_is_narrower(tmp_path: Path) -> None:
    write_with_mtp("qwen3_next", tmp_path)
    mtp = find_mtp(Checkpoint(tmp_path).config, weight_files(tmp_path))
    model = load(tmp_path)
    assert not units_left(mtp, model, model, True, "keep")
    assert moe_layers(model)[0].info.expert_width == 16
