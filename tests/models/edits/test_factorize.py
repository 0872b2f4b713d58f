"""The edit factorize: what it writes, and that a fresh process loads exactly that."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from edited_models import in_fresh_process
from factorized import full_rank_plan
from families import logits_of, tiny_batch, tiny_model
from safetensors.torch import save_file

from moe_lab.models.checkpoint import Checkpoint, load
from moe_lab.models.edited_model import Saving
from moe_lab.models.edits.factorize import FactorizeExperts
from moe_lab.models.edits.narrow import NarrowExperts
from moe_lab.models.edits.plan import Plan, apply_plan, check_plan, restructure_model
from moe_lab.models.edits.prune import PruneExperts
from moe_lab.models.factorized import factor_name, factorized_in
from moe_lab.models.form_kinds import form_kind
from moe_lab.models.layers import moe_layers
from moe_lab.models.narrowing import neurons_name
from moe_lab.models.saving import save_checkpoint
from moe_lab.models.streamed import write_edited
from moe_lab.types import UserError

RANK = {"kind": "low_rank", "rank": 3, "shared": None, "base": None}
SPECS = {
    1: {
        "gate": {"kind": "mixed_bases", "rank": 5, "bases": 3, "activation": "silu"},
        "up": {"kind": "low_rank", "rank": 3, "shared": "right", "base": 20},
        "down": {"kind": "whole"},
    },
    2: {
        "gate": {"kind": "canonical", "rank": 9},
        "up": {"kind": "ring", "ranks": [2, 3, 4]},
        "down": {"kind": "low_rank", "rank": 3, "shared": "left"},
    },
}


def drawn_plan(model) -> Plan:
    """Two layers in every kind of factors, drawn; a third one stays an MoE layer."""
    layers = {layer.info.index: layer for layer in moe_layers(model)}
    edits = tuple(
        FactorizeExperts(index, layers[index].info.name, "drawn", **specs, parameters=1, of=2)
        for index, specs in SPECS.items()
    )
    torch.manual_seed(1)
    copy = tiny_model(model.config.model_type)
    restructure_model(copy, edits)
    tensors = {}
    for edit in edits:
        experts = factorized_in(copy.get_submodule(edit.name))
        for matrix, factors in experts.factors.items():
            for name, one in factors.state_dict().items():
                value = (
                    torch.randn(one.shape) * 0.3
                    if one.is_floating_point()
                    else torch.arange(len(one))
                )
                tensors[factor_name(edit.index, matrix, name)] = value
    return Plan(edits, tensors=tensors)


def test_it_is_written_and_read_back(tmp_path: Path) -> None:
    plan = drawn_plan(tiny_model("qwen2_moe"))
    (tmp_path / "plan.json").write_text(plan.to_text())
    plan.write_tensors(tmp_path / "plan.json")
    read = Plan.load(tmp_path / "plan.json")
    assert [edit.to_json() for edit in read.edits] == [edit.to_json() for edit in plan.edits]
    assert read.edits[0].cells["factors"][0] == ["gate", "rank 5", "bases 3"]
    assert read.edits[0].title == "factorize (drawn) to 50%"
    assert set(read.tensors) == set(plan.tensors)


@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral", "deepseek_v3"])
def test_a_fresh_process_loads_it_and_stock_transformers_refuses_it(
    family: str, tmp_path: Path
) -> None:
    model, batch = tiny_model(family), tiny_batch()
    model.save_pretrained(tmp_path / "source")
    plan = drawn_plan(model)
    edited = load(tmp_path / "source")
    apply_plan(edited, plan)
    checkpoint = Checkpoint(tmp_path / "source")
    form = write_edited(checkpoint, plan, tmp_path / "own" / "model", Saving())
    assert not form.stock and "structure of the edit factorize" in form.reason
    again = load(tmp_path / "own" / "model")
    assert again.state_dict().keys() == edited.state_dict().keys()
    for name, tensor in edited.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    # What is read from a file lies in memory as the file does, and products may round otherwise.
    torch.testing.assert_close(logits_of(again), logits_of(edited), rtol=1e-5, atol=1e-5)
    values = json.loads((tmp_path / "own" / "model" / "config.json").read_text())
    assert "factorised experts" in form_kind(values, values["moe_lab"]["config"])
    save_file(
        batch | {"logits": logits_of(again, batch)}, tmp_path / "own" / "expected.safetensors"
    )
    if family == "qwen2_moe":  # each process costs seconds
        assert in_fresh_process("ours", [tmp_path / "own"]) == {"own": 0.0}
        refused = in_fresh_process("stock", [tmp_path / "own"])["own"]
        assert "moe_lab" in str(refused) and str(refused).startswith("refused")
        save_checkpoint(again, tmp_path / "second", tmp_path / "own" / "model")
        assert torch.equal(logits_of(load(tmp_path / "second")), logits_of(again))


def test_it_follows_what_removes_experts_and_hidden_units(tmp_path: Path) -> None:
    model = tiny_model("qwen2_moe")
    model.save_pretrained(tmp_path / "source")
    before = [
        PruneExperts(1, "model.layers.1.mlp", (1, 2, 5, 7)),
        NarrowExperts(2, "model.layers.2.mlp", (8,)),
    ]
    kept_EI = torch.zeros(8, 16, dtype=torch.uint8)
    kept_EI[:, ::2] = 1
    small = tiny_model("qwen2_moe")
    apply_plan(small, Plan(tuple(before), tensors={neurons_name(2): kept_EI}))
    expected, whole = logits_of(small), full_rank_plan(small, before)
    plan = Plan(whole.edits, tensors=dict(whole.tensors) | {neurons_name(2): kept_EI})
    apply_plan(model, plan)
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-4, atol=1e-4)
    save_checkpoint(model, tmp_path / "own", tmp_path / "source")
    again = load(tmp_path / "own")
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    torch.testing.assert_close(logits_of(again), logits_of(model), rtol=1e-5, atol=1e-5)


def test_factors_that_cost_more_than_they_save_are_refused() -> None:
    info = moe_layers(tiny_model("qwen2_moe"))[0].info
    rank = FactorizeExperts(1, info.name, "svd", RANK, RANK, RANK, parameters=500, of=500)
    with pytest.raises(
        UserError, match="500 parameters, and the experts have 500: that costs more"
    ):
        check_plan([info], [rank])
    with pytest.raises(UserError, match="works on an MoE layer"):
        small = FactorizeExperts(1, info.name, "svd", RANK, RANK, RANK, parameters=4, of=500)
        check_plan([info], [small, small])


def test_a_plan_without_its_tensors_is_refused() -> None:
    model = tiny_model("mixtral")
    plan = Plan(full_rank_plan(model).edits)
    with pytest.raises(
        UserError, match=r"factorises layer 0: its tensor layers.0.factors.gate.left"
    ):
        apply_plan(model, plan)
