"""Weight files that are planned before they are filled."""

from __future__ import annotations

import torch

from moe_lab.models.shards import Entry, layout_digest, plan_shards


def piece(number: int) -> list[Entry]:
    """Two tensors of a decoder layer."""
    return [
        Entry(f"layers.{number}.{name}", torch.float32, (10, number + 1)) for name in ("a", "b")
    ]


def test_another_plan_has_another_digest() -> None:
    one, other = (plan_shards([piece(number)]) for number in (0, 1))
    assert layout_digest(one, "a plan") == layout_digest(plan_shards([piece(0)]), "a plan")
    assert layout_digest(one, "a plan") != layout_digest(other, "a plan")
    assert layout_digest(one, "a plan") != layout_digest(one, "another")
