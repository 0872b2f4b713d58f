"""Dropping a layer, a block, or nothing: what such edits say of themselves, and what they leave."""

from __future__ import annotations

import pytest
import torch
from families import EACH_FAMILY, tiny_model

from moe_lab.models.edits.base import Edit, Fate
from moe_lab.models.edits.drop_block import DropBlock
from moe_lab.models.edits.drop_layer import DropLayer
from moe_lab.models.edits.keep import KeepLayer
from moe_lab.models.edits.plan import Plan, restructure_model
from moe_lab.models.layers import hidden_of, moe_layers


@pytest.mark.parametrize("kind", [KeepLayer, DropLayer, DropBlock])
def test_what_they_say_of_themselves(kind: type[Edit]) -> None:
    edit, stays = kind(1, "x", scores=(0.5,)), kind is KeepLayer
    assert (edit.layer_score, edit.expert_scores, edit.cells) == (0.5, (), {})
    assert (edit.changes, edit.leaves_moe, edit.drops_layer) == (not stays, stays, not stays)
    assert edit.removes_decoder == (kind is DropBlock)
    assert edit.experts_kept == (None if stays else ())
    assert edit.fate(2) == Fate("kept" if stays else "removed")
    assert edit.trains == "nothing"
    assert Plan((edit,)).edited() == (() if stays else (edit,))


@EACH_FAMILY
def test_a_dropped_layer_adds_nothing(family: str) -> None:
    layer, x_BLD = moe_layers(tiny_model(family))[0], torch.randn(2, 3, 32)
    made = DropLayer(layer.info.index, layer.info.name).apply(layer, {})
    assert not hidden_of(made(x_BLD)).any()
    with torch.no_grad():
        assert isinstance(made(x_BLD), tuple) == isinstance(layer.block(x_BLD), tuple)


def test_a_dropped_block_takes_its_decoder_layer_along() -> None:
    model = tiny_model("mixtral")
    layer = moe_layers(model)[1]
    edit = DropBlock(1, layer.info.name)
    assert edit.apply(layer, {}) is layer.block, "it goes behind all other edits"
    others = [model.model.layers[index] for index in (0, 2, 3)]
    restructure_model(model, [edit])
    assert list(model.model.layers) == others
