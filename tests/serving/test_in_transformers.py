"""Stock transformers, really run: right, or refused in a line."""

from __future__ import annotations

import torch
from torch import nn

from moe_lab.report.serving import Cell
from moe_lab.serving.asking import cells_of
from moe_lab.serving.checkpoints import Served
from moe_lab.serving.engines import engines
from moe_lab.serving.in_transformers import continued
from moe_lab.store import Store


def cells(name: str, served: list[Served], store: Store) -> list[Cell]:
    return cells_of(store, engines("no python")[name], served)


def test_native_is_right_and_our_own_form_refused(few: list[Served], served_store: Store) -> None:
    found = cells("transformers", few, served_store)
    assert [one.verdict for one in found] == ["right", "right", "refused"]
    assert [one.tokens for one in found] == ["48/48", "48/48", ""]
    assert found[0].difference is not None and found[0].difference < 1e-6
    assert "moe_lab" in found[2].detail and "\n" not in found[2].detail


class Counting(nn.Module):
    """Says that the token behind n is n + 1."""

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> object:
        logits = nn.functional.one_hot((input_ids + 1) % 10, 10).float()
        return type("Output", (), {"logits": logits})


def test_greedy_decoding_goes_on_from_its_own_tokens() -> None:
    logprobs_TV = continued(Counting(), [3, 4], 3)
    assert logprobs_TV.argmax(-1).tolist() == [5, 6, 7]
    assert torch.allclose(logprobs_TV.exp().sum(-1), torch.ones(3, dtype=torch.float64))
