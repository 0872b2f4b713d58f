"""The dense model's predictions, kept without the model."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from families import EACH_FAMILY, tiny_batch, tiny_model

from moe_lab.evaluate.dense_predictions import DensePredictions, predicting
from moe_lab.models.activations import Activations

BATCHES = [tiny_batch(0), tiny_batch(1)]


def logits_of(said: DensePredictions, number: int) -> torch.Tensor:
    with torch.inference_mode():
        given, head = said.logits(number, BATCHES[number])
        return given if head is None else head(given)


@EACH_FAMILY
def test_logits_are_those_of_the_whole_model(family: str) -> None:
    model = tiny_model(family)
    said = DensePredictions(model, BATCHES, Activations(2**30))
    for number, batch in enumerate(BATCHES):
        expected = model(**batch).logits[predicting(batch)]
        torch.testing.assert_close(logits_of(said, number), expected, rtol=1e-5, atol=1e-6)


def test_the_model_is_gone() -> None:
    model = tiny_model("qwen2_moe")
    layer = weakref.ref(model.model.layers[0])
    said = DensePredictions(model, BATCHES, Activations(2**30))
    del model
    assert layer() is None
    assert logits_of(said, 0).isfinite().all()


def test_what_is_done_behind_the_head_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model stays, which computes its logits when they are asked for."""
    model = tiny_model("qwen2_moe")
    expected = [3 * model(**batch).logits[predicting(batch)] for batch in BATCHES]
    forward = type(model).forward

    def scaled(*arguments: Any, **named: Any) -> Any:
        output = forward(*arguments, **named)
        output.logits = 3 * output.logits
        return output

    monkeypatch.setattr(type(model), "forward", scaled)
    said = DensePredictions(model, BATCHES, Activations(2**30))
    for number, logits in enumerate(expected):
        torch.testing.assert_close(logits_of(said, number), logits, rtol=1e-5, atol=1e-6)
