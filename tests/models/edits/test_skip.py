"""The edit skip: what it writes, refuses and carries out, and its own form on disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from edited_models import applied, edited, in_fresh_process, moe_indices
from families import FAMILIES, logits_of, tiny_model

from moe_lab.models.checkpoint import load
from moe_lab.models.edits.plan import Plan, apply_plan, check_plan
from moe_lab.models.edits.prune import PruneExperts
from moe_lab.models.edits.skip import SkipExperts
from moe_lab.models.form_kinds import form_kind
from moe_lab.models.layers import moe_layers
from moe_lab.models.saving import save_checkpoint
from moe_lab.models.skip_rules import Skipping, rule_of
from moe_lab.types import UserError

RULES = {
    "qwen2_moe": {"rule": "top_p", "value": 0.2, "scoring": "softmax"},
    "deepseek_v3": {"rule": "entropy", "value": 1.0, "scoring": "sigmoid", "renormalize": False},
    "olmoe": {"rule": "first", "value": 2.0, "renormalize": False},
    "mixtral": {"rule": "ratio", "value": 0.7},
    "gpt_oss": {"rule": "ratio", "value": 0.7},
}


def of_all(family: str) -> list[dict]:
    return [{"index": i, "edit": "skip", **RULES[family]} for i in moe_indices(family)]


def test_it_is_written_and_read_back(tmp_path: Path) -> None:
    whole = SkipExperts(1, "a", "top_p", 0.4, False, "softmax", 2.5)
    bare = SkipExperts(2, "b", "ratio", 0.5)
    assert bare.to_json() == {
        "index": 2, "name": "b", "edit": "skip", "rule": "ratio", "value": 0.5, "renormalize": True,
    }  # fmt: skip
    (tmp_path / "plan.json").write_text(Plan((whole, bare)).to_text())
    assert Plan.load(tmp_path / "plan.json").edits == (whole, bare)
    assert whole.title == "skip (top_p)" and bare.cells == {"rule": ["ratio 0.5"]}
    assert whole.cells == {"rule": ["top_p 0.4"], "experts per token": [2.5]}


def test_a_fresh_process_computes_the_same_and_stock_refuses(tmp_path: Path) -> None:
    folders = [tmp_path / family for family in RULES]
    for folder in folders:
        assert not edited(folder.name, of_all(folder.name), folder)
    numbers = {name: tmp_path / f"top_k_{name}" for name in ("one", "several")}
    one, several = ([{"index": i, "edit": "top_k", "top_k": k} for i, k in enumerate(some)]
                    for some in ((1, 1, 1, 1), (1, 2, 2, 1)))  # fmt: skip
    assert edited("mixtral", one, numbers["one"])
    assert not edited("mixtral", several, numbers["several"])
    ours = in_fresh_process("ours", [*folders, *numbers.values()])
    assert set(ours.values()) == {0.0} and len(ours) == len(RULES) + 2
    stock = in_fresh_process("stock", [folders[0], *numbers.values()])
    assert stock.pop("top_k_one") == 0.0
    assert len(stock) == 2 and all("moe_lab" in str(told) for told in stock.values())
    for folder in folders:
        source, model = (load(folder / name).state_dict() for name in ("source", "model"))
        assert source.keys() == model.keys()
        assert all(torch.equal(model[name], tensor) for name, tensor in source.items())
        configs = [
            json.loads((folder / name / "config.json").read_text()) for name in ("model", "source")
        ]
        assert form_kind(*configs) == "own form, skipped experts"


def test_what_is_loaded_can_be_saved_once_more(tmp_path: Path) -> None:
    edited("mixtral", of_all("mixtral"), tmp_path / "x")
    again = load(tmp_path / "x" / "model")
    assert {rule_of(layer) for layer in moe_layers(again)} == {Skipping("ratio", 0.7)}
    save_checkpoint(again, tmp_path / "again", tmp_path / "x" / "model")
    assert torch.equal(logits_of(load(tmp_path / "again")), logits_of(again))
    assert not torch.equal(logits_of(again), logits_of(tiny_model("mixtral")))


@pytest.mark.parametrize("family", FAMILIES)
def test_behind_pruning_it_works_on_what_is_left(family: str) -> None:
    model = tiny_model(family)
    kept = (0, 1, 4, 5) if family == "deepseek_v3" else (1, 2, 5)
    infos = [layer.info for layer in moe_layers(model)]
    prune = [PruneExperts(info.index, info.name, kept) for info in infos]
    skip = [SkipExperts(info.index, info.name, "ratio", 0.8) for info in infos]
    check_plan(infos, [*prune, *skip])
    apply_plan(model, Plan((*prune, *skip)))
    other = tiny_model(family)
    apply_plan(other, Plan((*skip, *prune)))
    assert torch.equal(logits_of(model), logits_of(other))  # routing changes, and weights do not
    assert [layer.info.num_experts for layer in moe_layers(model)] == [len(kept)] * len(infos)


def test_behind_stand_ins_it_is_refused() -> None:
    model = tiny_model("mixtral")
    info = moe_layers(model)[0].info
    prune = PruneExperts(info.index, info.name, (1, 2, 5), replacement="zero")
    with pytest.raises(UserError, match="rows of its router lead to no expert of their own"):
        apply_plan(model, Plan((prune, SkipExperts(info.index, info.name, "ratio", 0.5))))


def test_training_behind_it_reaches_the_experts_that_are_used() -> None:
    model = applied("mixtral", of_all("mixtral"))
    layer = moe_layers(model)[0]
    assert SkipExperts(0, "a").trains == "experts"
    logits = model(input_ids=torch.tensor([[5, 6, 7]])).logits
    logits.square().sum().backward()
    gradients = layer.experts.down_proj.grad.abs().sum(dim=(1, 2))
    assert int((gradients > 0).sum()) < 6 and bool((gradients > 0).any())
    assert bool(layer.router.weight.grad.isfinite().all())


def test_a_rule_in_a_file_that_is_none_is_refused() -> None:
    layer = moe_layers(tiny_model("mixtral"))[0]
    for written in ({"rule": "ratio"}, {"rule": "ratio", "value": 1.0, "least": 2}):
        with pytest.raises(UserError, match="of this checkpoint is none"):
            SkipExperts.replay(layer, written)
    with pytest.raises(UserError, match="there are ratio, weight, entropy"):
        SkipExperts.replay(layer, {"rule": "ratio", "value": "half"})
