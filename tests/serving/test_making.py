"""What is made of the models: forms of every kind, and what transformers computes with them."""

from __future__ import annotations

import pytest
import torch

from moe_lab.models.checkpoint import load
from moe_lab.serving.checkpoints import Served
from moe_lab.serving.making import INTACT, NUM_NEW_TOKENS, PROMPTS, recipes, stored
from moe_lab.serving.subjects import subjects
from moe_lab.store import Store

BY_NAME = {one.name: one for one in subjects()}


def test_every_method_is_there() -> None:
    for subject in subjects():
        made = list(recipes(subject))
        assert made[0] == INTACT
        words = " ".join(made).lower()
        for word in ("prune", "drop_layers", "constant", "cd-moe" if not subject.random else "con"):
            assert word in words, (subject.name, word)
    shipped = " ".join(recipes(BY_NAME["tiny_deepseek"]))
    for word in ("m_smoe", "hc_smoe", "ream", "zero", "copy", "global", "drop_blocks", "twins"):
        assert word in shipped


def test_the_reference_is_what_moe_lab_computes(few: list[Served]) -> None:
    """Decoded here with a cache, by transformers' own generate."""
    dense = few[0]
    model = load(dense.folder, dtype="float32")
    assert len(dense.prompts) == len(PROMPTS) == 3
    for place, prompt in enumerate(dense.prompts):
        ids = torch.tensor([prompt])
        with torch.no_grad():
            logprobs_V = model(ids).logits[0, -1].log_softmax(-1)
        torch.testing.assert_close(
            dense.reference["logprobs"][place].float(), logprobs_V, rtol=1e-4, atol=1e-4
        )
        tokens = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0,
            max_new_tokens=NUM_NEW_TOKENS, min_new_tokens=NUM_NEW_TOKENS,
        )  # fmt: skip
        assert tokens[0, len(prompt) :].tolist() == dense.reference["tokens"][place].tolist()
    assert dense.reference["margins"].shape == (3, NUM_NEW_TOKENS)


def test_what_is_made_is_remembered(few: list[Served], served_store: Store) -> None:
    again = stored(served_store, BY_NAME["random mixtral"], "unequal")
    assert again.cached and again.key == few[2].key


@pytest.mark.parametrize("made", ["condense", "drop_layers"])
def test_dense_layers_are_in_the_middle(made: str, served_store: Store) -> None:
    """A first or last layer is easily forgotten."""
    from moe_lab.models.own_config import read_config

    folder = stored(served_store, BY_NAME["random qwen2_moe"], made).folder
    assert read_config(folder / "checkpoint" / "config.json")["mlp_only_layers"] == [2]
