"""What a layer lacks after its edits, and what its hidden units make of the tokens it gets."""

from __future__ import annotations

import pytest
import torch
from families import tiny_model
from narrowing import UNEVEN, narrow_plan
from odd_blocks import odd_model
from refits import DOCUMENTS, activations, carried_out, layer_of, opened, seen, text

from moe_lab.models.edits.plan import Plan
from moe_lab.models.edits.prune import PruneExperts
from moe_lab.models.layers import moe_layers
from moe_lab.profile.edited_layer import Part
from moe_lab.types import NotFinite, UserError

BATCHES = [text(0), text(1)]


def pruned(model) -> Plan:
    infos = [layer.info for layer in moe_layers(model)]
    return Plan(tuple(PruneExperts(one.index, one.name, (1, 2, 4, 7)) for one in infos))


def held_last() -> torch.Tensor:
    """The places of all tokens, those of each fourth document behind the others."""
    lengths = [int(row.sum()) for batch in BATCHES for row in batch["attention_mask"]]
    held = torch.tensor([n for n, length in enumerate(lengths, 1) for _ in range(length)]) % 4 == 0
    return held.to(torch.uint8).argsort(stable=True)


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3", "gpt_oss"])
def test_rows_are_raw_activations_and_differences_of_states(family: str) -> None:
    model = tiny_model(family)
    plan = pruned(model)
    own = Plan(tuple(edit for edit in plan.edits if edit.index == 2))
    other = carried_out(model, own)
    with opened(model, BATCHES, plan, 2) as layer:
        found = [*layer.rows(held=False), *layer.rows(held=True)]
        square = layer.square()
    z_TN, missing_TD, weight_T = (torch.cat(parts) for parts in zip(*found, strict=True))
    wanted = [seen(model, 2, batch) for batch in BATCHES]
    passed = [seen(other, 2, batch) for batch in BATCHES]
    expected = torch.cat([activations(layer_of(other, 2), one) for one in passed])
    gone = torch.cat([a.leaving_TD - b.leaving_TD for a, b in zip(wanted, passed, strict=True)])
    weigh = torch.cat([1 / one.leaving_TD.square().mean(dim=1) for one in wanted])
    order = held_last()
    torch.testing.assert_close(z_TN, expected[order].float(), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(missing_TD, gone[order], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(weight_T, weigh[order], rtol=1e-4, atol=1e-6)
    by_hand = float((gone.double().square().sum(dim=1) * weigh).sum())
    assert square == pytest.approx(by_hand, rel=1e-4)


def test_documents_are_held_out_whole() -> None:
    model = tiny_model("mixtral")
    lengths = [int(row.sum()) for batch in BATCHES for row in batch["attention_mask"]]
    kept = [n for place, n in enumerate(lengths, 1) if place % 4]
    with opened(model, BATCHES, pruned(model), 1) as layer:
        numbers = [sum(len(one.z_TN) for one in layer.rows(held)) for held in (False, True)]
    assert len(lengths) == 2 * DOCUMENTS
    assert numbers == [sum(kept), sum(lengths) - sum(kept)]


def test_the_rows_of_a_part_are_its_columns_on_the_tokens_that_it_gets() -> None:
    model = tiny_model("qwen2_moe")
    with opened(model, BATCHES, narrow_plan(model, UNEVEN), 2) as layer:
        assert layer.parts == [
            *(Part(expert, width) for expert, width in enumerate(UNEVEN) if width), Part(None, 24),
        ]  # fmt: skip
        assert layer.num_units == sum(UNEVEN) + 24
        whole = torch.cat([one.z_TN for one in layer.rows(held=True)])
        start = 0
        for part in layer.parts:
            zeros_ND = torch.zeros(part.width, 32)
            rows = torch.cat([one.z_TN for one in layer.rows_of(part, zeros_ND, held=True)])
            block = whole[:, start : start + part.width]
            torch.testing.assert_close(rows, block[block.abs().sum(dim=1) > 0])
            start += part.width


def test_what_a_part_adds_is_no_longer_missing() -> None:
    model = tiny_model("qwen2_moe")
    generator = torch.Generator().manual_seed(0)
    with opened(model, BATCHES, pruned(model), 2) as layer:
        part = layer.parts[1]
        change_ND = torch.randn(part.width, 32, generator=generator)
        before = list(layer.rows_of(part, torch.zeros_like(change_ND), held=False))
        layer.add(part, change_ND)
        after = list(layer.rows_of(part, torch.zeros_like(change_ND), held=False))
        again = list(layer.rows_of(part, change_ND, held=False))
    for one, two, three in zip(before, after, again, strict=True):
        torch.testing.assert_close(one.missing_TD - one.z_TN @ change_ND, two.missing_TD)
        torch.testing.assert_close(one.missing_TD, three.missing_TD, rtol=1e-4, atol=1e-5)


def test_factors_of_a_block_are_found() -> None:
    for kind, factors in {"a factor": (2.5, 1.0), "an average": (0.5, 0.5)}.items():
        model = odd_model(kind)
        with opened(model, BATCHES, pruned(model), 1) as layer:
            assert layer.factors == pytest.approx(factors, rel=1e-4)
        before = odd_model(kind).state_dict()
        assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())


def test_the_factor_of_a_decoder_layer_is_found() -> None:
    sizes = {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 16}
    model = tiny_model("granitemoe", residual_multiplier=0.25, **sizes)
    with opened(model, BATCHES, pruned(model), 1) as layer:
        assert layer.factors == pytest.approx((0.25, 1.0), rel=1e-4)


def test_what_is_no_multiple_is_refused() -> None:
    model = odd_model("a norm behind")
    plan, words = pruned(model), "NormedBehind does more with what its hidden units add"
    with pytest.raises(UserError, match=words), opened(model, BATCHES, plan, 1):
        pass


def test_states_that_are_not_finite_are_told_with_their_layer() -> None:
    model = tiny_model("mixtral")
    plan = pruned(model)
    with torch.no_grad():
        layer_of(model, 2).experts.down_proj[1] = torch.nan
    with pytest.raises(NotFinite, match="layer 2"), opened(model, BATCHES, plan, 2):
        pass


def test_it_leaves_nothing_in_the_cache() -> None:
    model = tiny_model("mixtral")
    with opened(model, BATCHES, pruned(model), 1) as layer:
        held = layer.stream.cache.held
        layer.close()
        assert layer.stream.cache.held < held
        assert not [key for key in layer.stream.cache._memory if "edited layer" in key]
