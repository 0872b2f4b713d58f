"""What layers say of fewer experts per token, against loops over whole models."""

from __future__ import annotations

import pytest
import torch
from expert_sets import Case
from families import tiny_model

from moe_lab.models.layers import hidden_of, moe_layers
from moe_lab.models.probing import route
from moe_lab.models.routers import set_top_k
from moe_lab.profile.fewer_experts import (
    RoutedText,
    ask_routers,
    damage_on_random,
    damage_on_text,
)

FAMILIES = ("qwen2_moe", "mixtral", "deepseek_v3", "gpt_oss")


def block_outputs(model, index: int, x_TD: torch.Tensor) -> torch.Tensor:
    block = {layer.info.index: layer for layer in moe_layers(model)}[index].block
    with torch.no_grad():
        return hidden_of(block(x_TD[None])).reshape(x_TD.shape)


def slow(case: Case, family: str, index: int, inputs: list[torch.Tensor]) -> list[float]:
    """mean over the matrices of ||y_k - y_K||_F, of whole models with another number."""
    top_k = case.infos[index].top_k
    base = [block_outputs(case.model, index, x) for x in inputs]
    found = []
    for number in range(1, top_k + 1):
        model = tiny_model(family).double()
        model.set_experts_implementation("eager")
        set_top_k(model, number)
        some = [block_outputs(model, index, x) for x in inputs]
        norms = [float((one - y).square().sum().sqrt()) for one, y in zip(some, base, strict=True)]
        found.append(sum(norms) / len(norms))
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_damage_on_random_inputs_and_on_text(family: str) -> None:
    case = Case(family)
    random = damage_on_random(case.profile(), 200, 7)
    text = damage_on_text(case.profile(), None, relative=False)
    lengths = [int(n) for batch in case.batches for n in batch["attention_mask"].sum(dim=1)]
    for index in case.infos:
        generator = torch.Generator().manual_seed(2**32 * 7 + index)
        x_TD = torch.randn(200, 32, generator=generator).double()
        expected = slow(case, family, index, [x_TD[:128], x_TD[128:]])
        assert random[index] == pytest.approx(expected, rel=1e-5)
        documents = list(case.inputs(index).split(lengths))
        assert text[index] == pytest.approx(slow(case, family, index, documents), rel=1e-5)
        assert random[index][-1] == text[index][-1] == 0.0 < min(random[index][:-1])
    assert {layer.info.top_k for layer in moe_layers(case.model)} == {case.infos[index].top_k}


def test_relative_damage_is_the_squared_error_over_the_state() -> None:
    case = Case("mixtral")
    found = damage_on_text(case.profile(), None, relative=True)
    other = tiny_model("mixtral").double()
    other.set_experts_implementation("eager")
    set_top_k(other, 1)
    leaving: dict[int, list[torch.Tensor]] = {index: [] for index in case.infos}
    handles = [
        layer.decoder.register_forward_hook(
            lambda module, args, output, index=layer.info.index: leaving[index].append(
                hidden_of(output)
            )
        )
        for layer in moe_layers(case.model)
    ]
    with torch.no_grad():
        for batch in case.batches:
            case.model(**batch)
    for handle in handles:
        handle.remove()
    masks = [batch["attention_mask"].bool() for batch in case.batches]
    lengths = [int(number) for mask in masks for number in mask.sum(dim=1)]
    for index in case.infos:
        x_TD = case.inputs(index)
        change_TD = block_outputs(other, index, x_TD) - block_outputs(case.model, index, x_TD)
        state_TD = torch.cat([h[mask] for h, mask in zip(leaving[index], masks, strict=True)])
        share_T = change_TD.square().sum(dim=1) / state_TD.square().sum(dim=1)
        documents = [float(part.mean()) for part in share_T.split(lengths)]
        expected = sum(documents) / len(documents)
        assert found[index] == [pytest.approx(expected, rel=1e-9), 0.0]


def test_routers_are_asked_with_all_valid_tokens() -> None:
    case, seen = Case("qwen2_moe"), {}

    def ask(index: int, routed: RoutedText) -> dict[str, float]:
        seen[index] = routed
        return {"tokens": float(len(routed.weight_TK))}

    told = ask_routers(case.profile(), None, {"question": "test"}, ask, [])
    tokens = sum(int(batch["attention_mask"].sum()) for batch in case.batches)
    assert told == {index: {"tokens": float(tokens)} for index in case.infos}
    for layer in moe_layers(case.model):
        expected = route(layer, case.inputs(layer.info.index))
        found = seen[layer.info.index]
        given = found.logits_TE, found.weight_TK, found.index_TK
        for one, other in zip(expected, given, strict=True):
            torch.testing.assert_close(one.double(), other.double(), rtol=1e-9, atol=1e-9)
