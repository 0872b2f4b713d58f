"""Errors of a whole checkpoint, measured in the intact model and kept by layer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from quantised_runs import job_of, tiny_checkpoint, tokens

from moe_lab.models.checkpoint import load
from moe_lab.models.layers import moe_layers
from moe_lab.models.rounded_layer import rounded_layer
from moe_lab.models.rounding import Scheme
from moe_lab.quantize.column_rounding import LevelChoice
from moe_lab.quantize.measuring import CURVES, ErrorsInBits, predictions
from moe_lab.quantize.rtn import RoundToNearest

SCHEMES = [Scheme(2, 8), Scheme(8, 8)]


@pytest.mark.parametrize(("by", "compensated"), [("layer", True), ("expert", False)])
def test_errors_fall_with_bits_and_are_asked_once(
    by: str, compensated: bool, tmp_path: Path
) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "source", "mixtral")
    job = job_of(checkpoint, RoundToNearest(4, 8), tmp_path / "job")
    measuring = ErrorsInBits(
        [LevelChoice(one) for one in SCHEMES], by, compensated, "output", "none", 1
    )
    found = measuring.outputs(job)
    assert list(found) == [0, 1, 2, 3]
    for errors in found.values():
        assert len(errors) == (1 if by == "layer" else 8)
        assert all(few > many for few, many in errors if few)
    (job.folder / CURVES / "2.json").write_text(json.dumps([[7.0, 1.0]]))
    assert measuring.outputs(job)[2] == [[7.0, 1.0]]


def test_divergence_of_predictions_is_that_of_a_model_with_one_layer_in_few_bits(
    tmp_path: Path,
) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "source", "mixtral")
    job = job_of(checkpoint, RoundToNearest(4, 8), tmp_path / "job")
    found = predictions(job, SCHEMES, 4)
    model = load(checkpoint.path)
    [batch] = tokens().take(range(4)).batches(4, "cpu")
    valid = batch["attention_mask"].bool()
    with torch.no_grad():
        p = model(**batch).logits[valid].double().log_softmax(-1)
        with rounded_layer(moe_layers(model)[2], SCHEMES[0]):
            q = model(**batch).logits[valid].double().log_softmax(-1)
    expected = float((p.exp() * (p - q)).sum(-1).mean())
    assert found[2][0][0] == pytest.approx(expected, rel=1e-3)
