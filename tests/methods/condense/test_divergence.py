"""Divergences of states against their textbook form."""

from __future__ import annotations

import pytest
import torch
from condensing import TEXTBOOK

from moe_lab.methods.condense import divergence


@pytest.mark.parametrize("name", TEXTBOOK)
def test_divergences_equal_the_textbook_form(name: str) -> None:
    measure, textbook = getattr(divergence, name), TEXTBOOK[name]
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(50, 64, generator=generator)
    for distance in (1e-3, 1e-2, 1.0, 10.0, 100.0):
        v = u + distance * torch.randn(50, 64, generator=generator)
        expected = textbook(u, v)
        exact = measure(divergence.probability(u.double()), v.double())
        torch.testing.assert_close(exact, expected, rtol=1e-9, atol=1e-16)
        # In float32 the inputs' own rounding is what remains of the error.
        found = measure(divergence.probability(u), v).double()
        torch.testing.assert_close(found, expected, rtol=2e-3, atol=1e-12)
    assert measure(divergence.probability(u), u).abs().max() == 0


def test_js_divergence_of_states_without_common_mass_is_log_2() -> None:
    u, v = torch.eye(2) * 1000, torch.eye(2).flip(0) * 1000
    far = divergence.js(divergence.probability(u), v)
    assert far.tolist() == pytest.approx([torch.tensor(2.0).log().item()] * 2, rel=1e-6)
