"""A checkpoint that was just written, read back and compared with the model it was written from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_lab.models.checkpoint import Checkpoint, load
from moe_lab.models.layerwise import LayerwiseModel
from moe_lab.models.opening import text_config
from moe_lab.models.stored import dtype_name
from moe_lab.models.stream import LayerStream
from moe_lab.types import NotFinite, UserError

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


@torch.no_grad()
def few_logits(model: PreTrainedModel) -> Tensor:
    """The logits [B, L, V] of a few random tokens, always the same, in float64."""
    batch = {name: t.to(model.device) for name, t in _tokens(model.config).items()}
    training = model.training
    with _no_router_loss(model):
        try:
            logits: Tensor = model.eval()(**batch, use_cache=False).logits
        finally:
            model.train(training)
    return logits.double().cpu()


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
    """The tokens of `few_logits` on their way through a model, one decoder layer after another.

    hidden: what the next layer gets of them, [B, L, D]; hands_on: whether that is not all that it
    gets. UserError for a family that cannot go layer by layer.
    """

    def __init__(self, source: LayerwiseModel):
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


@torch.no_grad()
def check_saved(model: PreTrainedModel, folder: Path, expected: Tensor, dtype: torch.dtype) -> None:
    """Compare every tensor with the model's bit for bit, and `few_logits` with the `expected`.

    dtype: in which the latter were computed, and the checkpoint is read. It is read whole where
    memory is left for that, else a decoder layer at a time. Raises NotReadBack where anything
    differs.
    """
    found = None
    if psutil.virtual_memory().available < 1.5 * _size(model):
        with suppress(UserError):  # of a family that cannot go layer by layer
            found = _by_layer(model, folder, dtype)
    if found is None:
        again = load(folder, dtype=dtype_name(dtype))
        _compare_tensors(folder, model, again)
        found = few_logits(again)
    _compare_logits(folder, found, expected, dtype, model.config.model_type)


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


def _by_layer(model: PreTrainedModel, folder: Path, dtype: torch.dtype) -> Tensor:
    again = LayerwiseModel(Checkpoint(folder, dtype_name(dtype)))
    few = FewTokens(again)
    for index in range(len(again.layers)):
        with again.layer(index) as decoder:
            path = next(name for name, module in again.model.named_modules() if module is decoder)
            _compare_tensors(folder, model.get_submodule(path), decoder)
            few.through(index)
    return few.logits()


def _compare_tensors(folder: Path, one: nn.Module, other: nn.Module) -> None:
    mine, theirs = one.state_dict(), other.state_dict()
    wrong = sorted(mine.keys() ^ theirs.keys())
    wrong += [
        name
        for name, tensor in mine.items()
        if name in theirs and not torch.equal(tensor.cpu().to(theirs[name].dtype), theirs[name])
    ]
    if wrong:
        tensor = mine.get(wrong[0])
        if tensor is not None and not bool(tensor.isfinite().all()):  # NaN equals nothing
            raise NotFinite(f"the edited model's {wrong[0]} is not finite")
        raise NotReadBack(
            f"{folder} was read back, and {len(wrong)} of its tensors are not those that were "
            f"written, such as {wrong[0]}. Please report this"
        )


def _size(model: PreTrainedModel) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in model.parameters())
