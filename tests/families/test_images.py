"""A prompt with an image is one: its logits change with the image."""

from __future__ import annotations

import torch

from moe_lab.families.images import image_batch, takes_images
from moe_lab.families.tiny import tiny_model


def test_a_model_that_looks_at_images_gets_one() -> None:
    model = tiny_model("qwen3_vl_moe")
    assert takes_images(model)
    batch = image_batch(model)
    assert batch is not None
    number = int((batch["input_ids"] == model.config.image_token_id).sum())
    assert number == 4 and batch["pixel_values"].shape[0] == 16
    with torch.no_grad():
        plain = model(**batch).logits
        black = model(**batch | {"pixel_values": torch.zeros_like(batch["pixel_values"])}).logits
    assert not torch.equal(plain, black)


def test_a_model_of_text_takes_none() -> None:
    assert not takes_images(tiny_model("mixtral"))


def test_an_image_that_changes_nothing_is_none() -> None:
    model = tiny_model("qwen3_vl_moe")
    model.model.visual.merger.linear_fc2.weight.data.zero_()
    for merger in model.model.visual.deepstack_merger_list:
        merger.linear_fc2.weight.data.zero_()
    assert image_batch(model) is None
