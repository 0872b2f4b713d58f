"""In which words a family's config says the width of experts and of shared experts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from edited_models import in_fresh_process
from families import FAMILIES, logits_of, tiny_batch, tiny_model
from narrowing import narrow_plan
from odd_families import ADAPTED, odd_model
from safetensors.torch import save_file

from moe_lab.models.checkpoint import load, meta_model
from moe_lab.models.edits.plan import apply_plan, restructure_model
from moe_lab.models.forms import choose_form
from moe_lab.models.layers import moe_layers
from moe_lab.models.native_widths import config_with_widths
from moe_lab.models.opening import text_config
from moe_lab.models.saving import save_checkpoint

FIELDS = {
    "mixtral": ("intermediate_size",), "qwen3_moe": ("moe_intermediate_size",),
    "gpt_oss": ("intermediate_size",), "dbrx": ("ffn_config", "ffn_hidden_size"),
    "longcat_flash": ("expert_ffn_hidden_size",), "jetmoe": ("intermediate_size",),
    "step3p7": ("text_config", "moe_intermediate_size"),
}  # fmt: skip


def model_of(family: str) -> torch.nn.Module:
    return odd_model(family) if family in ADAPTED else tiny_model(family)


@pytest.mark.parametrize("family", FIELDS)
def test_the_field_that_says_it_is_found(family: str) -> None:
    model = model_of(family)
    restructure_model(model, narrow_plan(model, (8,) * 8).edits)
    config, obstacle = config_with_widths(model.config, moe_layers(model))
    assert obstacle is None
    for name in FIELDS[family]:
        config = getattr(config, name)
    assert config == 8
    assert text_config(model.config).num_hidden_layers > 1, "which is as it was"


@pytest.mark.parametrize(
    ("width", "shared", "number", "built"),
    [(8, None, 4, 32), (4, None, 8, 32), (12, None, 3, 36), (12, 12, 1, 12), (12, 20, 2, 24)],
)
def test_shared_experts_become_a_number_of_experts(
    width: int, shared: int | None, number: int, built: int
) -> None:
    model = tiny_model("deepseek_v3", n_shared_experts=2)
    restructure_model(model, narrow_plan(model, (width,) * 8, shared).edits)
    config, _ = config_with_widths(model.config, moe_layers(model))
    assert (config.moe_intermediate_size, config.n_shared_experts) == (width, number)
    assert moe_layers(meta_model(config))[0].info.shared_width == built


def test_zeros_of_shared_experts_count_and_may_be_too_many(tmp_path: Path) -> None:
    model = tiny_model("glm4_moe")
    model.save_pretrained(tmp_path / "source")
    apply_plan(model, narrow_plan(model, (12,) * 8))
    refused = choose_form(model, 0.01)
    assert not refused.stock
    assert "shared experts 16 wide, padded with zeros to 24" in refused.reason
    assert "widths that divide 16" in refused.reason and "method.shared=true" in refused.reason
    expected = logits_of(model)
    (tmp_path / "x").mkdir()
    batch = tiny_batch(padding=False)
    with torch.no_grad():
        save_file(batch | {"logits": model(**batch).logits}, tmp_path / "x/expected.safetensors")
    form = save_checkpoint(model, tmp_path / "x" / "model", tmp_path / "source", 1.0)
    assert form.stock and form.shared_width == 24
    torch.testing.assert_close(logits_of(load(tmp_path / "x/model")), expected, rtol=0, atol=1e-5)
    found = in_fresh_process("stock", [tmp_path / "x"])["x"]
    assert isinstance(found, float) and found < 1e-5
    own = tmp_path / "own"
    apply_plan(other := tiny_model("glm4_moe"), narrow_plan(other, (12,) * 8))
    assert not save_checkpoint(other, own, tmp_path / "source", 0.0).stock
    assert torch.equal(logits_of(load(own)), logits_of(other))


def test_shared_experts_of_a_width_that_is_not_said_stand_in_the_way() -> None:
    model = model_of("llama4_text")
    restructure_model(model, narrow_plan(model, (8,) * 8).edits)
    form = choose_form(model, 1.0)
    assert not form.stock and "shared experts are 16 wide" in form.reason


def test_every_width_is_stock(tmp_path: Path) -> None:
    folders = []
    for family in FAMILIES:
        folder = tmp_path / family
        folder.mkdir()
        model, batch = tiny_model(family), tiny_batch()
        model.save_pretrained(folder / "source")
        shared = moe_layers(model)[0].info.shared_width
        apply_plan(model, narrow_plan(model, (7,) * 8, shared=7 if shared else None))
        with torch.no_grad():
            logits = model(**batch).logits
        save_file(batch | {"logits": logits}, folder / "expected.safetensors")
        form = save_checkpoint(model, folder / "model", folder / "source", 0.0)
        assert form.stock and "ratio.round_to=4 keeps the faster ones" in form.reason, family
        folders.append(folder)
    assert in_fresh_process("stock", folders) == dict.fromkeys(FAMILIES, 0.0)
