"""A checkpoint that was just written, read back and compared with the model it was written from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moe_lab.models.checkpoint import Checkpoint
from moe_lab.models.layerwise import LayerSource, LayerwiseModel
from moe_lab.models.opening import text_config
from moe_lab.models.stored import dtype_name
from moe_lab.models.stream import LayerStream
from moe_lab.types import NotFinite

BATCH = (2, 8)  # sequences, tokens of each
# The largest difference of a logit, as a share of the largest logit.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}


def check_logits(logits: Tensor, dtype: torch.dtype) -> None:
    """Refuse a model whose logits on a few tokens are not finite, before it is written."""
    if not bool(logits.isfinite().all()):
        told = "the edited model's logits on a few tokens are not finite"
        raise NotFinite(f"{told} ({dtype_name(dtype)})")


class NotReadBack(RuntimeError):
    """A checkpoint that does not hold the model it was written from: an error of moe_lab's."""


@contextmanager
def _no_router_loss(model: PreTrainedModel) -> Iterator[None]:
    """While open, a model computes no loss that counts the experts it had before it was edited."""
    config = text_config(model.config)
    asked = getattr(config, "output_router_logits", None)
    if asked:
        config.output_router_logits = False
    try:
        yield
    finally:
        if asked:
            config.output_router_logits = asked


class FewTokens:
    """A few random tokens, always the same, on their way through a model, layer after layer.

    hidden: what the next layer gets of them, [B, L, D]; hands_on: whether that is not all that it
    gets. UserError for a family that cannot go layer by layer.
    """

    def __init__(self, source: LayerSource):
        with _no_router_loss(source.model):
            self._stream = LayerStream(source, [_tokens(source.model.config)])
        self.hidden: Tensor = self._stream.cache["input", 0]
        self.hands_on = bool(self._stream.handed and self._stream.handed.names)

    @torch.no_grad()
    def through(self, index: int) -> None:
        """Through decoder layer `index`, whose weights are in memory."""
        self.hidden = self._stream.replay(index, 0, self.hidden)

    @torch.no_grad()
    def logits(self) -> Tensor:
        """The logits [B, L, V], behind the last layer, in float64."""
        with _no_router_loss(self._stream.model):
            return self._stream.logits(0, self.hidden).double().cpu()


def compare_by_layer(
    folder: Path, expected: Tensor, dtype: torch.dtype, indices: Sequence[int]
) -> None:
    """Read decoder layers of a written checkpoint, one at a time, and compare `FewTokens.logits`.

    indices: the layers through which the tokens go. dtype: in which `expected` was computed.
    Raises NotReadBack where they differ.
    """
    checkpoint = Checkpoint(folder, dtype_name(dtype))
    again = LayerwiseModel(checkpoint)
    few = FewTokens(again)
    for index in indices:
        with again.layer(index):
            few.through(index)
    _compare_logits(folder, few.logits(), expected, dtype, checkpoint.config.model_type)


def _compare_logits(
    folder: Path, found: Tensor, expected: Tensor, dtype: torch.dtype, family: str
) -> None:
    difference = (found - expected).abs().max()
    scale = expected.abs().max().clamp(min=1e-6)
    if not difference <= TOLERANCE[dtype] * scale:  # also where one is NaN
        raise NotReadBack(
            f"{folder} was read back, and computes something else than the model that it was "
            f"written from: logits differ by {difference:.2g}, the largest is {scale:.2g}. Please "
            f"report this with the model's family, {family!r}"
        )


def _tokens(config: Any) -> dict[str, Tensor]:
    """Random text: no token that stands for an image or the like."""
    size = text_config(config).vocab_size
    special = {value for key, value in _fields(config) if key.endswith(("token_id", "token_index"))}
    plain = torch.tensor([i for i in range(min(size, 4096)) if i not in special])
    generator = torch.Generator().manual_seed(0)
    ids = plain[torch.randint(len(plain), BATCH, generator=generator)]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _fields(config: Any) -> Iterator[tuple[str, Any]]:
    for key, value in vars(config).items():
        if isinstance(value, int):
            yield key, value
        elif hasattr(value, "get_text_config"):
            yield from _fields(value)
