"""Our own form: read again to the bit by us, refused by stock transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from edited_models import condense, drop, edited, in_fresh_process, prune
from families import logits_of, tiny_batch, tiny_model
from safetensors.torch import load_file, save_file
from stand_ins import saved
from transformers import PreTrainedModel

from moe_lab.models.checkpoint import load
from moe_lab.models.edits.base import EDIT_KINDS
from moe_lab.models.edits.drop_block import DropBlock
from moe_lab.models.edits.plan import Plan, apply_plan
from moe_lab.models.layers import moe_layers
from moe_lab.models.routers import set_top_k
from moe_lab.models.saving import save_checkpoint
from moe_lab.types import UserError


def test_what_a_family_cannot_say_is_loaded_by_us_and_refused_loudly_by_stock(
    tmp_path: Path,
) -> None:
    cases = {
        "different_counts": ("qwen2_moe", [prune(1, [0, 1, 2, 3]), prune(2, [1, 2, 3, 4, 5])]),
        "no_dense_layers": ("mixtral", [condense(1, [0, 4])]),
        "not_a_prefix": ("deepseek_v3", [condense(2, [0, 4])]),
        "both": ("olmoe", [condense(0, [3]), prune(2, [0, 1, 2, 7])]),
        "gpt_oss": ("gpt_oss", [prune(0, [0, 1, 2, 7])]),
    }
    for name, (family, edits) in cases.items():
        assert not edited(family, edits, tmp_path / name), name
    folders = [tmp_path / name for name in cases]
    assert in_fresh_process("ours", folders) == dict.fromkeys(cases, 0.0)
    refused = in_fresh_process("stock", folders)
    for said in refused.values():
        assert str(said).startswith("refused: ") and "`moe_lab`" in str(said).splitlines()[0], said
    for name in cases:
        batch = load_file(tmp_path / name / "expected.safetensors")
        with torch.no_grad():
            inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
            logits = load(tmp_path / name / "model")(**inputs).logits
        assert torch.equal(logits, batch["logits"])


def narrowed(model: PreTrainedModel, widths: dict[int, int], top_k: dict[int, int]) -> None:
    """Cut experts to their first hidden units, and routers to fewer experts, layer by layer."""
    for layer in moe_layers(model):
        experts, index = layer.experts, layer.info.index
        for name, tensor in list(experts.named_parameters()):
            if index not in widths:
                break
            width, last = widths[index], name.startswith("down") != experts.is_transposed
            if name == "down_proj_bias":
                continue
            parts = tensor if last or "bias" in name else tensor.transpose(1, 2)
            if name.startswith("down"):
                parts = parts[..., :width]
            elif experts.is_concatenated:
                parts = torch.cat([half[..., :width] for half in parts.chunk(2, -1)], -1)
            else:  # gate and up take turns
                parts = parts[..., : 2 * width]
            parts = parts if last or "bias" in name else parts.transpose(1, 2)
            setattr(experts, name, torch.nn.Parameter(parts.contiguous()))
        for module in layer.block.modules():
            if index in top_k and hasattr(module, "top_k"):
                module.top_k = top_k[index]


@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral", "deepseek_v3", "gpt_oss"])
def test_widths_of_experts_and_numbers_of_choices_may_differ(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Another test's edit, which says in its own words that experts are narrower.
    monkeypatch.delitem(EDIT_KINDS, "narrow_experts", raising=False)
    model, batch = tiny_model(family), tiny_batch()
    model.save_pretrained(tmp_path / "source")
    plain, widths = (
        logits_of(model),
        {layer.info.index: layer.info.expert_width for layer in moe_layers(model)},
    )
    first, second, *_ = widths
    # transformers' grouped products take rows of 16 bytes and multiples of that
    narrowed(model, {first: 8, second: 12}, {second: 1})
    expected = logits_of(model)
    assert not torch.allclose(expected, plain, atol=1e-3)
    form = save_checkpoint(model, tmp_path / "x" / "model", tmp_path / "source")
    assert not form.stock and f"layers [{second}] choose 1 experts" in form.reason
    told = json.loads((tmp_path / "x" / "model" / "config.json").read_text())["moe_lab"]["layers"]
    assert told[str(first)] == {"num_experts": 8, "expert_width": 8}
    assert told[str(second)] == {"num_experts": 8, "expert_width": 12, "top_k": 1}
    again = load(tmp_path / "x" / "model")
    infos = {layer.info.index: layer.info for layer in moe_layers(again)}
    assert {i: info.expert_width for i, info in infos.items()} == widths | {first: 8, second: 12}
    assert infos[second].top_k == 1 and infos[first].top_k > 1
    assert torch.equal(logits_of(again), expected)
    save_file(batch | {"logits": expected}, tmp_path / "x" / "expected.safetensors")
    assert in_fresh_process("ours", [tmp_path / "x"]) == {"x": 0.0}
    assert "`moe_lab`" in str(in_fresh_process("stock", [tmp_path / "x"])["x"])


def test_what_was_dropped_is_compressed_again(tmp_path: Path) -> None:
    """Our own form is cut along with the config when blocks of such a model are dropped."""
    assert not edited("mixtral", [drop("drop_layer", 2)], tmp_path / "first")
    model = load(tmp_path / "first" / "model")
    assert [layer.info.index for layer in moe_layers(model)] == [0, 1, 3]
    apply_plan(model, Plan((DropBlock(1, "model.layers.1.mlp"),)))
    expected = logits_of(model)
    assert not save_checkpoint(model, tmp_path / "second", tmp_path / "first" / "model").stock
    again = load(tmp_path / "second")
    assert [layer.info.index for layer in moe_layers(again)] == [0, 2]
    assert torch.equal(logits_of(again), expected)


@pytest.mark.parametrize("family", ["gpt_oss", "qwen2_moe"])
def test_what_was_read_works_as_any_model(family: str, tmp_path: Path) -> None:
    made, _, _ = saved(family, tmp_path / "x")
    model, batch = load(tmp_path / "x" / "model"), tiny_batch()
    assert [one.info for one in moe_layers(model)] == [one.info for one in moe_layers(made)]
    prompt = tiny_batch(padding=False, batch=1)
    outputs = [
        model.generate(**prompt, max_new_tokens=8, do_sample=False, use_cache=cache)
        for cache in (True, False)
    ]
    assert torch.equal(*outputs)
    set_top_k(model, 1)
    assert not torch.equal(logits_of(model, batch), logits_of(made, batch))
    with pytest.raises(UserError, match="top_k=9"):
        set_top_k(model, 9)
    assert not save_checkpoint(model, tmp_path / "again", tmp_path / "x" / "model").stock
    assert torch.equal(logits_of(load(tmp_path / "again"), batch), logits_of(model, batch))
