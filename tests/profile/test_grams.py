"""Gram matrices of hidden units, against what the blocks of real families give."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from families import tiny_batch, tiny_model
from torch import Tensor

from moe_lab.models.hidden_units import HiddenUnits
from moe_lab.models.layers import hidden_of, moe_layers
from moe_lab.models.stream import LayerStream
from moe_lab.profile.collect import collect_statistics
from moe_lab.profile.grams import GramCost, Grams, token_weights
from moe_lab.profile.profile import Profile
from moe_lab.types import LayerInfo, NotFinite, UserError

LAYER = 2
FAMILIES = ["mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss"]
BATCHES = [tiny_batch(seed=0), tiny_batch(seed=1)]


def exact_model(family: str, **changes: Any) -> Any:
    model = tiny_model(family, **changes).double()
    model.set_experts_implementation("eager")  # the default one knows no float64
    return model


def profile_of(model: Any) -> Profile:
    statistics = collect_statistics(model, BATCHES, neurons=True)
    return Profile(statistics, lambda number=None: LayerStream(model, BATCHES[:number]))


def with_columns(model: Any, columns_EID: Tensor) -> Tensor:
    """What the routed experts add at LAYER with these columns and no bias, [T, D], valid tokens."""
    changed = copy.deepcopy(model)
    layer = {one.info.index: one for one in moe_layers(changed)}[LAYER]
    HiddenUnits(layer.experts).set_down(columns_EID.transpose(1, 2))
    if layer.experts.has_bias:
        layer.experts.down_proj_bias.data.zero_()
    found: list[Tensor] = []
    block = {one.info.index: one for one in moe_layers(model)}[LAYER].block
    handle = block.register_forward_pre_hook(lambda module, args: found.append(args[0]))
    rows = []
    with torch.no_grad():
        for batch in BATCHES:
            model(**batch)
            x_TD = found.pop()[batch["attention_mask"].bool()]
            out = hidden_of(layer.block(x_TD[None]))[0]
            if layer.shared is not None:
                gate = 1.0 if layer.shared_gate is None else layer.shared_gate(x_TD).sigmoid()
                out = out - gate * layer.shared(x_TD)
            rows.append(out)
    handle.remove()
    return torch.cat(rows)


def states_behind(model: Any) -> Tensor:
    with torch.no_grad():
        outputs = [model(**batch, output_hidden_states=True) for batch in BATCHES]
    masks = [batch["attention_mask"].bool() for batch in BATCHES]
    pairs = zip(outputs, masks, strict=True)
    return torch.cat([out.hidden_states[LAYER + 1][mask] for out, mask in pairs])


@pytest.mark.parametrize("token_weight", ["output", "none"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_joint_gram_is_what_any_columns_would_give(family: str, token_weight: str) -> None:
    model = exact_model(family)
    profile = profile_of(model)
    gram_NN = Grams(profile, None, token_weight).of(LAYER, joint=True)
    grams = Grams(profile, None, token_weight)
    columns_EID = grams.columns(LAYER)
    drawn = torch.randn(columns_EID.shape, generator=torch.Generator().manual_seed(0)).double()
    for tried in (columns_EID, drawn):
        out_TD = with_columns(model, tried)
        if token_weight == "output":
            out_TD = out_TD / states_behind(model).square().mean(dim=1, keepdim=True).sqrt()
        flat_ND = tried.flatten(0, 1)
        expected = out_TD.T @ out_TD
        found = flat_ND.T @ gram_NN.double() @ flat_ND
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.max()))


@pytest.mark.parametrize("family", FAMILIES)
def test_grams_by_expert_are_the_blocks_of_the_joint_one(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = profile_of(exact_model(family))
    joint = Grams(profile, None, "output").of(LAYER, joint=True)
    each_EII = Grams(profile, None, "output").of(LAYER, joint=False)
    experts, width, _ = each_EII.shape
    blocks = joint.view(experts, width, experts, width)
    for expert in range(experts):
        torch.testing.assert_close(blocks[expert, :, expert], each_EII[expert])
    monkeypatch.setattr("moe_lab.profile.grams.TOKENS_SIDE_BY_SIDE", 7)
    again = Grams(profile, None, "output").of(LAYER, joint=True)
    torch.testing.assert_close(again, joint)


def test_units_of_experts_that_share_no_token_have_nothing_in_common() -> None:
    profile = profile_of(exact_model("mixtral", num_experts_per_tok=1))
    joint = Grams(profile, None, "none").of(LAYER, joint=True)
    each_EII = Grams(profile, None, "none").of(LAYER, joint=False)
    torch.testing.assert_close(joint, torch.block_diag(*each_EII))


def test_what_was_measured_before_is_remembered() -> None:
    asked: list[dict[str, Any]] = []

    def remember(identity: dict[str, Any], work: Any, code: Any) -> dict[str, Tensor]:
        asked.append(identity)
        return {"gram": torch.eye(3)}

    profile = Profile([], remember_tensors=remember)
    assert torch.equal(Grams(profile, 4, "none").of(LAYER, joint=True), torch.eye(3))
    assert asked == [
        {"question": "gram", "layer": 2, "joint": True, "token_weight": "none", "num_samples": 4}
    ]


def test_a_layer_without_one_state_for_each_token_is_refused_before_any_work() -> None:
    profile = profile_of(exact_model("mixtral"))
    del profile.statistics[1].sums["layer_cosine_sum"]
    with pytest.raises(UserError, match=r"layer 1 there is not one hidden.*token_weight=none"):
        Grams(profile, None, "output")
    Grams(profile, None, "none")


def test_products_that_are_not_finite_are_refused() -> None:
    model = tiny_model("mixtral")
    profile = profile_of(model)
    layer = moe_layers(model)[LAYER]
    with torch.no_grad():
        HiddenUnits(layer.experts).down_columns().zero_()  # what follows stays finite
        layer.experts.gate_up_proj.mul_(1e12)
    with pytest.raises(NotFinite, match="layer 2: products of its hidden units"):
        Grams(profile, None, "none").of(LAYER, joint=False)


def test_a_token_without_any_state_weighs_nothing() -> None:
    class Batch:
        x_TD = torch.ones(3, 2)
        leaving_TD = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 1.0]])

    weights: Any = token_weights(Batch(), "output")  # type: ignore[arg-type]
    assert weights.tolist() == [0.0, 0.5, 2.0]


def test_what_matrices_cost() -> None:
    info = LayerInfo(0, "mlp", num_experts=4, top_k=2, hidden_size=8, expert_width=3)
    joint, apart = GramCost(info, joint=True), GramCost(info, joint=False)
    assert (joint.units, joint.matrices, apart.units, apart.matrices) == (12, 1, 3, 4)
    assert (joint.stored_bytes, apart.stored_bytes) == (4 * 144, 4 * 4 * 9)
    assert (joint.working_bytes, apart.working_bytes) == (8 * 5 * 144, 8 * 8 * 9)
    assert joint.products(10, 20) == 10 * 144 + 3 * 1728
    assert apart.products(10, 20) == 20 * 9 + 3 * 4 * 27
