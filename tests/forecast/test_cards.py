"""Cards by name."""

from __future__ import annotations

import pytest

from moe_lab import compute
from moe_lab.forecast.cards import CARDS, UTILISATION, card_named, card_of
from moe_lab.types import UserError


def test_the_option_lists_the_cards() -> None:
    assert compute.CARD_NAMES == ("cpu", *sorted(CARDS)) == ("cpu", *CARDS)


def test_a_card_by_name() -> None:
    card = card_named("h100")
    assert card is not None
    assert card.rate(2) == UTILISATION * 989e12
    assert card.rate(4) < card.rate(2)
    assert card_named("cpu") is None
    with pytest.raises(UserError, match=r"compute\.card=h1 is not known; there are cpu, a100"):
        card_named("h1")


@pytest.mark.parametrize(
    ("said", "name"), [("NVIDIA H200", "h200"), ("NVIDIA L40S", "l40s"), ("NVIDIA L4", "l4"),
                       ("NVIDIA GeForce RTX 4090", "rtx4090"), ("Tesla V100", None)]
)  # fmt: skip
def test_a_card_by_what_its_driver_says(said: str, name: str | None) -> None:
    found = card_of(said)
    assert (found.name if found else None) == name


def test_all_say_where_their_rates_are_from() -> None:
    assert all("data sheet" in card.source or "architecture" in card.source
               for card in CARDS.values())  # fmt: skip
