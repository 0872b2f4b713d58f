"""Step-3.7: a multimodal model, whose text model is found, pruned and read again by stock."""

from __future__ import annotations

from pathlib import Path

import torch
from families import logits_of
from odd_families import in_stock, masked_logits, odd_model

from moe_lab.models.condensing import dense_terms
from moe_lab.models.editing import prune_layer
from moe_lab.models.experts import expert_forward, expert_parameters
from moe_lab.models.forms import set_num_experts
from moe_lab.models.layers import moe_layers

KEPT = (0, 2, 3, 5, 6, 7)


def test_pruned_and_read_again(tmp_path: Path) -> None:
    model = odd_model("step3p7")
    reference = masked_logits(odd_model("step3p7"), dict.fromkeys(range(1, 4), KEPT))
    for layer in moe_layers(model):
        prune_layer(layer, KEPT)
    set_num_experts(model.config, len(KEPT))
    assert model.config.text_config.n_routed_experts == len(KEPT)
    memory = logits_of(model)
    torch.testing.assert_close(memory, reference, rtol=1e-3, atol=1e-3)
    model.save_pretrained(tmp_path / "pruned")
    ((said, logits),) = in_stock(tmp_path / "pruned", kind="AutoModelForImageTextToText")
    assert said == "clean, cached as not"
    assert logits is not None and torch.equal(logits, memory)


def test_a_layer_that_clamps_is_not_act_times_up() -> None:
    layers = moe_layers(odd_model("step3p7"))
    assert all(dense_terms(layer) is None for layer in layers)
    limited = layers[1].experts
    x_TD, parameters = torch.full((1, 32), 3.0), expert_parameters(limited)[0]
    gate, up = (x_TD @ parameters["up"].T).chunk(2, dim=-1)
    hidden = torch.nn.functional.silu(gate).clamp(max=0.05) * up.clamp(-0.05, 0.05)
    expected = hidden @ parameters["down"].T
    torch.testing.assert_close(expert_forward(limited, parameters, x_TD), expected)
