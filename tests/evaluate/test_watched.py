"""lm-eval's model: what is not finite is no answer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import tiny_model
from lm_eval.api.instance import Instance

from moe_lab.evaluate.decoding.base import Decoder, as_decoding
from moe_lab.evaluate.watched import WatchedLM
from moe_lab.types import NotFinite


@pytest.fixture
def watched(tokenizer: Any) -> WatchedLM:
    model = tiny_model("mixtral", vocab_size=len(tokenizer), max_position_embeddings=512)
    return WatchedLM(Decoder(model), tokenizer=tokenizer, batch_size=2)


def asked(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    """Requests of a task, a document each."""
    return [
        Instance(kind, doc={}, arguments=one, idx=0, metadata=("a_task", number, 1))
        for number, one in enumerate(arguments)
    ]


REQUESTS = {
    "loglikelihood": asked("loglikelihood", ("ab", " cd"), ("ab", " cz"), ("a", " c")),
    "loglikelihood_rolling": asked("loglikelihood_rolling", ("abc",), ("abz",)),
    "generate_until": asked("generate_until", ("ab", {"until": ["\n"], "max_gen_toks": 3})),
}


@pytest.mark.parametrize("kind", REQUESTS)
def test_finite_predictions_are_as_before(watched: WatchedLM, kind: str) -> None:
    found = getattr(watched, kind)(REQUESTS[kind], disable_tqdm=True)
    plain = getattr(super(WatchedLM, watched), kind)(REQUESTS[kind], disable_tqdm=True)
    assert found == plain and len(found) == len(REQUESTS[kind])


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("loglikelihood", "task a_task, document 1: the log-likelihood is NaN"),
        ("loglikelihood_rolling", "task a_task, document 1: the log-likelihood is NaN"),
        ("generate_until", "task a_task: the logits of a generated token are not finite"),
    ],
)
@torch.no_grad()
def test_a_document_that_gives_nan_is_named(watched: WatchedLM, kind: str, words: str) -> None:
    """The letter z has a row of NaN in the embedding, or every token where text is generated."""
    token = watched.tokenizer("z")["input_ids"][0]
    rows = watched.model.model.embed_tokens.weight
    rows[token if kind != "generate_until" else slice(None)] = torch.nan
    requests = REQUESTS[kind]
    if kind == "loglikelihood":  # the continuation's last token is only predicted
        requests = asked(kind, ("ab", " cd"), ("zb", " cd"), ("a", " c"))
    if kind == "loglikelihood_rolling":
        requests = asked(kind, ("abc",), ("zab",))
    with pytest.raises(NotFinite, match=words):
        getattr(watched, kind)(requests, disable_tqdm=True)
    assert not watched.model._forward_hooks


@pytest.mark.parametrize("name", ["scmoe", "dynamic", "contrastive"])
@torch.no_grad()
def test_what_is_decoded_does_not_depend_on_the_batch(tokenizer: Any, name: str) -> None:
    """Prompts of other lengths beside one another; log-likelihoods of that decoding, too."""
    model = tiny_model("deepseek_v3", vocab_size=len(tokenizer), max_position_embeddings=512)
    texts = ["ab", "abcdef gh", "a", "xyz xy"]
    asks = {
        "generate_until": [(text, {"until": ["\n"], "max_gen_toks": 6}) for text in texts],
        "loglikelihood": [(text, " cdab") for text in texts],
    }
    found: dict[int, Any] = {}
    with as_decoding(name).opened(model) as decoder:
        for size in (1, 4):
            one = WatchedLM(decoder, tokenizer=tokenizer, batch_size=size)
            found[size] = [
                getattr(one, kind)(asked(kind, *asks[kind]), disable_tqdm=True) for kind in asks
            ]
    assert found[1][0] == found[4][0]
    plain = WatchedLM(Decoder(model), tokenizer=tokenizer, batch_size=4)
    assert found[4][0] != plain.generate_until(asked("x", *asks["generate_until"]))
    scores = [[score for score, _ in found[size][1]] for size in (1, 4)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-4)
    own = plain.loglikelihood(asked("x", *asks["loglikelihood"]), disable_tqdm=True)
    assert (scores[1] == [score for score, _ in own]) == (name == "contrastive")
