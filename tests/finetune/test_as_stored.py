"""Experts that compute as they will be stored."""

from __future__ import annotations

import pytest
import torch
from families import logits_of, tiny_batch, tiny_model
from odd_families import odd_model
from torch import Tensor

from moe_lab.finetune.as_stored import compute_as_stored, compute_latent, store_in
from moe_lab.models import observing
from moe_lab.models.expert_matrices import expert_matrices
from moe_lab.models.layers import moe_layers
from moe_lab.models.rounding import Scheme, dequantised, rounded
from moe_lab.models.widths import set_widths
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
