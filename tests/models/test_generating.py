"""Loops of our own: what slow ones without caches give, whatever stands beside a prompt."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import slow_decoding
import torch
from families import tiny_model
from torch import Tensor

from moe_lab.evaluate.decoding.scmoe import SCMoE
from moe_lab.models.generating import ContrastiveSearch, Pass
from moe_lab.types import UserError

TOKENS = 7
PROMPTS = [[5, 9, 31, 77, 12, 60, 8, 44], [70, 3, 18, 18, 90], [11, 52, 66]]


def padded(prompts: list[list[int]] = PROMPTS) -> dict[str, Any]:
    """What `generate` takes: prompts padded on the left, so many tokens each."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(one)) + one for one in prompts])
    sizes = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS}
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "do_sample": False} | sizes


def text_of(model: Any, loop: Any, prompts: list[list[int]] = PROMPTS) -> list[list[int]]:
    return model.generate(**padded(prompts), custom_generate=loop)[:, -TOKENS:].tolist()


def of_family(family: str) -> Any:
    model = tiny_model(family)
    model.generation_config.eos_token_id = None  # nothing forbids a token
    return model


@pytest.mark.parametrize(("rank", "alpha", "beta"), [(2, 0.1, 0.5), (3, 0.3, 0.9)])
@pytest.mark.parametrize("family", slow_decoding.FAMILIES)
def test_self_contrast_is_two_whole_passes(
    family: str, rank: int, alpha: float, beta: float
) -> None:
    model, scores = of_family(family), []
    with SCMoE(alpha, beta, rank=rank).opened(model) as decoder:

        def combine(strong: Tensor, weak: Tensor) -> Tensor:
            scores.append(decoder.loop.combine(strong, weak))
            return scores[-1]

        found = text_of(model, replace(decoder.loop, combine=combine))
    greedy = text_of(model, None)
    for row, prompt in enumerate(PROMPTS):
        ids, z = slow_decoding.self_contrasted(model, prompt, TOKENS, alpha, beta, rank)
        assert found[row] == ids
        torch.testing.assert_close(torch.stack([one[row] for one in scores]), z,
                                   rtol=1e-4, atol=1e-4)  # fmt: skip
    assert found != greedy


def test_the_passes_share_no_cache() -> None:
    """Two caches, each as long as the text; greedy in between is what it was."""
    model, seen = of_family("mixtral"), {}

    def note(module: Any, args: Any, named: dict[str, Any], output: Any) -> None:
        cache = output.past_key_values
        seen.setdefault(id(cache), []).append(cache.get_seq_length())

    greedy = text_of(model, None)
    with SCMoE().opened(model) as decoder:
        handle = model.register_forward_hook(note, with_kwargs=True)
        text_of(model, decoder.loop)
        handle.remove()
    longest = max(map(len, PROMPTS))
    assert list(seen.values()) == 2 * [[longest + number for number in range(TOKENS)]]
    assert text_of(model, None) == greedy


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss"])
def test_contrastive_search_is_the_slow_one(family: str) -> None:
    model = of_family(family)
    found = text_of(model, ContrastiveSearch(3, 0.6))
    slow = [slow_decoding.searched(model, prompt, TOKENS, 3, 0.6) for prompt in PROMPTS]
    assert found == slow != text_of(model, None)
    for loop in (ContrastiveSearch(1, 0.6), ContrastiveSearch(4, 0.0)):
        assert text_of(model, loop) == text_of(model, None), "only the likeliest, or no penalty"


def test_a_row_ends_where_it_is_stopped() -> None:
    """Behind its end a row has padding alone, and the others go on."""
    model = of_family("mixtral")
    with SCMoE().opened(model) as decoder:
        whole = text_of(model, decoder.loop)
        model.generation_config.eos_token_id = whole[0][2]
        cut = model.generate(
            **padded() | {"min_new_tokens": 0}, custom_generate=decoder.loop, pad_token_id=0
        )[:, len(PROMPTS[0]) :].tolist()
    assert cut[0] == whole[0][:3] + [0] * (len(cut[0]) - 3)
    assert whole[0][2] not in whole[1] and cut[1] == whole[1]


def test_what_a_loop_cannot_do_is_refused() -> None:
    model = of_family("mixtral")
    for asked in ({"do_sample": True}, {"num_beams": 2}):
        with pytest.raises(UserError, match=r"asks for sampling or beams.*decoding=greedy"):
            model.generate(**padded() | asked, custom_generate=ContrastiveSearch(2, 0.5))


def test_a_cache_that_cannot_be_repeated_is_refused() -> None:
    """As that of a family with recurrent states."""
    one = Pass(of_family("mixtral"), {"past_key_values": SimpleNamespace(layers=[object()])})
    with pytest.raises(UserError, match=r"cache of the family 'mixtral'.*cannot be repeated"):
        one.repeat(2)
