"""Errors of sets of experts against copies of the model that are pruned."""

from __future__ import annotations

import copy

import pytest
import torch
from expert_sets import LAYER, Case, routed_output, slow_error, slow_masked_error, some_sets
from torch import nn

from moe_lab.models.layers import moe_layers
from moe_lab.models.stream import LayerStream
from moe_lab.profile import all_experts
from moe_lab.profile.all_experts import ExpertSample, check_outputs
from moe_lab.types import NotFinite


def test_error_is_that_of_a_pruned_copy(case: Case) -> None:
    sample = ExpertSample(LayerStream(case.model, case.batches))
    for index in (1, LAYER):
        sets = some_sets(case, index)
        with sample.open(index) as experts:
            assert experts.num_tokens == len(case.inputs(index))
            for kept, found in zip(sets, experts.errors(sets), strict=True):
                assert (found.mse, found.cosine) == pytest.approx(
                    slow_error(case, index, kept), rel=case.exact, abs=case.exact
                ), kept
                again = experts.error(kept)
                assert (again.mse, again.cosine) == pytest.approx((found.mse, found.cosine))
            assert experts.error(range(8)).mse == 0


def test_error_is_that_of_masked_logits(case: Case) -> None:
    # Families make their router's probabilities in float32 whatever the model computes in.
    with ExpertSample(LayerStream(case.model, case.batches)).open(LAYER) as experts:
        for kept in some_sets(case, LAYER):
            found = experts.error(kept)
            assert (found.mse, found.cosine) == pytest.approx(
                slow_masked_error(case, LAYER, kept), rel=1e-4, abs=1e-6
            )


def errors_of(model: nn.Module, batches: list[dict]) -> list[tuple[float, float]]:
    sets = [(0, 1, 4, 5), (2, 3, 6, 7), (0, 1, 2, 4, 5, 6)]
    with ExpertSample(LayerStream(model, batches)).open(LAYER) as experts:
        return [(error.mse, error.cosine) for error in experts.errors(sets)]


def test_batch_size_padding_and_chunks_do_not_matter(case: Case, monkeypatch) -> None:
    together = errors_of(case.model, case.batches)
    alone = []
    for batch in case.batches:
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            row = {"input_ids": ids[None, : mask.sum()], "attention_mask": mask[None, : mask.sum()]}
            alone.append(row)
    monkeypatch.setattr("moe_lab.profile.all_experts.TOKENS_AT_ONCE", 7)
    for found, expected in zip(errors_of(case.model, alone), together, strict=True):
        assert found == pytest.approx(expected, rel=1e-6)


def test_the_sample_lies_in_the_cache_and_leaves_it() -> None:
    case = Case("mixtral")
    stream = LayerStream(case.model, case.batches)
    sample = ExpertSample(stream)
    with sample.open(LAYER) as experts:
        chunk = next(experts.chunks())
        tokens = len(chunk.x_TD)
        assert chunk.outputs_ETD.shape == (8, tokens, 32) and chunk.index_TK.shape == (tokens, 2)
        assert stream.cache.held > chunk.outputs_ETD.numel() * 8
        expected = routed_output(case.model, LAYER, chunk.x_TD)
        torch.testing.assert_close(chunk.routed_TD, expected, rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match="3 comes next"), sample.open(LAYER):
        pass
    states = sum(valid.numel() for valid in stream.valid) * 32 * 8 * 2  # input and moving ones
    assert stream.cache.held == states


def test_outputs_are_copied_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """However few tokens' outputs go to float64 at a time."""
    case, sets = Case("mixtral"), [[0, 1, 2, 4, 6, 7], [3, 5]]
    found = []
    for numbers in (2**24, 3 * 8 * 32, 1):
        monkeypatch.setattr(all_experts, "NUMBERS_AT_ONCE", numbers)
        with ExpertSample(LayerStream(case.model, case.batches)).open(LAYER) as experts:
            found.append(experts.errors(sets))
    assert found[0][0].mse > 0
    for errors in found[1:]:
        for one, other in zip(errors, found[0], strict=True):
            assert one.mse == pytest.approx(other.mse, rel=1e-12)
            assert one.cosine == pytest.approx(other.cosine, rel=1e-9)


def test_an_output_that_is_none_names_its_expert_also_where_no_token_is_sent_there(
    case: Case,
) -> None:
    """What a router never asks for is computed here, and may be too large."""
    with pytest.raises(NotFinite, match="layer 2, expert 1: its output on a token of the sample"):
        check_outputs(torch.tensor([[[1.0, 2.0]], [[1.0, torch.inf]], [[0.0, 0.0]]]), 2)
    check_outputs(torch.zeros(3, 0, 2), 2)
    broken = copy.deepcopy(case.model)
    layer = next(one for one in moe_layers(broken) if one.info.index == LAYER)
    with torch.no_grad():
        layer.experts.down_proj[6] = torch.nan
        layer.router.weight[6] = 0
    sample = ExpertSample(LayerStream(broken, case.batches))
    with (
        pytest.raises(NotFinite, match=f"layer {LAYER}, expert 6: its output"),
        sample.open(LAYER),
    ):
        pass


def test_a_state_that_is_none_is_not_called_another_familys(case: Case) -> None:
    broken = copy.deepcopy(case.model)
    with torch.no_grad():
        broken.model.embed_tokens.weight.fill_(torch.nan)
    stream = LayerStream(broken, case.batches)
    with (
        pytest.raises(NotFinite, match="layer 1: the hidden state is not finite"),
        ExpertSample(stream).open(1),
    ):
        pass
    with torch.no_grad(), pytest.raises(NotFinite, match="layer 1: the hidden state"):
        stream.replay_open(1, 0, stream.cache["input", 0])
