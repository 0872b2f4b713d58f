"""Covariances as forms take them: damped, of each expert or of all."""

from __future__ import annotations

import torch

from moe_lab.methods.factorizing.base import ExpertMatrices
from moe_lab.methods.factorizing.svd import SVD

COVARIANCE = torch.stack([torch.eye(3).double() * size for size in (1.0, 3.0, 0.0)])
GIVEN = ExpertMatrices("gate", torch.zeros(3, 2, 3).double(), COVARIANCE)


def test_each_is_damped_by_its_own_size() -> None:
    found = SVD(damping=0.5).covariances(GIVEN)
    one = torch.eye(3).double()
    torch.testing.assert_close(found, torch.stack([1.5 * one, 4.5 * one, one]))


def test_together_they_weigh_as_their_tokens_do() -> None:
    form, one = SVD(damping=0.3), torch.eye(3).double()
    torch.testing.assert_close(form.pooled(GIVEN), 4 * 1.3 * one)
    found = form.covariances(GIVEN, together=True)
    torch.testing.assert_close(found, torch.stack([1.4 * one, 3.4 * one, 0.4 * one]))
    torch.testing.assert_close(found.sum(dim=0), form.pooled(GIVEN))


def test_without_whitening_there_are_none() -> None:
    form = SVD(whiten=False)
    assert form.covariances(GIVEN) is None and form.pooled(GIVEN) is None
    assert SVD().covariances(ExpertMatrices("gate", GIVEN.weight)) is None
