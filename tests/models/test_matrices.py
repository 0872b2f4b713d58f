"""Which matrices may be in few bits, of what part each is, and which modules never are."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from edited_models import condense, edited
from families import tiny_model

from moe_lab.models.checkpoint import Checkpoint
from moe_lab.models.matrices import matrices_of


@pytest.mark.parametrize(("family", "experts", "dense", "attention"), [
    ("qwen2_moe", 3 * 8 * 3, 3 * 4, 4 * 4),  # a dense layer and three shared experts
    ("mixtral", 4 * 8 * 3, 0, 4 * 4),
    ("deepseek_v3", 3 * 8 * 3, 3 * 4, 4 * 4),
    ("gpt_oss", 4 * 2, 0, 4 * 4),  # all experts in one tensor
])  # fmt: skip
def test_each_matrix_is_of_one_part(
    family: str, experts: int, dense: int, attention: int, tmp_path: Path
) -> None:
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    found = matrices_of(Checkpoint(tmp_path))
    counts = Counter(one.part for one in found.every)
    assert counts == {"experts": experts} | ({"dense": dense} if dense else {}) | {
        "attention": attention
    }
    assert len(found.chosen("all")) == len(found.every)
    every = {one.key for one in found.every}
    routers = {key for key in found.rest if key.endswith((".gate.weight", "router.weight"))}
    assert routers and not every & routers
    assert all(key.removesuffix(".weight") in found.left for key in routers)
    assert any("embed_tokens" in key for key in found.rest)
    for one in found.every:
        assert one.stored.num_bytes == one.num_weights * 4
        assert one.load().shape == one.shape and f"layers.{one.layer}." in one.key


def test_a_matrix_knows_its_expert_and_what_its_inputs_are(tmp_path: Path) -> None:
    tiny_model("mixtral").save_pretrained(tmp_path)
    found = {one.key: one for one in matrices_of(Checkpoint(tmp_path)).every}
    up = next(
        one for key, one in found.items() if key.endswith("1.block_sparse_moe.experts.5.w3.weight")
    )
    down = next(one for key, one in found.items() if key.endswith("experts.5.w2.weight"))
    assert (up.expert, up.layer, up.of_units, up.width) == (5, 1, False, 32)
    assert (down.expert, down.of_units, down.width) == (5, True, 16)


def test_experts_in_one_tensor_are_turned_so_that_inputs_come_last(tmp_path: Path) -> None:
    model = tiny_model("gpt_oss")
    model.save_pretrained(tmp_path)
    (first, *_) = matrices_of(Checkpoint(tmp_path)).chosen("experts")
    stored = model.get_parameter(first.name)
    assert first.axis == -2 and first.expert is None
    assert torch.equal(first.load(), stored.mT)


def test_what_condensing_left_is_dense(tmp_path: Path) -> None:
    edited("qwen2_moe", [condense(1, [0, 2])], tmp_path / "one", padding=0.0)
    found = matrices_of(Checkpoint(tmp_path / "one" / "model"))
    here = {one.part for one in found.every if one.layer == 1}
    assert here == {"dense", "attention"}
