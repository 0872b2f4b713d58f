"""Gradient steps on one layer: what they find, what holds them back, and what they cost."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fitted_layers import edited, plan_of, seen_at, subject_of
from torch import Tensor
from torch.nn import functional as F

from moe_lab.methods.condense import layer_fit
from moe_lab.methods.condense.layer_data import LayerTokens
from moe_lab.methods.condense.layer_fit import DenseWeights, LayerFit, fit_layer
from moe_lab.models.dense_units import columns_name, rows_name
from moe_lab.types import NotFinite

SIZE, WIDTH = 16, 24
CLOSED: dict[str, Any] = {"refit": "down_proj", "experts": "neurons", "layers": [1]}


def drawn(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def planted(seed: int = 1) -> DenseWeights:
    rows = [drawn(WIDTH, SIZE, seed=seed + part, scale=SIZE**-0.5) for part in range(2)]
    return DenseWeights(*rows, drawn(WIDTH, SIZE, seed=seed + 2, scale=WIDTH**-0.5))


def moved(weights: DenseWeights, share: float) -> DenseWeights:
    """With noise of a share of each matrix's size."""
    pairs = enumerate(weights)
    return DenseWeights(
        *(one + drawn(*one.shape, seed=9 + i, scale=share * float(one.std())) for i, one in pairs)
    )


def output(weights: DenseWeights, x_TD: Tensor) -> Tensor:
    gate_WD, up_WD, columns_WD = weights
    return (F.silu(x_TD @ gate_WD.T) * (x_TD @ up_WD.T)) @ columns_WD


class Tokens:
    """Chunks of some tokens, of which each fourth 64 are held out; counts how often it is read."""

    def __init__(self, x_TD: Tensor, target_TD: Tensor, weight_T: Tensor | None = None):
        weight_T = torch.ones(len(x_TD)) if weight_T is None else weight_T
        held_T = torch.arange(len(x_TD)) // 64 % 4 == 3
        self.whole = LayerTokens(x_TD, target_TD, weight_T.to(x_TD), held_T)
        self.read: list[bool | None] = []

    def __call__(self, held: bool | None = None) -> Iterator[LayerTokens]:
        self.read.append(held)
        for some_T in torch.arange(len(self.whole.held_T)).split(100):
            part = self.whole.part(some_T)
            yield part if held is None else part.part(part.held_T == held)

    def error(self, weights: DenseWeights, held: bool) -> float:
        """Relative, by hand."""
        one = self.whole.part(self.whole.held_T == held)
        off_T = (output(weights, one.x_TD.float()) - one.target_TD.float()).square().sum(dim=1)
        square_T = one.target_TD.float().square().sum(dim=1)
        return float((one.weight_T * off_T).sum() / (one.weight_T * square_T).sum())


def of_planted(number: int = 2048, dtype: torch.dtype = torch.float32) -> Tokens:
    x_TD = drawn(number, SIZE, seed=0)
    return Tokens(x_TD.to(dtype), output(planted(), x_TD).to(dtype))


def test_a_planted_layer_is_found_again() -> None:
    tokens, start = of_planted(), moved(planted(), 0.2)
    found = fit_layer(start, F.silu, tokens, steps=800)
    assert found.steps == 800
    assert found.start_error == pytest.approx(tokens.error(start, held=True), rel=1e-5)
    assert found.start_error > 0.05
    assert found.held_error < 2e-4
    assert tokens.error(found.weights, held=True) < 2e-4
    # Of up and down projection a factor of each unit is free.
    off, before = (one.gate_WD - planted().gate_WD for one in (found.weights, start))
    assert off.norm() < 0.1 * before.norm()


def test_it_is_the_same_again_and_another_seed_is_not() -> None:
    tokens, start = of_planted(), moved(planted(), 0.2)
    one, same, other = (fit_layer(start, F.silu, tokens, 20, seed) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(one.weights, same.weights, strict=True))
    assert not torch.equal(one.weights.gate_WD, other.weights.gate_WD)


def test_what_helps_on_no_held_out_document_is_not_kept() -> None:
    x_TD, start = drawn(512, SIZE, seed=0), planted()
    target_TD = output(start, x_TD)
    tokens = Tokens(x_TD, target_TD)
    shown = ~tokens.whole.held_T  # where the layer is shown something else than what judges it
    tokens.whole.target_TD[shown] = drawn(int(shown.sum()), SIZE, seed=3)
    found = fit_layer(start, F.silu, tokens, steps=50)
    assert found.steps == 0 and found.held_error == found.start_error < 1e-9
    assert all(torch.equal(a, b) for a, b in zip(found.weights, start, strict=True))
    assert None not in tokens.read, "the held-out documents were not fitted to"


def test_the_steps_that_were_best_are_taken_again_with_all_documents() -> None:
    """First fits what both have in common, then noise of the documents that judge nothing."""
    x_TD = drawn(256, SIZE, seed=0)
    tokens = Tokens(x_TD, output(planted(), x_TD) + drawn(256, SIZE, seed=5, scale=0.2))
    start = moved(planted(), 0.3)
    found = fit_layer(start, F.silu, tokens, steps=1000)
    assert 0 < found.steps < 1000
    assert found.held_error < found.start_error
    assert tokens.read.count(None) > 0
    # What was fitted to the held-out documents, too, is better there than what was not.
    assert tokens.error(found.weights, held=True) < 0.9 * found.held_error


def test_where_large_steps_find_nothing_better_small_ones_are_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokens, start = of_planted(), moved(planted(), 0.01)
    monkeypatch.setattr(layer_fit, "RATES", (20.0,))
    assert fit_layer(start, F.silu, tokens, steps=30).steps == 0
    monkeypatch.setattr(layer_fit, "RATES", (20.0, 0.1))
    found = fit_layer(start, F.silu, tokens, steps=30)
    assert found.steps > 0 and found.held_error < 0.5 * found.start_error


def test_a_start_that_saw_the_held_out_documents_is_judged_by_one_that_did_not() -> None:
    tokens, seen, unseen = of_planted(512), planted(), moved(planted(), 0.3)
    alone = fit_layer(seen, F.silu, tokens, steps=20)
    assert alone.steps == 0  # nothing is better than what is exact
    fair = fit_layer(seen, F.silu, tokens, 20, unseen=unseen)
    assert fair.start_error == pytest.approx(tokens.error(unseen, held=True), rel=1e-5)
    assert fair.steps > 0


@pytest.mark.parametrize("weighted", [True, False])
def test_massive_activations_give_finite_layers_no_worse_than_the_start(weighted: bool) -> None:
    x_TD = drawn(1024, SIZE, seed=0)
    x_TD[[5, 200]] *= 1e4 / x_TD[5].norm()  # one that is fitted to, one that is held out
    target_TD = output(planted(), x_TD)
    weight_T = 1 / target_TD.square().mean(dim=1) if weighted else None
    tokens = Tokens(x_TD, target_TD, weight_T)
    start = moved(planted(), 0.2)
    found = fit_layer(start, F.silu, tokens, steps=100)
    assert all(bool(one.isfinite().all()) for one in found.weights)
    assert found.held_error <= found.start_error == pytest.approx(tokens.error(start, held=True))
    if weighted:
        assert found.held_error < 0.3 * found.start_error


def test_weights_say_which_tokens_count() -> None:
    x_TD = drawn(1024, SIZE, seed=0)
    first = torch.arange(1024) % 2 == 0
    one, other = (output(planted(seed), x_TD) for seed in (1, 11))
    target_TD = torch.where(first[:, None], one, other)
    tokens = Tokens(x_TD, target_TD, first.float())
    found = fit_layer(moved(planted(), 0.2), F.silu, tokens, steps=200)
    assert tokens.error(found.weights, held=True) < 0.01


def test_bf16_is_computed_in_float32() -> None:
    tokens = of_planted(dtype=torch.bfloat16)
    start = DenseWeights(*(one.bfloat16() for one in moved(planted(), 0.2)))
    with torch.no_grad():  # as plans are made
        found = fit_layer(start, F.silu, tokens, steps=300)
    assert {one.dtype for one in found.weights} == {torch.float32}
    assert {one.requires_grad for one in found.weights} == {False}
    assert found.held_error < 0.02 * found.start_error


def test_no_more_tokens_are_in_memory_than_the_steps_see(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    made = layer_fit._Descent.__init__

    def watched(self: Any, *given: Any) -> None:
        sizes.append(len(given[2].weight_T))
        made(self, *given)

    monkeypatch.setattr(layer_fit._Descent, "__init__", watched)
    tokens, start = of_planted(2048), moved(planted(), 0.5)
    found = fit_layer(start, F.silu, tokens, steps=4)
    assert sizes == [1024, 1024] and found.held_error < found.start_error
    sizes.clear()
    fit_layer(start, F.silu, tokens, steps=40)
    assert sizes == [1536, 2048]


def test_weights_that_are_none_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        layer_fit._Descent, "weights", DenseWeights(*[torch.full((1,), torch.nan)] * 3)
    )
    monkeypatch.setattr(layer_fit, "_error", lambda weights, *_: float(len(weights.gate_WD)))
    with pytest.raises(NotFinite, match=r"condense\.fit_steps=0"):
        fit_layer(planted(), F.silu, of_planted(256), steps=5)


@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral"])
def test_a_plan_with_steps_is_nearer_to_the_intact_model(family: str) -> None:
    subject = subject_of(family, documents=120)
    closed, stepped = (plan_of(subject, **CLOSED, fit_steps=steps) for steps in (0, 50))
    [before], [after] = closed.edited(), stepped.edited()
    assert (before.fitted, after.fitted) == ("down_proj", "all")
    assert after.errors[:3] == before.errors
    assert after.steps > 0 and after.errors[3] < after.errors[1]
    models = [edited(subject, plan) for plan in (closed, stepped)]
    dense, tensors = models[1].model.layers[1].mlp, stepped.tensors
    assert torch.equal(dense.gate_proj.weight, tensors[rows_name(1, "gate_proj")].double())
    assert torch.equal(dense.up_proj.weight, tensors[rows_name(1, "up_proj")].double())
    assert torch.equal(dense.down_proj.weight, tensors[columns_name(1)].double())
    intact, *others = (
        seen_at(model, subject.batches, 1).leaving_TD for model in (subject.model, *models)
    )
    weight_T1 = 1 / intact.square().mean(dim=1, keepdim=True)
    off = [float((weight_T1 * (other - intact).square()).sum()) for other in others]
    assert off[1] < 0.9 * off[0]


def test_candidates_of_a_search_take_no_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []

    def watched(*given: Any) -> LayerFit:
        taken.append(given[3])
        return LayerFit(given[0], 0, 1.0, 1.0)

    monkeypatch.setattr("moe_lab.methods.condense.solving.fit_layer", watched)
    asked = CLOSED | {"layers": "greedy_logits", "num_layers": 2, "fit_steps": 7}
    plan = plan_of(subject_of("qwen2_moe"), **asked)
    assert taken == [7, 7]
    assert {edit.fitted for edit in plan.edited()} == {"down_proj"}, "the start was best"
