"""Experts that compute as they will be stored."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import logits_of, tiny_batch, tiny_model
from in_few_bits import quantised
from odd_families import odd_model
from torch import Tensor

from moe_lab.compute import Compute
from moe_lab.finetune.as_stored import compute_as_stored, compute_latent, store_in
from moe_lab.finetune.experts import Experts
from moe_lab.finetune.recipe import Phase
from moe_lab.models import observing
from moe_lab.models.checkpoint import Checkpoint, load, meta_model
from moe_lab.models.edits.drop_layer import DropLayer
from moe_lab.models.edits.plan import Plan
from moe_lab.models.expert_matrices import expert_matrices
from moe_lab.models.layers import moe_layers
from moe_lab.models.rounding import Scheme, dequantised, rounded
from moe_lab.models.saving import save_checkpoint
from moe_lab.models.widths import set_widths
from moe_lab.quantize.base import Quantizer
from moe_lab.quantize.gptq import Gptq
from moe_lab.quantize.moqe import Moqe
from moe_lab.quantize.rtn import RoundToNearest
from moe_lab.stages.checks import check_rounding
from moe_lab.types import UserError


def reads(matrix: Tensor) -> Tensor:
    return dequantised(rounded(matrix, Scheme(3, 8)))


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss"])
def test_it_computes_with_stored_weights_and_trains_the_latent_ones(family: str) -> None:
    model = tiny_model(family)
    model.set_experts_implementation(observing.OBSERVING)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rounded_model = tiny_model(family)
    rounded_model.set_experts_implementation(observing.OBSERVING)
    for layer in moe_layers(rounded_model):
        for matrix in expert_matrices(layer.experts).values():
            matrix.data.copy_(reads(matrix.detach().bfloat16()))
    layer = moe_layers(model)[0]
    latent = layer.experts.down_proj
    for one in moe_layers(model):
        compute_as_stored(one, reads)
    store_in(model, lambda name: torch.bfloat16)
    assert torch.equal(logits_of(model), logits_of(rounded_model))
    model.requires_grad_(False)
    latent.requires_grad_(True)
    model(**tiny_batch()).logits.square().sum().backward()
    plain = moe_layers(rounded_model)[0].experts.down_proj.requires_grad_(True)
    rounded_model(**tiny_batch()).logits.square().sum().backward()
    assert torch.allclose(latent.grad, plain.grad, rtol=1e-4, atol=1e-5)
    compute_latent(model)
    assert moe_layers(model)[0].experts.down_proj is latent
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_zeros_of_narrow_experts_stay_zeros_and_are_in_no_group() -> None:
    experts = (layer := moe_layers(tiny_model("mixtral"))[0]).experts
    set_widths(experts, (16, 8, *(16,) * 6))
    experts.down_proj.data[1, :, 8:] = 0
    plain = experts.down_proj.detach().clone()
    compute_as_stored(layer, reads)
    assert torch.equal(experts.down_proj[1, :, :8], reads(plain[1, :, :8]))
    assert not experts.down_proj[1, :, 8:].any()
    assert torch.equal(experts.down_proj[0], reads(plain[0]))


def test_experts_in_tensors_of_their_own_are_refused() -> None:
    with pytest.raises(UserError, match="quantization_aware=false"):
        compute_as_stored(moe_layers(odd_model("dbrx"))[0], reads)


@pytest.mark.parametrize("quantizer", [RoundToNearest(2, 8, clip="mse"), Moqe(2)], ids=str)
def test_what_is_trained_with_is_what_is_stored(quantizer: Quantizer, tmp_path: Path) -> None:
    """Latent weights in float32 are saved in bfloat16, and rounded by the stage as in training."""
    tiny_model("qwen2_moe").bfloat16().save_pretrained(tmp_path / "source")
    checkpoint = Checkpoint(tmp_path / "source", "float32")
    model = checkpoint.load("cpu")
    recipe = Experts({"one": Phase(data=None)}, quantization_aware=True)
    tuning = recipe.prepare(model, Plan(()))
    assert any("shared_expert" in name for name in tuning.trainable)
    files = checkpoint.held_by(meta_model(checkpoint.config))
    tuning.as_stored(quantizer.reader, files.dtype)
    model.set_experts_implementation(observing.OBSERVING)
    batch = tiny_batch() | {"labels": tiny_batch()["input_ids"]}
    optimizer = torch.optim.SGD(tuning.trainable.values(), lr=0.3)
    for _ in range(3):
        optimizer.zero_grad()
        tuning.losses(batch)["loss"].backward()
        optimizer.step()
    trained = {one.info.name: one.experts.down_proj.detach().clone() for one in moe_layers(model)}
    tuning.finish()
    save_checkpoint(model, tmp_path / "tuned", checkpoint.path)
    tuned = Checkpoint(tmp_path / "tuned")
    (tmp_path / "job").mkdir()
    quantised(tuned.path, quantizer, tmp_path / "job" / "checkpoint")
    for layer in moe_layers(load(tmp_path / "job" / "checkpoint", "float32")):
        assert torch.equal(layer.experts.down_proj, trained[layer.info.name])
        latent = load(tuned.path, "float32").get_submodule(layer.info.name).experts.down_proj
        assert not torch.equal(latent, trained[layer.info.name])


def test_a_recipe_that_rounds_needs_to_know_how() -> None:
    recipe = Experts({"one": Phase(data=None)}, quantization_aware=True)
    check_rounding(recipe, RoundToNearest(2, 8), Compute())
    for quantizer, compute, words in (
        (None, Compute(), "quantize=rtn"),
        (Gptq(bits=2), Compute(), "quantize=rtn"),
        (RoundToNearest(2, 8, what="all"), Compute(), "quantize.what=experts"),
        (Moqe(2), Compute(sharding="fsdp"), "compute.sharding=none"),
    ):
        with pytest.raises(UserError, match=words):
            check_rounding(recipe, quantizer, compute)
    check_rounding(Experts({"one": Phase(data=None)}), None, Compute())
    with pytest.raises(UserError, match="leaves none"):
        recipe.check(Plan((DropLayer(0, "model.layers.0.mlp"),)))
