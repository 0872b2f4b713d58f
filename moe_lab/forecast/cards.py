"""Cards by name: how fast they are at most, and how much they hold.

Peak rates are those of the makers' data sheets, of dense matrix products (without sparsity), and
nobody reaches them: `UTILISATION` of them is what hours are told for, an assumption and no
measurement. Of the processor here all is measured (`costs.json`).
"""

from __future__ import annotations

from dataclasses import dataclass

from moe_lab.forecast.need import GIBIBYTE
from moe_lab.types import UserError

UTILISATION = 0.35  # of the peak: what large transformers usually reach without tuned kernels


@dataclass(frozen=True)
class Card:
    """bf16, fp32: floating-point operations in a second; memory, bandwidth: bytes, and a second."""

    name: str
    title: str
    bf16: float
    fp32: float
    memory: float
    bandwidth: float
    source: str

    def rate(self, itemsize: int) -> float:
        """Operations in a second that are counted on, for parameters of so many bytes."""
        return UTILISATION * (self.fp32 if itemsize >= 4 else self.bf16)


CARDS = {
    card.name: card
    for card in (
        Card("a100", "NVIDIA A100 SXM 80GB", 312e12, 19.5e12, 80 * GIBIBYTE, 2.039e12,
             "NVIDIA A100 data sheet, 2021"),
        Card("b200", "NVIDIA B200", 2250e12, 75e12, 180 * GIBIBYTE, 7.7e12,
             "NVIDIA HGX B200 data sheet, a card of eight"),
        Card("h100", "NVIDIA H100 SXM", 989e12, 67e12, 80 * GIBIBYTE, 3.35e12,
             "NVIDIA H100 data sheet, half of what it says with sparsity"),
        Card("h200", "NVIDIA H200 SXM", 989e12, 67e12, 140 * GIBIBYTE, 4.8e12,
             "NVIDIA H200 data sheet, half of what it says with sparsity"),
        Card("l4", "NVIDIA L4", 121e12, 30.3e12, 24 * GIBIBYTE, 0.3e12,
             "NVIDIA L4 data sheet, half of what it says with sparsity"),
        Card("l40s", "NVIDIA L40S", 362e12, 91.6e12, 48 * GIBIBYTE, 0.864e12,
             "NVIDIA L40S data sheet"),
        Card("mi300x", "AMD Instinct MI300X", 1307e12, 163e12, 192 * GIBIBYTE, 5.3e12,
             "AMD Instinct MI300X data sheet"),
        Card("rtx4090", "NVIDIA GeForce RTX 4090", 165e12, 82.6e12, 24 * GIBIBYTE, 1.008e12,
             "NVIDIA Ada GPU architecture, version 2.1"),
    )
}  # fmt: skip
CPU = "cpu"


def card_named(name: str) -> Card | None:
    """The card of a name; None for the processor here. UserError lists those that there are."""
    if name == CPU:
        return None
    if name not in CARDS:
        raise UserError(f"compute.card={name} is not known; there are {', '.join((CPU, *CARDS))}")
    return CARDS[name]


def card_of(device_name: str) -> Card | None:
    """The card that a driver calls so, as far as it is known."""
    said = device_name.lower().replace(" ", "")
    return next((card for name, card in sorted(CARDS.items(), reverse=True) if name in said), None)
