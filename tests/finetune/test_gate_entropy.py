"""The routers' entropy: of each valid token, with its gradient, heard once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from annealing import NOTHING, recipe_of, training
from families import tiny_batch, tiny_model
from transformers import PreTrainedModel

from moe_lab.finetune.gate_entropy import entropy
from moe_lab.models import routers as model_routers
from moe_lab.models.layers import moe_layers


def slow_entropy(model: PreTrainedModel, batch: dict[str, torch.Tensor], family: str) -> float:
    """The mean over layers of the entropies summed over valid tokens, one token at a time."""
    seen: list[torch.Tensor] = []
    handles = [
        layer.router.register_forward_hook(lambda m, a, out: seen.append(out[0].reshape(-1, 8)))
        for layer in moe_layers(model)
    ]
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    total = 0.0
    for logits in seen:
        for z, valid in zip(logits.double(), batch["attention_mask"].reshape(-1), strict=True):
            if valid:
                p = z.softmax(0) if family != "glm4_moe" else z.sigmoid() / z.sigmoid().sum()
                total -= float((p * p.log()).sum())
    return total / len(seen)


@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral", "glm4_moe", "gpt_oss"])
def test_entropy_is_that_of_each_valid_token(family: str) -> None:
    model, batch = tiny_model(family), tiny_batch()
    tuning = recipe_of().prepare(model, NOTHING)
    found = tuning.losses(batch | {"labels": batch["input_ids"]})["entropy"].detach()
    assert found.item() == pytest.approx(slow_entropy(model, batch, family), rel=1e-5)
    padded = {
        "input_ids": torch.nn.functional.pad(batch["input_ids"], (0, 4), value=7),
        "attention_mask": torch.nn.functional.pad(batch["attention_mask"], (0, 4)),
    }
    again = tuning.losses(padded | {"labels": padded["input_ids"]})["entropy"].detach()
    assert again.item() == pytest.approx(found.item(), rel=1e-5)


@pytest.mark.parametrize("scoring", model_routers.SCORINGS)
def test_the_gradient_of_entropy_is_its_finite_difference(scoring: str) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 5, dtype=torch.float64, generator=generator, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: entropy(z, scoring), logits)
    uniform = torch.zeros(1, 5, dtype=torch.float64)
    assert entropy(uniform, scoring).item() == pytest.approx(torch.tensor(5.0).log().item())


def test_gradient_checkpointing_hears_each_router_once(tmp_path: Path) -> None:
    found = []
    for checkpointing in (False, True):
        recipe = recipe_of(gradient_checkpointing=checkpointing)
        trained = training(tiny_model("mixtral"), recipe, tmp_path / "out")
        means = trained._backward(trained.tokens["lm/data"].take(range(6)), 3)
        found.append((means, {name: p.grad for name, p in trained.trainable.items()}))
    (means, gradients), (other_means, others) = found
    assert means == other_means
    assert all(torch.equal(gradient, others[name]) for name, gradient in gradients.items())
