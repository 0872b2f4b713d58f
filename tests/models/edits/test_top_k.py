"""The edit top_k: what it writes, refuses and carries out, and the form of its result."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from edited_models import applied, edited, moe_indices
from families import FAMILIES, logits_of, tiny_model
from safetensors.torch import load_file

from moe_lab.models.checkpoint import load
from moe_lab.models.edits.plan import Plan, apply_plan, check_plan
from moe_lab.models.edits.prune import PruneExperts
from moe_lab.models.edits.top_k import SetTopK
from moe_lab.models.layers import moe_layers
from moe_lab.models.routers import set_top_k
from moe_lab.types import UserError

SEVERAL = ("qwen2_moe", "mixtral", "deepseek_v3", "gpt_oss")


def of_all(family: str, *numbers: int) -> list[dict]:
    """An edit of each MoE layer, the numbers in turn."""
    places = enumerate(moe_indices(family))
    return [{"index": i, "edit": "top_k", "top_k": numbers[at % len(numbers)]} for at, i in places]


def test_it_is_written_and_read_back(tmp_path: Path) -> None:
    whole, bare = SetTopK(1, "a", 2, (3.5, 0.0)), SetTopK(2, "b", 1)
    assert bare.to_json() == {"index": 2, "name": "b", "edit": "top_k", "top_k": 1}
    (tmp_path / "plan.json").write_text(Plan((whole, bare)).to_text())
    assert Plan.load(tmp_path / "plan.json").edits == (whole, bare)
    assert whole.title == "top_k 2"
    assert whole.cells == {"experts per token": [2], "damage by k": [3.5, 0.0]}
    assert whole.keeps_experts_as_they_are and whole.fate(3).state == "kept"


@pytest.mark.parametrize("family", FAMILIES)
def test_as_many_as_there_were_is_the_identity_and_one_is_the_familys_own(family: str) -> None:
    own = FAMILIES[family]["num_experts_per_tok"]
    assert torch.equal(
        logits_of(applied(family, of_all(family, own))), logits_of(tiny_model(family))
    )
    model = tiny_model(family)
    set_top_k(model, 1)
    assert torch.equal(logits_of(applied(family, of_all(family, 1))), logits_of(model))


def test_one_number_is_the_familys_own_form_and_several_are_ours(tmp_path: Path) -> None:
    for family in SEVERAL:
        numbers = (2, 1, 3) if FAMILIES[family]["num_experts_per_tok"] == 3 else (2, 1)
        assert edited(family, of_all(family, 1), tmp_path / f"{family}_one")
        folder = tmp_path / f"{family}_several"
        assert not edited(family, of_all(family, *numbers), folder)
        again = load(folder / "model")
        expected = load_file(folder / "expected.safetensors")["logits"]
        assert torch.equal(logits_of(again), expected)
        source, model = load(folder / "source").state_dict(), again.state_dict()
        assert source.keys() == model.keys()
        assert all(torch.equal(model[name], tensor) for name, tensor in source.items())


def test_it_stands_behind_pruning_and_in_front_of_it() -> None:
    model = tiny_model("qwen2_moe")
    info = moe_layers(model)[0].info
    prune = PruneExperts(info.index, info.name, (1, 2, 5))
    edits = (prune, SetTopK(info.index, info.name, 2))
    check_plan([info], edits)
    apply_plan(model, Plan(edits))
    assert moe_layers(model)[0].info.top_k == 2 and moe_layers(model)[0].info.num_experts == 3
    few = PruneExperts(info.index, info.name, (1, 2))
    check_plan([info], (SetTopK(info.index, info.name, 2), few))
    with pytest.raises(UserError, match=r"2 of 8 experts would stay.*chooses 3"):
        check_plan([info], (few,))


@pytest.mark.parametrize(
    ("family", "number", "why"),
    [("mixtral", 9, "it has 8 experts: a token can have 1 to 8"), ("mixtral", 0, "1 to 8"),
     ("deepseek_v3", 5, "1 to 4 .8 experts in 2 groups, of which 1")],
)  # fmt: skip
def test_numbers_that_a_layer_cannot_have_are_refused(family: str, number: int, why: str) -> None:
    info = moe_layers(tiny_model(family))[0].info
    with pytest.raises(UserError, match=why):
        check_plan([info], [SetTopK(info.index, info.name, number)])
