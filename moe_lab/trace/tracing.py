"""The options of `trace`: whose prompts are continued, how far, and what is kept of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from moe_lab.data.source import Source
from moe_lab.data.tokens import Tokens
from moe_lab.option import Option, Plugin, check_options
from moe_lab.types import UserError

ACCESS = ("atomic", "sequential")


@dataclass(frozen=True)
class Tracing(Plugin):
    """What is traced: a request for each prompt, continued greedily by so many tokens."""

    prompts: Annotated[Source, Option("where the prompts come from, one for each request")]
    new_tokens: Annotated[int, Option("tokens that are generated behind each prompt", least=1)] = 32
    lookahead: Annotated[
        int, Option("for how many layers ahead a layer's input predicts the experts", least=0)
    ] = 2
    batch_size: Annotated[
        int, Option("requests of one length that are generated together", least=1)
    ] = 1
    access: Annotated[
        str,
        Option("whether the experts of a layer are needed together or one by one", among=ACCESS),
    ] = "atomic"

    def __post_init__(self) -> None:
        check_options(self, "trace")

    def check_positions(self, positions: int | None) -> None:
        """Refuse requests longer than the model."""
        longest = self.prompts.max_length + self.new_tokens
        if positions is not None and longest > positions:
            raise UserError(
                f"trace.prompts.max_length={self.prompts.max_length} and trace.new_tokens="
                f"{self.new_tokens} make requests of {longest} tokens, and the model has "
                f"{positions} positions (max_position_embeddings): ask for fewer of either"
            )


def prompts_of(tokens: Tokens) -> tuple[tuple[int, ...], ...]:
    """The prompts of samples: of a prompt with its answer the prompt, else the whole sample."""
    if not tokens.prompts:
        return tokens.samples
    pairs = zip(tokens.samples, tokens.prompts, strict=True)
    return tuple(sample[:number] if number else sample for sample, number in pairs)
