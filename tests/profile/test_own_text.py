"""What a model writes itself: drawn by its own probabilities, and behind the calibration set."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import tiny_model
from fitted_layers import subject_of

from moe_lab.profile.own_text import first_token, own_text, with_own_text, written_by
from moe_lab.types import UserError


def test_tokens_are_drawn_by_the_models_own_probabilities() -> None:
    """Whatever its generation_config asks for; to four standard errors of 6,000 draws."""
    model = tiny_model("qwen2_moe")
    model.generation_config.update(
        do_sample=True, temperature=0.1, top_k=2, top_p=0.3, repetition_penalty=9.0
    )
    ids_BL = written_by(model, 6000, 2, seed=0)
    with torch.no_grad():
        logits_V = model(input_ids=torch.tensor([[1]])).logits[0, -1].double()
    logits_V[model.config.eos_token_id] = -torch.inf  # no text ends before its length
    expected_V = logits_V.softmax(dim=0)
    found_V = torch.bincount(ids_BL[:, 1], minlength=len(expected_V)) / len(ids_BL)
    error_V = (expected_V * (1 - expected_V) / len(ids_BL)).sqrt()
    assert bool(((found_V - expected_V).abs() <= 4 * error_V + 1e-12).all())
    assert int((found_V > 0).sum()) > 20


def test_a_text_goes_on_from_what_it_says() -> None:
    """Greedy where the head is sharp: each token is the best behind those before it."""
    model = tiny_model("qwen2_moe")
    with torch.no_grad():
        model.lm_head.weight.mul_(1e4)
        ids_BL = written_by(model, 3, 9, seed=0)
        logits_BLV = model(input_ids=ids_BL).logits[:, :-1]
    logits_BLV[..., model.config.eos_token_id] = -torch.inf
    assert torch.equal(logits_BLV.argmax(dim=2), ids_BL[:, 1:])
    assert ids_BL[:, 0].tolist() == [1, 1, 1]


def test_the_same_each_time_and_nobody_elses_numbers() -> None:
    model = tiny_model("mixtral")
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first_BL = written_by(model, 20, 12, seed=0)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert first_BL.shape == (20, 12)
    assert torch.equal(written_by(model, 20, 12, seed=0), first_BL)
    assert not torch.equal(written_by(model, 20, 12, seed=1), first_BL)
    assert len({tuple(row) for row in first_BL.tolist()}) == 20  # also those written apart


def test_a_model_that_writes_nothing_says_how_to_do_without() -> None:
    model = tiny_model("mixtral")
    model.prepare_inputs_for_generation = None
    with pytest.raises(UserError, match=r"MixtralForCausalLM writes no.*own_documents=0"):
        written_by(model, 1, 5, seed=0)


def named(**tokens: Any) -> Any:
    config = SimpleNamespace(**tokens)
    config.get_text_config = lambda: config
    return config


def test_the_token_with_which_a_text_begins() -> None:
    assert first_token(named(bos_token_id=7, eos_token_id=2)) == 7
    assert first_token(named(bos_token_id=None, eos_token_id=2)) == 2
    assert first_token(named(eos_token_id=[4, 5])) == 4
    with pytest.raises(UserError, match=r"neither.*condense\.own_documents=0"):
        first_token(named(bos_token_id=None, eos_token_id=[]))


def test_documents_stand_behind_those_of_the_calibration_set() -> None:
    subject = subject_of("qwen2_moe", documents=12)
    profile = with_own_text(subject.profile, 10)
    assert (subject.profile.num_documents, profile.num_documents) == (12, 22)
    written = own_text(subject.profile, 10, 16)
    stream = profile.open_stream(documents=[3, 20, 12, 0])
    assert stream.positions == [3, 20, 12, 0]
    rows = [
        ids[valid].tolist()
        for batch_ids, batch_valid in zip(stream.input_ids, stream.valid, strict=True)
        for ids, valid in zip(batch_ids, batch_valid, strict=True)
    ]
    assert rows[1:3] == [written[8], written[0]]
    given = [subject.batches[place] for place in (3, 0)]
    assert [rows[0], rows[3]] == [
        one["input_ids"][one["attention_mask"].bool()].tolist() for one in given
    ]
    assert subject.profile.open_stream().positions == list(range(12))


def test_documents_are_as_long_as_those_of_the_calibration_set_within_limits() -> None:
    asked: list[dict[str, Any]] = []

    def remembered(identity: dict[str, Any], work: Any, code: object) -> Any:
        asked.append(identity)
        return {"ids": torch.ones(identity["number"], identity["length"], dtype=torch.int32)}

    class Sums(dict[str, float]):
        pass

    for documents, tokens, length in ((10, 1004, 100), (100, 10_000_000, 256), (8, 8, 16)):
        profile: Any = subject_of("qwen2_moe").profile
        profile = type(profile)(
            [Sums(tokens=float(tokens))], profile.open_stream,
            remember_tensors=remembered, num_documents=documents,
        )  # fmt: skip
        assert with_own_text(profile, 5).num_documents == documents + 5
        assert (asked[-1]["number"], asked[-1]["length"]) == (5, length)
