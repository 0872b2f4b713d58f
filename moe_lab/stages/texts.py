"""All text of a run, tokenized; what is impossible about it is refused before any work."""

from __future__ import annotations

import logging
from dataclasses import replace

from moe_lab.data.source import Source
from moe_lab.data.tokens import Tokenizer, Tokens
from moe_lab.finetune.recipe import sources
from moe_lab.stages.parts import Parts
from moe_lab.types import UserError

logger = logging.getLogger(__name__)
TEXT_NAMES = {  # as users know them
    "calibration": "calibration", "held_out": "eval.held_out", "prompts": "trace.prompts",
}  # fmt: skip


def tokenize(
    parts: Parts, tokenizer: Tokenizer, positions: int | None = None, vocabulary: int | None = None
) -> dict[str, Tokens]:
    """All text of a run: calibration, and where they are asked for <phase>/data, held_out, prompts.

    positions: where the model ends, which no sample is longer than; None where it says no number.
    vocabulary: rows of its embedding, in which each token of the text must have one.
    """
    _check_groups(parts)
    if parts.trace:
        parts.trace.check_positions(positions)
    if parts.eval:
        parts.eval.check()
    every = all_sources(parts).items()
    texts = {name: _within(positions, name, source) for name, source in every}
    tokens = {name: _tokens(name, source, tokenizer) for name, source in texts.items()}
    for name, part in tokens.items() if vocabulary else ():
        _check_ids(name, part, vocabulary or 0)
    if parts.eval and tokens["calibration"].groups:
        parts.eval.check_groups(list(tokens["calibration"].by_group()))
    return tokens


def all_sources(parts: Parts) -> dict[str, Source]:
    """Where all text of a run comes from, by its use."""
    texts: dict[str, Source] = {"calibration": parts.calibration}
    if parts.finetune:
        texts |= sources(parts.finetune.phases)
    if parts.eval and parts.eval.held_out:
        texts["held_out"] = parts.eval.held_out
    if parts.trace:
        texts["prompts"] = parts.trace.prompts
    return texts


def _check_groups(parts: Parts) -> None:
    """Refuse a plan for each group where the method makes one for all, or a tuning follows."""
    source = parts.calibration
    if source.group_by is None or source.group is not None:
        return
    asked = f"calibration.group_by={source.group_by} makes a plan for each group"
    one = "; for a single group's checkpoint name it: calibration.group=<value>"
    if not parts.method.takes_groups:
        raise UserError(
            f"{asked}, which only method=prune can do, with statistics of the intact model alone "
            f"and nothing in the place of the experts that go{one}"
        )
    if parts.finetune:
        raise UserError(
            f"{asked} and no checkpoint that could be fine-tuned: set finetune=none{one}"
        )
    if parts.quantize:
        raise UserError(
            f"{asked} and no checkpoint that could be quantized: set quantize=none{one}"
        )
    if parts.eval and parts.eval.top_k:
        raise UserError(f"{asked}, evaluated with the model's own number of experts: leave out "
                        f"eval.top_k{one}")  # fmt: skip


def _within(positions: int | None, name: str, source: Source) -> Source:
    """The source, its samples no longer than the model: cut, and that is said."""
    if positions is None or source.max_length <= positions:
        return source
    logger.warning(
        "%s.max_length=%d is more than the %d positions that the model has "
        "(max_position_embeddings): its samples are cut there",
        _option(name), source.max_length, positions,
    )  # fmt: skip
    return replace(source, max_length=positions)


def _check_ids(name: str, tokens: Tokens, vocabulary: int) -> None:
    """Refuse text with a token that the embedding has no row for."""
    for number, sample in enumerate(tokens.samples):
        if max(sample) >= vocabulary:
            raise UserError(
                f"{_option(name)}: document {number} has the token {max(sample)}, and the model's "
                f"embedding has {vocabulary} rows: one that the tokenizer's class adds is written "
                "out in the text. Leave the document out"
            )


def _option(name: str) -> str:
    """What users know a text by."""
    return TEXT_NAMES.get(name) or f"finetune.phases.{name.replace('/', '.')}"


def _tokens(name: str, source: Source, tokenizer: Tokenizer) -> Tokens:
    try:
        return source.tokens(tokenizer)
    except UserError as error:
        if "/" not in name:
            raise
        raise UserError(f"{_option(name)}: {error}") from error
