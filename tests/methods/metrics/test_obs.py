"""OBS: what its scores foresee is what the narrowed layer's output loses; options; refusals."""

from __future__ import annotations

import copy
import functools
import logging
from typing import Any

import pytest
import torch
from expert_sets import LAYER
from families import tiny_batch, tiny_model
from torch import Tensor

from moe_lab.methods.metrics.obs import Obs, refit_of, scores_of
from moe_lab.methods.prune import Prune
from moe_lab.methods.ratios.uniform import Uniform
from moe_lab.models.edits.plan import Plan, apply_plan
from moe_lab.models.layers import hidden_of, moe_layers
from moe_lab.models.stream import LayerStream
from moe_lab.profile.collect import collect_statistics
from moe_lab.profile.grams import Grams
from moe_lab.profile.profile import Profile
from moe_lab.types import UserError

FAMILIES = ["mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss"]
BATCHES = [tiny_batch(seed=seed) for seed in range(8)]  # more tokens of an expert than units
OPEN = Obs(ridge=0.0, token_weight="none")


@functools.cache
def whole_model(family: str, **changes: Any) -> Any:
    """A model that no test changes."""
    return exact_model(family, **changes)


def exact_model(family: str, **changes: Any) -> Any:
    model = tiny_model(family, **changes).double()
    model.set_experts_implementation("eager")  # the default one knows no float64
    return model


@functools.cache
def profile_of(model: Any) -> Profile:
    statistics = collect_statistics(model, BATCHES, neurons=True)
    return Profile(statistics, lambda number=None: LayerStream(model, BATCHES[:number]))


def block_outputs(model: Any, plan: Plan) -> tuple[Tensor, Tensor]:
    """What the routed experts add at LAYER, of the intact layer and as the plan leaves it.

    Without shared experts and biases of the down projection; on the same inputs, valid tokens.
    """
    changed = copy.deepcopy(model)
    apply_plan(changed, plan)
    layers = [{one.info.index: one for one in moe_layers(m)}[LAYER] for m in (model, changed)]
    found: list[Tensor] = []
    handle = layers[0].block.register_forward_pre_hook(lambda module, args: found.append(args[0]))
    with torch.no_grad():
        for batch in BATCHES:
            model(**batch)
    handle.remove()
    masks = [batch["attention_mask"].bool() for batch in BATCHES]
    x_TD = torch.cat([x[mask] for x, mask in zip(found, masks, strict=True)])
    outs = []
    with torch.no_grad():
        for layer in layers:
            if layer.experts.has_bias:
                layer.experts.down_proj_bias.zero_()
            out = hidden_of(layer.block(x_TD[None]))[0]
            if layer.shared is not None:
                gate = 1.0 if layer.shared_gate is None else layer.shared_gate(x_TD).sigmoid()
                out = out - gate * layer.shared(x_TD)
            outs.append(out)
    return outs[0], outs[1]


def planned(model: Any, metric: Obs, ratio: float = 0.5, **options: Any) -> Plan:
    prune = Prune(metric, Uniform(ratio), unit="neurons", **options)
    return prune.plan(profile_of(model))


def foreseen(plan: Plan) -> float:
    """The score of the last unit that went at LAYER."""
    name = f"layers.{LAYER}.neuron"
    return float(plan.tensors[f"{name}_scores"][plan.tensors[f"{name}s"] == 0].max())


@pytest.mark.parametrize("widths", ["by_layer", "by_expert"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_error_is_the_score_of_the_last_that_went(family: str, widths: str) -> None:
    model = whole_model(family)
    plan = planned(model, OPEN, widths=widths)
    intact, left = block_outputs(model, plan)
    error = float((left - intact).square().sum() / intact.square().sum())
    assert error == pytest.approx(foreseen(plan), rel=1e-3)
    alone = block_outputs(model, planned(model, Obs(ridge=0.0, refit=False), widths=widths))[1]
    assert float((alone - intact).square().sum() / intact.square().sum()) > 1.2 * error
    kept = plan.tensors[f"layers.{LAYER}.neurons"].sum(dim=1)
    assert (len(set(kept.tolist())) == 1) == (widths == "by_layer")


@pytest.mark.parametrize("widths", ["by_layer", "by_expert"])
def test_of_experts_that_share_no_token_the_error_is_foreseen_by_each(widths: str) -> None:
    model = whole_model("mixtral", num_experts_per_tok=1)
    plan = planned(model, Obs(gram="expert", ridge=0.0, token_weight="none"), widths=widths)
    intact, left = block_outputs(model, plan)
    error = float((left - intact).square().sum() / intact.square().sum())
    assert error == pytest.approx(foreseen(plan), rel=1e-3, abs=1e-6)
    joint = planned(model, OPEN, widths=widths)
    name = f"layers.{LAYER}.neurons"
    assert torch.equal(joint.tensors[name], plan.tensors[name])


def test_the_refit_is_no_worse_on_weighted_tokens_and_better_than_by_expert() -> None:
    model = whole_model("mixtral")
    errors = []
    for gram in ("joint", "expert"):
        metric = Obs(gram=gram, ridge=0.0, token_weight="none")
        intact, left = block_outputs(model, planned(model, metric))
        errors.append(float((left - intact).square().sum()))
    assert errors[0] < errors[1]


def test_nothing_goes_and_nothing_changes() -> None:
    model = whole_model("mixtral")
    plan = planned(model, Obs(), ratio=0.0)
    intact, left = block_outputs(model, plan)
    torch.testing.assert_close(left, intact, rtol=1e-6, atol=1e-6)


def test_permuted_units_have_the_same_scores() -> None:
    grams = Grams(profile_of(whole_model("qwen2_moe")), None, "output")
    gram_NN, columns_EID = grams.of(LAYER, joint=True), grams.columns(LAYER)
    experts, width, _ = columns_EID.shape
    order_I = torch.randperm(width, generator=torch.Generator().manual_seed(1))
    order_N = (torch.arange(experts)[:, None] * width + order_I).flatten()
    moved = gram_NN[order_N][:, order_N]
    for evenly in (True, False):
        score_EI = scores_of(gram_NN, columns_EID, 0.01, evenly)
        again_EI = scores_of(moved, columns_EID[:, order_I], 0.01, evenly)
        torch.testing.assert_close(again_EI, score_EI[:, order_I], rtol=1e-6, atol=1e-12)


def test_narrower_experts_have_zeros_behind() -> None:
    generator = torch.Generator().manual_seed(0)
    columns_EID = torch.randn(2, 3, 4, generator=generator)
    gram_EII = torch.eye(3).expand(2, 3, 3) * torch.tensor([1.0, 2.0])[:, None, None]
    kept_EI = torch.tensor([[True, False, True], [False, True, False]])
    new_EDW = refit_of(gram_EII, columns_EID, kept_EI, 0.0)
    assert new_EDW.shape == (2, 4, 2) and new_EDW.dtype == torch.float32
    torch.testing.assert_close(new_EDW[0].T, columns_EID[0, [0, 2]])
    torch.testing.assert_close(new_EDW[1, :, 0], columns_EID[1, 1])
    assert not new_EDW[1, :, 1].any()
    none_EI = torch.tensor([[True, False, True], [False, False, False]])
    assert not refit_of(gram_EII, columns_EID, none_EI, 0.0)[1].any()


def test_an_expert_without_tokens_keeps_its_largest_columns() -> None:
    model = exact_model("gpt_oss")
    layer = {one.info.index: one for one in moe_layers(model)}[LAYER]
    with torch.no_grad():
        layer.router.bias[3] = -100.0
    profile = profile_of(model)
    assert profile.statistics[LAYER]["count"][3] == 0
    column_ID = Grams(profile, None, "none").columns(LAYER)[3]
    largest = column_ID.square().sum(dim=1).argsort(descending=True)[:8].sort().values
    for gram in ("expert", "joint"):
        plan = Prune(Obs(gram=gram), Uniform(0.5), unit="neurons").plan(profile)
        kept_I = plan.tensors[f"layers.{LAYER}.neurons"][3]
        assert torch.equal(kept_I.nonzero()[:, 0], largest)
        new_DW = plan.tensors[f"layers.{LAYER}.down_proj"][3]
        torch.testing.assert_close(new_DW.double().T, column_ID[largest])


class Remembering:
    """What a store remembers, and how often each question was worked on."""

    def __init__(self) -> None:
        self.known: dict[str, Any] = {}
        self.worked: list[str] = []

    def __call__(self, identity: dict[str, Any], work: Any, code: Any) -> Any:
        key = str(sorted(identity.items(), key=str))
        if key not in self.known:
            self.worked.append(identity["question"])
            self.known[key] = work()
        return self.known[key]


def test_another_ratio_costs_no_gram_and_no_order() -> None:
    model, memory, opened = whole_model("mixtral"), Remembering(), []
    plain = profile_of(model)

    def open_stream(number: int | None = None) -> LayerStream:
        opened.append(number)
        return LayerStream(model, BATCHES[:number])

    profile = Profile(plain.statistics, open_stream, remember=memory, remember_tensors=memory)
    plans = [
        Prune(Obs(), Uniform(ratio), unit="neurons").plan(profile) for ratio in (0.25, 0.5, 0.5)
    ]
    assert sorted(memory.worked) == ["gram"] * 4 + ["obs"] * 4
    assert opened[0] is None and set(opened[1:]) == {1}
    less, more = (plan.tensors[f"layers.{LAYER}.neurons"].bool() for plan in plans[:2])
    assert bool((less | ~more).all()), "what stays of half stays of three quarters"
    fresh = Prune(Obs(), Uniform(0.5), unit="neurons").plan(plain)
    for name, tensor in fresh.tensors.items():
        torch.testing.assert_close(plans[2].tensors[name], tensor)


def test_without_refit_there_is_the_choice_alone() -> None:
    model = whole_model("mixtral")
    whole, alone = planned(model, Obs()), planned(model, Obs(refit=False))
    name = f"layers.{LAYER}.neurons"
    assert torch.equal(whole.tensors[name], alone.tensors[name])
    assert {key for key in whole.tensors if "down_proj" in key} == {
        f"layers.{index}.down_proj" for index in range(4)
    }
    assert not any("down_proj" in key for key in alone.tensors)


def test_shared_experts_go_by_energy() -> None:
    model = whole_model("qwen2_moe")
    plan = planned(model, Obs(), shared=True)
    layer = next(one for one in profile_of(model).statistics if one.info.index == LAYER).shared()
    energy_I = (layer["gate_hidden_square_sum"] * layer["down_square_sum"])[0]
    best = energy_I.argsort(descending=True)[:12].sort().values
    assert plan.tensors[f"layers.{LAYER}.shared_neurons"].nonzero()[:, 0].tolist() == best.tolist()


def test_what_does_not_fit_is_refused_or_goes_by_expert(caplog: pytest.LogCaptureFixture) -> None:
    model = whole_model("mixtral")
    profile = profile_of(model)
    infos = [layer.info for layer in profile.statistics]
    with pytest.raises(UserError, match=r"gram=joint: the 128 hidden units of layer 0 together"):
        Obs(gram="joint", joint_gib=1e-6).check(infos)
    with pytest.raises(UserError, match=r"metric.ridge=-1: it must be at least 0"):
        Obs(ridge=-1).check(infos)
    small = Obs(joint_gib=1e-6)
    small.check(infos)
    with caplog.at_level(logging.INFO):
        scores = small.neuron_scores(profile)
    assert "units refitted together in 0 of 4 layers, by expert in the others" in caplog.text
    expected = Obs(gram="expert").neuron_scores(profile)
    assert all(torch.equal(a, b) for a, b in zip(scores, expected, strict=True))


def test_it_looks_at_the_intact_model_itself() -> None:
    with pytest.raises(UserError, match=r"method\.propagate=true"):
        infos = [layer.info for layer in profile_of(whole_model("mixtral")).statistics]
        Prune(Obs(), Uniform(0.5), unit="neurons", propagate=True).check(infos)
