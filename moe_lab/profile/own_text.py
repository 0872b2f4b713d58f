"""Text that the model writes itself, beside a calibration set that shows only some of what it does.

A layer that is fitted to one kind of text forgets the others, however strongly the fit holds to
what was there: already the choice of its hidden units knows that text alone. A model writes by
itself, from its first token on and drawn by its own probabilities, what it was trained on
(self-calibration, 2410.17170). So some of that goes beside the calibration set, as documents
behind its last one.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from moe_lab.models.checkpoint import Model
from moe_lab.profile.profile import Profile
from moe_lab.types import UserError

LENGTHS = range(16, 257)  # tokens that a document may have
WRITTEN_AT_ONCE = 16  # documents that are written together


def with_own_text(profile: Profile, number: int) -> Profile:
    """The same calibration set, behind which so many documents stand that the model wrote.

    They are as long as its documents on the average, within LENGTHS.
    """
    length = round(float(profile.statistics[0]["tokens"]) / max(profile.num_documents, 1))
    added = own_text(profile, number, min(max(length, LENGTHS[0]), LENGTHS[-1]))
    return dataclasses.replace(
        profile,
        open_stream=functools.partial(profile.open_stream, added=added),
        num_documents=profile.num_documents + number,
    )


def own_text(profile: Profile, number: int, length: int, seed: int = 0) -> list[list[int]]:
    """So many documents of so many tokens each, remembered."""

    def work() -> dict[str, Tensor]:
        model, _ = profile.open_model(1)
        return {"ids": written_by(model, number, length, seed).int()}

    question = {"question": "own text", "number": number, "length": length, "seed": seed}
    ids_BL = profile.remember_tensors(question, work, [written_by])["ids"]
    documents: list[list[int]] = ids_BL.tolist()
    return documents


@torch.no_grad()
def written_by(model: Model, number: int, length: int, seed: int) -> Tensor:
    """Documents [B, L] drawn token by token from the model's own predictions, the same each time.

    Each begins with the token with which texts begin, and no text ends before its length.
    """
    first = first_token(model.config)
    devices = [model.device] if model.device.type == "cuda" else []
    parts = []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        for start in range(0, number, WRITTEN_AT_ONCE):
            rows = min(WRITTEN_AT_ONCE, number - start)
            parts.append(_continued(model, torch.full((rows, 1), first), length - 1).cpu())
    return torch.cat(parts)


def _continued(model: Model, ids_B1: Tensor, number: int) -> Tensor:
    """The ids, and so many tokens behind them; nothing that a config asks for changes the odds."""
    ids_B1 = ids_B1.to(model.device)
    try:
        return cast("Callable[..., Tensor]", model.generate)(
            ids_B1, attention_mask=torch.ones_like(ids_B1), do_sample=True, temperature=1.0,
            top_k=0, top_p=1.0, repetition_penalty=1.0, num_beams=1, pad_token_id=int(ids_B1[0]),
            max_new_tokens=number, min_new_tokens=number,
        )  # fmt: skip
    except Exception as error:  # a family's own way of not generating
        raise UserError(
            f"condense.own_documents: {type(model).__name__} writes no text "
            f"({' '.join(str(error).split())[:200]}): condense.own_documents=0"
        ) from error


def first_token(config: Any) -> int:
    """The token with which a text begins; where there is none, that with which the last one ended.

    Raises UserError where the config names neither.
    """
    for name in ("bos_token_id", "eos_token_id"):
        token = getattr(config.get_text_config(), name, None)
        token = token[0] if isinstance(token, Sequence) and token else token
        if isinstance(token, int):
            return token
    raise UserError(
        "condense.own_documents: the model writes from its first token on, and its config names "
        "neither bos_token_id nor eos_token_id: condense.own_documents=0"
    )
