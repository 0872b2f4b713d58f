"""Log-likelihoods behind shared prompts against lm-eval's own, text by text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import EACH_FAMILY, tiny_model
from lm_eval.models.huggingface import HFLM

from moe_lab.evaluate.continuations import Continuation, Continuations, Likelihood
from moe_lab.evaluate.decoding.base import Decoder
from moe_lab.models.checkpoint import Model

HYBRIDS = {
    "qwen3_next": dict(
        num_experts=8, num_experts_per_tok=2, moe_intermediate_size=16, intermediate_size=48,
        shared_expert_intermediate_size=24, head_dim=8, linear_num_key_heads=2,
        linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8,
    ),
    "jamba": dict(
        num_experts=4, num_experts_per_tok=2, intermediate_size=48, expert_layer_period=2,
        expert_layer_offset=1, attn_layer_period=2, attn_layer_offset=1, mamba_d_state=4,
        mamba_dt_rank=4, use_mamba_kernels=False,
    ),
}  # fmt: skip


class Counting(Decoder):
    """Counts the tokens that go through the model."""

    tokens = 0

    def logits(self, ids_BL: torch.Tensor, *arguments: Any) -> torch.Tensor:
        self.tokens += ids_BL.numel()
        return super().logits(ids_BL, *arguments)

    def cache(self, ids_BL: torch.Tensor) -> Any:
        self.tokens += ids_BL.numel()
        return super().cache(ids_BL)


def questions() -> list[Continuation]:
    """Twelve prompts of 9 to 20 tokens with four answers of one to four tokens, and two alone."""
    generator = torch.Generator().manual_seed(1)

    def ids(number: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, 96, (number,), generator=generator).tolist())

    made = []
    for number in range(12):
        prompt = ids(9 + number)
        for length in (1, 2, 3, 4):
            answer = ids(length)
            made.append(Continuation((prompt + answer)[:-1], answer))
    return [*made, Continuation((5,), (7,)), Continuation((5, 9, 11), (9, 11, 4))]


def plain(model: Model, tokenizer: Any, asked: list[Continuation]) -> list[Likelihood]:
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
    requests = [(None, list(one.prompt), list(one.targets)) for one in asked]
    found: list[Likelihood] = lm._loglikelihood_tokens(requests, disable_tqdm=True)
    return found


def check(found: list[Likelihood], expected: list[Likelihood], close: float = 1e-5) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one == (pytest.approx(other[0], rel=close), other[1])


@EACH_FAMILY
def test_prompts_are_computed_once(family: str, tokenizer: Any) -> None:
    """With windows of eight tokens too, which the prompts are longer than."""
    model, asked = tiny_model(family), questions()
    decoder = Counting(model)
    check(Continuations(decoder, 5, 1000).scores(asked), plain(model, tokenizer, asked))
    assert decoder.tokens < 0.8 * sum(len(one.inputs) for one in asked)


@pytest.mark.parametrize("family", HYBRIDS)
def test_recurrent_states_may_be_such_a_cache(family: str, tokenizer: Any) -> None:
    """Whether they are or not: their sums round more coarsely, chunk by chunk."""
    model, asked = tiny_model(family, **HYBRIDS[family]), questions()
    found = Continuations(Decoder(model), 5, 1000).scores(asked)
    check(found, plain(model, tokenizer, asked), close=1e-4)


def test_a_cache_that_gives_other_values_is_left(tokenizer: Any) -> None:
    class Wrong(Counting):
        def cache(self, ids_BL: torch.Tensor) -> Any:
            return super().cache(ids_BL.flip(1))

    model, asked = tiny_model("mixtral"), questions()
    decoder = Wrong(model)
    check(Continuations(decoder, 5, 1000).scores(asked), plain(model, tokenizer, asked))
    assert decoder.tokens > sum(len(one.inputs) for one in asked)


def test_half_precision_keeps_to_whole_texts(tokenizer: Any) -> None:
    model, asked = tiny_model("mixtral").bfloat16(), questions()
    decoder = Counting(model)
    assert Continuations(decoder, 1, 1000).scores(asked) == plain(model, tokenizer, asked)
    assert decoder.tokens == sum(len(one.inputs) for one in asked)


def test_what_the_cache_holds_is_bounded() -> None:
    sizes = []

    class Looking(Decoder):
        def logits(self, ids_BL: torch.Tensor, chosen_BL: torch.Tensor, cache: Any = None) -> Any:
            if cache is not None:
                sizes.append(len(ids_BL) * (cache.get_seq_length() + ids_BL.shape[1]))
            return super().logits(ids_BL, chosen_BL, cache)

    Continuations(Looking(tiny_model("mixtral")), 5, 200).scores(questions())
    assert len(sizes) > 3 and max(sizes) <= 200
