"""Every way in which a compressed checkpoint can be wrong is noticed."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_lab.families.family import Family, Made, made_by
from moe_lab.families.judging import changed_outside, judged
from moe_lab.families.stock_process import StockAnswer
from moe_lab.methods.metrics.reap import reap
from moe_lab.methods.prune import Prune
from moe_lab.methods.ratios.listed import Listed
from moe_lab.methods.ratios.uniform import Uniform


@pytest.fixture(scope="module")
def pruned(family: Family) -> Made:
    return made_by(family, Prune(reap, Uniform(0.25)))


@pytest.fixture
def copy(pruned: Made, tmp_path: Path) -> Made:
    """The same in a folder that a test may spoil."""
    shutil.copytree(pruned.folder, tmp_path / "copy")
    return replace(pruned, folder=tmp_path / "copy")


def spoil(made: Made, word: str, keep: bool = True) -> None:
    """Change the tensors with a word in their names, or take them away."""
    path = made.folder / "model.safetensors"
    tensors = load_file(path)
    names = [name for name in tensors if word in name]
    assert names
    for name in names:
        tensors[name] = tensors[name] + 0.01
        if not keep:
            del tensors[name]
    save_file(tensors, path, {"format": "pt"})


def test_what_is_right_has_its_form(family: Family, pruned: Made) -> None:
    reference = StockAnswer(pruned.logits)
    assert judged(family, pruned, reference, generate=True).state == "stock"
    assert judged(family, pruned).unchecked == ""
    assert changed_outside(family, pruned) == []
    own = made_by(family, Prune(reap, Listed([6, 8, 6, 8])))
    assert judged(family, own, StockAnswer(own.logits)).state == "own"


def test_weights_that_are_not_what_was_in_memory(family: Family, copy: Made) -> None:
    spoil(copy, "q_proj")
    outcome = judged(family, copy)
    assert outcome.state == "silent" and "read by transformers (stock)" in outcome.detail
    assert changed_outside(family, copy) == [
        f"model.layers.{index}.self_attn.q_proj.weight" for index in range(4)
    ]


def test_weights_that_are_gone(family: Family, copy: Made) -> None:
    spoil(copy, "layers.1.self_attn.q_proj", keep=False)
    outcome = judged(family, copy)
    assert outcome.state == "fault" and "complains of missing_keys" in outcome.detail
    assert changed_outside(family, copy) == ["model.layers.1.self_attn.q_proj.weight"]


def test_a_checkpoint_that_cannot_be_read(family: Family, copy: Made) -> None:
    config = json.loads((copy.folder / "config.json").read_text())
    (copy.folder / "config.json").write_text(json.dumps(config | {"hidden_size": 64}))
    outcome = judged(family, copy)
    assert outcome.state == "fault" and "cannot read it" in outcome.detail


def test_a_reference_that_differs(family: Family, pruned: Made) -> None:
    wrong = StockAnswer([logits * 1.001 for logits in pruned.logits])
    outcome = judged(family, pruned, wrong)
    assert outcome.state == "silent" and "not the reference's" in outcome.detail


def test_a_reference_that_is_none(family: Family, pruned: Made) -> None:
    outcome = judged(family, pruned, StockAnswer(None, "no rows"))
    assert (outcome.state, outcome.unchecked) == ("stock", "no rows")


def test_an_edit_without_effect(family: Family, pruned: Made) -> None:
    unchanged = replace(family, dense=replace(family.dense, logits=pruned.logits))
    outcome = judged(unchanged, pruned)
    assert (outcome.state, outcome.detail) == ("fault", "nothing changed")


def test_decoding_that_no_longer_works(family: Family, pruned: Made) -> None:
    class Broken:
        auto = family.stock.auto

        def ask(self, *args: object, **more: object) -> StockAnswer:
            answer = family.stock.ask(*args, **more)  # type: ignore[arg-type]
            return replace(answer, generation="differs at token 2")

    broken = replace(family, stock=Broken())  # type: ignore[arg-type]
    assert judged(broken, pruned, generate=True).state == "fault"
    assert judged(broken, pruned).state == "stock", "it was not asked"


def test_our_own_form_that_stock_takes_for_something_else(family: Family, copy: Made) -> None:
    mistaken = replace(copy, form=replace(copy.form, stock=False))
    assert judged(family, mistaken).state == "own", "it computes the same"
    other = replace(mistaken, logits=[torch.zeros_like(one) for one in copy.logits])
    outcome = judged(family, other)
    assert outcome.state == "silent" and "as something else" in outcome.detail
