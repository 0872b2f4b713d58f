"""A tiny checkpoint and what is made of it: the same functions as a run's stages."""

from __future__ import annotations

import torch

from moe_lab.families.family import Family, made_by
from moe_lab.families.references import logits_of
from moe_lab.methods.metrics.reap import reap
from moe_lab.methods.prune import Prune
from moe_lab.methods.ratios.uniform import Uniform
from moe_lab.models.checkpoint import load


def test_what_is_made_lies_in_a_folder_of_its_own(family: Family) -> None:
    some, others = (made_by(family, Prune(reap, Uniform(share))) for share in (0.25, 0.5))
    assert some.folder != others.folder and some.form.stock
    assert [len(edit.experts_kept or ()) for edit in others.plan.edits] == [4] * 4
    assert not torch.equal(some.logits[0], others.logits[0])
    assert torch.equal(logits_of(load(some.folder), family.batches)[0], some.logits[0])


def test_it_knows_what_is_there(family: Family) -> None:
    assert family.experts == {0: 8, 1: 8, 2: 8, 3: 8}
    assert family.dense.logits and family.dense.generation == "equal"
    assert not family.takes_images and family.image is None
