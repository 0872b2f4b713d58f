"""A prompt with an image for a tiny multimodal model, found by trying what its code takes."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from moe_lab.families.sizes import FIRST_TEXT_ID, VOCABULARY

TOKEN_NAMES = ("image_token_id", "image_token_index", "im_patch_id")
TEXT_BEFORE, TEXT_BEHIND = 5, 6


def takes_images(model: Any) -> bool:
    """Whether the model looks at images."""
    return _vision(model) is not None and "pixel_values" in _parameters(model.forward)


@torch.no_grad()
def image_batch(model: Any) -> dict[str, Tensor] | None:
    """Text around one image as the model's inputs; None where nothing that was tried is taken.

    Only what changes the logits with the image is a prompt with an image.
    """
    for inputs in _inputs(model):
        try:
            batch = _prompt(model, inputs)
            logits = model(**batch, use_cache=False).logits
            other = model(**batch | {"pixel_values": -batch["pixel_values"]}, use_cache=False)
        except Exception:  # noqa: BLE001  # not what this family takes
            continue
        if not torch.equal(logits, other.logits) and bool(logits.isfinite().all()):
            return batch
    return None


def _vision(model: Any) -> Any:
    return vars(model.config).get("vision_config")


def _parameters(function: Any) -> set[str]:
    return set(inspect.signature(function).parameters)


def _inputs(model: Any) -> Iterator[dict[str, Tensor]]:
    """The shapes in which families take one image."""
    vision = vars(_vision(model))
    patch = int(vision.get("patch_size") or 14)
    channels = int(vision.get("in_channels") or vision.get("num_channels") or 3)
    frames = int(vision.get("temporal_patch_size") or 1)
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    for side in (4, 2):  # an image of so many patches in each direction, as rows or as pixels
        grid = torch.tensor([[1, side, side]])
        for width in {channels * frames * patch * patch, channels * patch * patch}:
            for name in ("image_grid_thw", "grid_thws"):
                yield {"pixel_values": drawn(side * side, width), name: grid}
        yield {"pixel_values": drawn(side * side, channels, patch, patch), "image_grid_thw": grid}
    for size in (int(vision.get("image_size") or 2 * patch), 4 * patch, 2 * patch):
        pixels = drawn(1, channels, size, size)
        yield {"pixel_values": pixels, "image_sizes": torch.tensor([[size, size]])}
        yield {"pixel_values": pixels}


def _prompt(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Text, as many image tokens as the image gives features, text."""
    owner = model if hasattr(model, "get_image_features") else model.model
    found = owner.get_image_features(**inputs)
    features = getattr(found, "pooler_output", found)
    rows = features if isinstance(features, list | tuple) else [features]
    width = model.get_input_embeddings().weight.shape[1]
    number = sum(row.numel() // width for row in rows)
    token = next(vars(model.config)[one] for one in TOKEN_NAMES if one in vars(model.config))
    text = torch.arange(FIRST_TEXT_ID, VOCABULARY)
    ids = torch.cat([text[:TEXT_BEFORE], torch.full((number,), int(token)), text[-TEXT_BEHIND:]])[
        None
    ]
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | inputs
    if "mm_token_type_ids" in _parameters(model.forward):
        batch["mm_token_type_ids"] = (ids == token).long()
    return batch
