"""MTP layers in a checkpoint's files: which tensors they are, and which of their experts stay."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import tiny_model
from mtp_checkpoints import CHANGES, WITH_EXPERTS, write_with_mtp
from safetensors.torch import load_file, save_file

from moe_lab.models.checkpoint import Checkpoint
from moe_lab.models.mtp import (
    MtpLayers,
    decoder_lists,
    experts_left,
    find_mtp,
    kept_experts,
    untaken_tensors,
)
from moe_lab.models.weight_files import weight_files
from moe_lab.types import UserError


def found(folder: Path) -> MtpLayers:
    return find_mtp(Checkpoint(folder).config, weight_files(folder))


@pytest.mark.parametrize("family", CHANGES)
def test_they_are_found_by_their_place(family: str, tmp_path: Path) -> None:
    made = write_with_mtp(family, tmp_path, shards=True)
    mtp = found(tmp_path)
    assert mtp.files.keys() == made.keys()
    assert mtp.shapes == {name: tuple(tensor.shape) for name, tensor in made.items()}
    assert list(mtp.num_experts.values()) == ([8] if family in WITH_EXPERTS else [])
    checkpoint, files = Checkpoint(tmp_path), weight_files(tmp_path)
    assert untaken_tensors(checkpoint.load(), files) == untaken_tensors(checkpoint.config, files)


def test_other_tensors_that_no_model_takes_are_told_and_no_mtp_layers(tmp_path: Path) -> None:
    made = write_with_mtp("glm4_moe", tmp_path)
    file = tmp_path / "model.safetensors"
    others = {f"visual.blocks.{number}.weight": torch.ones(2) for number in range(7)}
    others["model.layers.1.mlp.experts.9.bias_of_its_own"] = torch.ones(2)
    beside = {
        "model.layers.0.self_attn.q_proj.weight_scale_inv": torch.ones(1),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
    }
    save_file(load_file(file) | others | beside, file, metadata={"format": "pt"})
    config = Checkpoint(tmp_path).config
    assert set(untaken_tensors(config, [file])) == others.keys() | made.keys()
    assert found(tmp_path).files.keys() == made.keys()


def test_the_list_of_decoder_layers_is_the_one_with_all_their_numbers() -> None:
    taken = [f"model.layers.{i}.mlp.experts.{e}.up.weight" for i in range(3) for e in range(5)]
    taken += [f"visual.blocks.{i}.mlp.up.weight" for i in range(4)] + ["head.layers.0.norm.weight"]
    assert decoder_lists(taken, 3) == ("model.layers",)


def test_a_checkpoint_without_any_has_none(tmp_path: Path) -> None:
    for family in ("qwen2_moe", "deepseek_v3", "gpt_oss"):
        tiny_model(family).save_pretrained(tmp_path / family)
        mtp = found(tmp_path / family)
        assert not mtp.files and not mtp.num_experts
        files = weight_files(tmp_path / family)
        assert untaken_tensors(Checkpoint(tmp_path / family).config, files) == []


def layers(tmp_path: Path, router: torch.Tensor, groups: int = 1) -> MtpLayers:
    """One block `b` with a router and its bias, and as many experts as the router has rows."""
    tensors = {"b.experts.up_proj": torch.zeros(len(router), 2, 2), "b.gate.weight": router}
    tensors |= {
        "b.shared_experts.up_proj.weight": torch.ones_like(router) * 9,
        "b.bias": torch.ones(2),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return MtpLayers(dict.fromkeys(tensors, tmp_path / "x.safetensors"), shapes, (), 4, groups)


def test_experts_with_the_longest_router_rows_stay(tmp_path: Path) -> None:
    router = torch.tensor([[3.0, 4.0], [0.0, 6.0], [-9.0, 0.0], [1.0, 1.0], [0.0, 7.0], [5.0, 0.0]])
    # Lengths 5, 6, 9, 1.4, 7, 5: of 0 and 5, equally long, the first one stays.
    mtp = layers(tmp_path, router)
    assert mtp.num_experts == {"b": 6}
    assert kept_experts(mtp, "b", 3) == [1, 2, 4]
    assert kept_experts(mtp, "b", 4) == [0, 1, 2, 4]
    grouped = layers(tmp_path, router, groups=2)
    assert kept_experts(grouped, "b", 4) == [1, 2, 4, 5], "two of the first three, two of the last"


def test_without_a_router_they_are_not_pruned(tmp_path: Path) -> None:
    mtp = layers(tmp_path, torch.ones(6, 2))
    bare = MtpLayers(mtp.files, {"b.experts.up_proj": (6, 2, 2)}, (), 4)
    with pytest.raises(UserError, match=r"router was not found.*method.mtp=drop"):
        kept_experts(bare, "b", 3)


def test_experts_that_are_missing_are_noticed() -> None:
    shapes = {f"mtp.layers.0.mlp.experts.{number}.w1.weight": (2, 2) for number in (0, 1, 3)}
    with pytest.raises(UserError, match=r"mtp\.layers\.0\.mlp.*not numbered from 0 to 2"):
        _ = MtpLayers({}, shapes, (), 4).num_experts


def test_as_many_stay_as_in_all_other_layers(tmp_path: Path) -> None:
    mtp = layers(tmp_path, torch.ones(6, 2))
    for stock in (True, False):
        assert experts_left(mtp, [4, 4], stock, "prune") == {"b": 4}
        assert experts_left(mtp, [6], stock, "keep") == {} == experts_left(mtp, [], stock, "keep")
        assert experts_left(mtp, [6], stock, "prune") == {} == experts_left(mtp, [4], stock, "drop")
    assert experts_left(mtp, [3, 4], False, "prune") == {} == experts_left(mtp, [4], False, "keep")
    with pytest.raises(UserError, match=r"6 experts.*have 4: .*mtp=prune"):
        experts_left(mtp, [4], True, "keep")
