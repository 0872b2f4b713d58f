"""EASY-EP: changes of direction, large and too small for float32."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from layer_statistics import sent_to_one
from torch import Tensor

from moe_lab.methods.metrics.easy_ep import easy_ep


def states() -> Iterator[tuple[Tensor, Tensor]]:
    """What a layer adds to and what it adds [T, 4]: of all relations, down to a part in 10^9."""
    generator = torch.Generator().manual_seed(0)
    for scale in (1e-6, 1e-3, 1.0, 1e3):
        drawn = torch.randn(2, 6, 4, generator=generator, dtype=torch.float64)
        yield 1e3 * drawn[0], scale * drawn[1]


def test_a_small_change_is_not_lost_to_rounding() -> None:
    for h_TD, m_TD in states():
        h_TD, m_TD = h_TD.float(), m_TD.float()
        a_TD, m64_TD = h_TD.double(), m_TD.double()
        perpendicular_TD = m64_TD - (a_TD * m64_TD).sum(1, True) / (a_TD * a_TD).sum(1, True) * a_TD
        angle_T = torch.atan2(
            perpendicular_TD.norm(dim=1), (a_TD * (a_TD + m64_TD)).sum(1) / a_TD.norm(dim=1)
        )
        expected = (2 * torch.sin(angle_T / 2) ** 2 * m64_TD.norm(dim=1)).sum()
        found = sent_to_one(
            m_TD, residual_TD=h_TD, entering_TD=h_TD, leaving_TD=h_TD, routed_TD=m_TD
        )
        assert easy_ep(found)[1].item() == pytest.approx(expected.item(), rel=1e-4)


def test_a_change_of_direction_is_2_and_one_from_nothing_is_1() -> None:
    h_TD = torch.tensor([[3.0, 4.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    m_TD = torch.tensor([[-6.0, -8.0, 0.0, 0.0], [0.0, 5.0, 0.0, 0.0]])
    layer = sent_to_one(m_TD, residual_TD=h_TD, entering_TD=h_TD, leaving_TD=h_TD, routed_TD=m_TD)
    assert easy_ep(layer).tolist() == pytest.approx([0, 10 * 2 + 5 * 1])
